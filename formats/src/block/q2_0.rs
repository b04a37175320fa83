//! Q2_0: 2-bit codes with one scale per 64, value `(code - 1) d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// A block of 64 elements, `block_q2_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Bits `2(j % 4)` of byte `j / 4` are element `j`.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ2_0>() == 18 && align_of::<BlockQ2_0>() == 1);

impl BlockQ2_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 64;

    /// `codes`: 0 to 3.
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 64]) -> Self {
        let mut qs = [0; 16];
        for (byte, codes) in qs.iter_mut().zip(codes.as_chunks::<4>().0) {
            *byte = codes
                .iter()
                .rev()
                .fold(0, |byte, code| (byte << 2) | (code & 3));
        }
        Self {
            d: d.to_le_bytes(),
            qs,
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 64]) {
        let mut codes = [0; 64];
        for (codes, byte) in codes.as_chunks_mut::<4>().0.iter_mut().zip(self.qs) {
            for (pair, code) in codes.iter_mut().enumerate() {
                *code = (byte >> (2 * pair)) & 3;
            }
        }
        (f16::from_le_bytes(self.d), codes)
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = (f32::from(code) - 1.0) * d;
        }
    }
}
