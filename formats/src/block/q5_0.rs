//! Q5_0: 5-bit codes with one scale per 32, value `(code - 16) d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes::{pack_nibbles, unpack_nibbles};

/// A block of 32 elements, `block_q5_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Bit `j` is the fifth bit of element `j`.
    pub qh: [u8; 4],
    /// Byte `j`: low four bits of element `j` (low) and `j + 16` (high).
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22 && align_of::<BlockQ5_0>() == 1);

impl BlockQ5_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `codes`: 0 to 31.
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 32]) -> Self {
        Self {
            d: d.to_le_bytes(),
            qh: pack_fifth_bits(codes),
            qs: pack_nibbles::<16, 16>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 32]) {
        (f16::from_le_bytes(self.d), unpack_codes(&self.qh, &self.qs))
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = (f32::from(code) - 16.0) * d;
        }
    }
}

/// Bit `j` is the fifth bit of code `j`.
#[inline(always)]
pub(super) fn pack_fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let mut qh = [0; 4];
    for (byte, codes) in qh.iter_mut().zip(codes.as_chunks().0) {
        let bits = (u64::from_le_bytes(*codes) >> 4) & 0x0101_0101_0101_0101;
        // Moves bit 8i to bit 56 + i.
        *byte = (bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
    qh
}

/// Joins nibbles and fifth bits.
#[inline(always)]
pub(super) fn unpack_codes(qh: &[u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let qh = u32::from_le_bytes(*qh);
    let mut codes = unpack_nibbles::<16, 32>(qs);
    for (j, code) in codes.iter_mut().enumerate() {
        *code |= (((qh >> j) & 1) << 4) as u8;
    }
    codes
}
