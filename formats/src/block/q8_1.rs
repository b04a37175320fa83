//! Q8_1: Q8_0 with the sum of its values, for activations; value `code d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// A block of 32 elements, `block_q8_1` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_1 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// `d` times the sum of the codes, f16.
    pub s: [u8; 2],
    /// Codes.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<BlockQ8_1>() == 36 && align_of::<BlockQ8_1>() == 1);

impl BlockQ8_1 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `s`: `d` times the sum of `codes`.
    #[inline(always)]
    pub fn pack(d: f16, s: f16, codes: &[i8; 32]) -> Self {
        Self {
            d: d.to_le_bytes(),
            s: s.to_le_bytes(),
            qs: *codes,
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, f16, [i8; 32]) {
        (
            f16::from_le_bytes(self.d),
            f16::from_le_bytes(self.s),
            self.qs,
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, _, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(code) * d;
        }
    }
}
