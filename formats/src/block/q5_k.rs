//! Q5_K: 5-bit codes, 6-bit scale and minimum per 32, value `d scale code - dmin min`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes;
use super::q4_k::{pack_scales, unpack_scales};

/// A block of 256 elements, `block_q5_K` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// Scale of the scales, f16.
    pub d: [u8; 2],
    /// Scale of the minimums, f16.
    pub dmin: [u8; 2],
    /// Scales and minimums of each 32, six bits each (see `unpack_scales`).
    pub scales: [u8; 12],
    /// Byte `l`, bit `b` is the fifth bit of element `32b + l`.
    pub qh: [u8; 32],
    /// Chunk `c` of 64: byte `32c + l` is element `64c + l` (low) and `64c + 32 + l` (high).
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176 && align_of::<BlockQ5K>() == 1);

impl BlockQ5K {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `scales`, `mins`: 0 to 63, per 32; `codes`: 0 to 31.
    #[inline(always)]
    pub fn pack(d: f16, dmin: f16, scales: &[u8; 8], mins: &[u8; 8], codes: &[u8; 256]) -> Self {
        Self {
            d: d.to_le_bytes(),
            dmin: dmin.to_le_bytes(),
            scales: pack_scales(scales, mins),
            qh: planes::pack::<1, 32, 32>(codes, 4),
            qs: planes::pack_nibbles::<32, 128>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, f16, [u8; 8], [u8; 8], [u8; 256]) {
        let (scales, mins) = unpack_scales(&self.scales);
        let (d, dmin) = (f16::from_le_bytes(self.d), f16::from_le_bytes(self.dmin));
        let mut codes = planes::unpack_nibbles::<32, 256>(&self.qs);
        planes::unpack::<1, 32>(&self.qh, 4, &mut codes);
        (d, dmin, scales, mins, codes)
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, dmin, scales, mins, codes) = self.parts();
        let (d, dmin) = (d.to_f32(), dmin.to_f32());
        let groups = out
            .as_chunks_mut::<32>()
            .0
            .iter_mut()
            .zip(codes.as_chunks::<32>().0);
        for ((values, codes), (scale, min)) in groups.zip(scales.into_iter().zip(mins)) {
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for (value, code) in values.iter_mut().zip(codes) {
                *value = scale * f32::from(*code) - min;
            }
        }
    }
}
