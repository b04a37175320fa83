//! Q4_K: 4-bit codes, 6-bit scale and minimum per 32, value `d scale code - dmin min`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes::{pack_nibbles, unpack_nibbles};

/// A block of 256 elements, `block_q4_K` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales, f16.
    pub d: [u8; 2],
    /// Scale of the minimums, f16.
    pub dmin: [u8; 2],
    /// Scales and minimums of each 32, six bits each (see `unpack_scales`).
    pub scales: [u8; 12],
    /// Chunk `c` of 64: byte `32c + l` is element `64c + l` (low) and `64c + 32 + l` (high).
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144 && align_of::<BlockQ4K>() == 1);

impl BlockQ4K {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `scales`, `mins`: 0 to 63, per 32; `codes`: 0 to 15.
    #[inline(always)]
    pub fn pack(d: f16, dmin: f16, scales: &[u8; 8], mins: &[u8; 8], codes: &[u8; 256]) -> Self {
        Self {
            d: d.to_le_bytes(),
            dmin: dmin.to_le_bytes(),
            scales: pack_scales(scales, mins),
            qs: pack_nibbles::<32, 128>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, f16, [u8; 8], [u8; 8], [u8; 256]) {
        let (scales, mins) = unpack_scales(&self.scales);
        let (d, dmin) = (f16::from_le_bytes(self.d), f16::from_le_bytes(self.dmin));
        (d, dmin, scales, mins, unpack_nibbles::<32, 256>(&self.qs))
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

/// Six bits each: the first four scales, the first four minimums, then low nibbles of the last four
/// pairs (scale low, minimum high) whose upper bits sit on top of the first eight bytes.
#[inline(always)]
pub(super) fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = (scales[j] & 63) | ((scales[j + 4] >> 4) << 6);
        packed[j + 4] = (mins[j] & 63) | ((mins[j + 4] >> 4) << 6);
        packed[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] << 4);
    }
    packed
}

/// The inverse of [`pack_scales`]: scales and minimums.
#[inline(always)]
pub(super) fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = packed[j] & 63;
        mins[j] = packed[j + 4] & 63;
        scales[j + 4] = (packed[j + 8] & 15) | ((packed[j] >> 6) << 4);
        mins[j + 4] = (packed[j + 8] >> 4) | ((packed[j + 4] >> 6) << 4);
    }
    (scales, mins)
}
