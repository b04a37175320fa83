//! Q4_0: 4-bit codes with one scale per 32, value `(code - 8) d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes::{pack_nibbles, unpack_nibbles};

/// A block of 32 elements, `block_q4_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Byte `j`: low four bits of element `j` (low) and `j + 16` (high).
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18 && align_of::<BlockQ4_0>() == 1);

impl BlockQ4_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `codes`: 0 to 15.
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 32]) -> Self {
        Self {
            d: d.to_le_bytes(),
            qs: pack_nibbles::<16, 16>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 32]) {
        (
            f16::from_le_bytes(self.d),
            unpack_nibbles::<16, 32>(&self.qs),
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = (f32::from(code) - 8.0) * d;
        }
    }
}
