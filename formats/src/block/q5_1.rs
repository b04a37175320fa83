//! Q5_1: 5-bit codes with scale and minimum per 32, value `code d + m`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes::pack_nibbles;
use super::q5_0::{pack_fifth_bits, unpack_codes};

/// A block of 32 elements, `block_q5_1` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Minimum, f16.
    pub m: [u8; 2],
    /// Bit `j` is the fifth bit of element `j`.
    pub qh: [u8; 4],
    /// Byte `j`: low four bits of element `j` (low) and `j + 16` (high).
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24 && align_of::<BlockQ5_1>() == 1);

impl BlockQ5_1 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `codes`: 0 to 31.
    #[inline(always)]
    pub fn pack(d: f16, m: f16, codes: &[u8; 32]) -> Self {
        Self {
            d: d.to_le_bytes(),
            m: m.to_le_bytes(),
            qh: pack_fifth_bits(codes),
            qs: pack_nibbles::<16, 16>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, f16, [u8; 32]) {
        (
            f16::from_le_bytes(self.d),
            f16::from_le_bytes(self.m),
            unpack_codes(&self.qh, &self.qs),
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, m, codes) = self.parts();
        let (d, m) = (d.to_f32(), m.to_f32());
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(code) * d + m;
        }
    }
}
