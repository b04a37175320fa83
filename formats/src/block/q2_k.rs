//! Q2_K: 2-bit codes, 4-bit scale and minimum per 16, value `d scale code - dmin min`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes;

/// A block of 256 elements, `block_q2_K` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Per 16 elements: scale (low nibble) and minimum (high).
    pub scales: [u8; 16],
    /// Half `h`: byte `32h + l`, bits `2s` are element `128h + 32s + l`.
    pub qs: [u8; 64],
    /// Scale of the scales, f16.
    pub d: [u8; 2],
    /// Scale of the minimums, f16.
    pub dmin: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ2K>() == 84 && align_of::<BlockQ2K>() == 1);

impl BlockQ2K {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `scales`, `mins`: 0 to 15, per 16; `codes`: 0 to 3.
    #[inline(always)]
    pub fn pack(d: f16, dmin: f16, scales: &[u8; 16], mins: &[u8; 16], codes: &[u8; 256]) -> Self {
        let mut both = [0; 16];
        for ((byte, scale), min) in both.iter_mut().zip(scales).zip(mins) {
            *byte = (scale & 15) | (min << 4);
        }
        Self {
            scales: both,
            qs: planes::pack::<2, 32, 64>(codes, 0),
            d: d.to_le_bytes(),
            dmin: dmin.to_le_bytes(),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, f16, [u8; 16], [u8; 16], [u8; 256]) {
        let mut codes = [0; 256];
        planes::unpack::<2, 32>(&self.qs, 0, &mut codes);
        let (d, dmin) = (f16::from_le_bytes(self.d), f16::from_le_bytes(self.dmin));
        (
            d,
            dmin,
            self.scales.map(|both| both & 15),
            self.scales.map(|both| both >> 4),
            codes,
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, dmin, scales, mins, codes) = self.parts();
        let (d, dmin) = (d.to_f32(), dmin.to_f32());
        let groups = out
            .as_chunks_mut::<16>()
            .0
            .iter_mut()
            .zip(codes.as_chunks::<16>().0);
        for ((values, codes), (scale, min)) in groups.zip(scales.into_iter().zip(mins)) {
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for (value, code) in values.iter_mut().zip(codes) {
                *value = scale * f32::from(*code) - min;
            }
        }
    }
}
