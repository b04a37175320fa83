//! Q8_K: 8-bit codes with one f32 scale per 256 and sums per 16, for activations; value `code d`.

use bytemuck::{Pod, Zeroable};

/// A block of 256 elements, `block_q8_K` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8K {
    /// Scale, f32.
    pub d: [u8; 4],
    /// Codes.
    pub qs: [i8; 256],
    /// Sums of the codes of each 16, i16.
    pub bsums: [[u8; 2]; 16],
}

const _: () = assert!(size_of::<BlockQ8K>() == 292 && align_of::<BlockQ8K>() == 1);

impl BlockQ8K {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `codes`: any; their sums are added.
    #[inline(always)]
    pub fn pack(d: f32, codes: &[i8; 256]) -> Self {
        let mut bsums = [[0; 2]; 16];
        for (sum, codes) in bsums.iter_mut().zip(codes.as_chunks::<16>().0) {
            *sum = codes
                .iter()
                .map(|code| i16::from(*code))
                .sum::<i16>()
                .to_le_bytes();
        }
        Self {
            d: d.to_le_bytes(),
            qs: *codes,
            bsums,
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f32, [i8; 256]) {
        (f32::from_le_bytes(self.d), self.qs)
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = f32::from(code) * d;
        }
    }
}
