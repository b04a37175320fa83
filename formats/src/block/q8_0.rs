//! Q8_0: 8-bit codes with one scale per 32, value `code d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// A block of 32 elements, `block_q8_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Codes.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34 && align_of::<BlockQ8_0>() == 1);

impl BlockQ8_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `codes`: -127 to 127 (-128 is legal).
    #[inline(always)]
    pub fn pack(d: f16, codes: &[i8; 32]) -> Self {
        Self {
            d: d.to_le_bytes(),
            qs: *codes,
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [i8; 32]) {
        (f16::from_le_bytes(self.d), self.qs)
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(code) * d;
        }
    }
}
