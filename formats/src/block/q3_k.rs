//! Q3_K: 3-bit codes, signed 6-bit scale per 16, value `d scale (code - 4)`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes;

/// A block of 256 elements, `block_q3_K` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// Byte `l`, bit `b` is the third bit of element `32b + l`.
    pub hmask: [u8; 32],
    /// Low two bits; half `h`: byte `32h + l`, bits `2s` are element `128h + 32s + l`.
    pub qs: [u8; 64],
    /// Scales plus 32 in six bits: low nibbles of `k` and `k + 8` in byte `k`, bits `2(k / 4)` of byte `8 + k % 4` the upper two.
    pub scales: [u8; 12],
    /// Scale of the scales, f16.
    pub d: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ3K>() == 110 && align_of::<BlockQ3K>() == 1);

impl BlockQ3K {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `scales`: -32 to 31, per 16; `codes`: 0 to 7.
    #[inline(always)]
    pub fn pack(d: f16, scales: &[i8; 16], codes: &[u8; 256]) -> Self {
        let scales = scales.map(|scale| scale.wrapping_add(32) as u8);
        let mut packed = [0; 12];
        packed[..8].copy_from_slice(&planes::pack::<4, 8, 8>(&scales, 0));
        packed[8..].copy_from_slice(&planes::pack::<2, 4, 4>(&scales, 4));
        Self {
            hmask: planes::pack::<1, 32, 32>(codes, 2),
            qs: planes::pack::<2, 32, 64>(codes, 0),
            scales: packed,
            d: d.to_le_bytes(),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [i8; 16], [u8; 256]) {
        let mut codes = [0; 256];
        planes::unpack::<2, 32>(&self.qs, 0, &mut codes);
        planes::unpack::<1, 32>(&self.hmask, 2, &mut codes);
        let mut scales = [0; 16];
        planes::unpack::<4, 8>(&self.scales[..8], 0, &mut scales);
        planes::unpack::<2, 4>(&self.scales[8..], 4, &mut scales);
        (
            f16::from_le_bytes(self.d),
            scales.map(|scale| scale as i8 - 32),
            codes,
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, scales, codes) = self.parts();
        let d = d.to_f32();
        let groups = out
            .as_chunks_mut::<16>()
            .0
            .iter_mut()
            .zip(codes.as_chunks::<16>().0);
        for ((values, codes), scale) in groups.zip(scales) {
            let scale = d * f32::from(scale);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = scale * (f32::from(*code) - 4.0);
            }
        }
    }
}
