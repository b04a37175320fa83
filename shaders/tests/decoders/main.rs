//! Stored weights on every device that is there against the decoders of `formats`, bit for bit but for quotients in WGSL.

mod blocks;
mod definitions;
#[path = "../operations/drivers.rs"]
mod drivers;
mod floats;
mod integers;
mod packed;

/// F16: zeros, subnormal numbers, infinities, NaN, the largest, the smallest normal ones, 1 and -1.
pub const HALVES: [u16; 15] = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x83ff, 0x7c00, 0xfc00, 0x7e00, 0xfdff, 0x7bff, 0xfbff,
    0x0400, 0x3c00, 0xbc00,
];

/// Random bits that are the same everywhere (xorshift64).
pub struct Random(u64);

impl Random {
    /// Begins anew.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// Bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.bits() as u8).collect()
    }

    /// One of some values.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.bits() as usize % values.len()]
    }
}

/// Expects the same bits, but any NaN for a NaN.
#[track_caller]
pub fn assert_same(what: &str, found: &[f32], expected: &[f32]) {
    assert_within(what, found, expected, 0);
}

/// Expects the same numbers up to so many of their last places, but any NaN for a NaN.
#[track_caller]
pub fn assert_within(what: &str, found: &[f32], expected: &[f32], places: u32) {
    assert_eq!(found.len(), expected.len(), "{what}: values");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_same_nan = found.is_nan() && expected.is_nan();
        assert!(
            is_same_nan || found.to_bits().abs_diff(expected.to_bits()) <= places,
            "{what}: value {at} must be {expected:e} ({:#x}), found {found:e} ({:#x})",
            expected.to_bits(),
            found.to_bits(),
        );
    }
}
