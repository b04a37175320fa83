//! Q1_0: signs with one magnitude per 128, value `d` or `-d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// A block of 128 elements, `block_q1_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ1_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Bit `j % 8` of byte `j / 8` is set where element `j` is `d`.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ1_0>() == 18 && align_of::<BlockQ1_0>() == 1);

impl BlockQ1_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 128;

    /// `codes`: 1 for `d`, 0 for `-d`.
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 128]) -> Self {
        let mut qs = [0; 16];
        for (byte, codes) in qs.iter_mut().zip(codes.as_chunks::<8>().0) {
            *byte = codes
                .iter()
                .rev()
                .fold(0, |byte, code| (byte << 1) | (code & 1));
        }
        Self {
            d: d.to_le_bytes(),
            qs,
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 128]) {
        let mut codes = [0; 128];
        for (codes, byte) in codes.as_chunks_mut::<8>().0.iter_mut().zip(self.qs) {
            for (bit, code) in codes.iter_mut().enumerate() {
                *code = (byte >> bit) & 1;
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
            *value = if code == 1 { d } else { -d };
        }
    }
}
