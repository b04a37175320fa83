//! TQ2_0: ternary codes in two bits with one scale per 256, value `(code - 1) d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes;

/// A block of 256 elements, `block_tq2_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ2_0 {
    /// For each half of 128: byte `m`, bits `2n` are element `m + 32n`.
    pub qs: [u8; 64],
    /// Scale, f16.
    pub d: [u8; 2],
}

const _: () = assert!(size_of::<BlockTQ2_0>() == 66 && align_of::<BlockTQ2_0>() == 1);

impl BlockTQ2_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `codes`: 0 to 2 (3 is legal and means `2 d`).
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 256]) -> Self {
        Self {
            qs: planes::pack::<2, 32, 64>(codes, 0),
            d: d.to_le_bytes(),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 256]) {
        let mut codes = [0; 256];
        planes::unpack::<2, 32>(&self.qs, 0, &mut codes);
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
