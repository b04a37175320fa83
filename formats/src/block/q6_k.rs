//! Q6_K: 6-bit codes, signed 8-bit scale per 16, value `d scale (code - 32)`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes;

/// A block of 256 elements, `block_q6_K` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// Low four bits; half `h`: byte `64h + l` is element `128h + l` (low) and `128h + 64 + l` (high).
    pub ql: [u8; 128],
    /// High two bits; half `h`: byte `32h + l`, bits `2s` are element `128h + 32s + l`.
    pub qh: [u8; 64],
    /// Scales per 16.
    pub scales: [i8; 16],
    /// Scale of the scales, f16.
    pub d: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ6K>() == 210 && align_of::<BlockQ6K>() == 1);

impl BlockQ6K {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `scales`: per 16; `codes`: 0 to 63.
    #[inline(always)]
    pub fn pack(d: f16, scales: &[i8; 16], codes: &[u8; 256]) -> Self {
        Self {
            ql: planes::pack_nibbles::<64, 128>(codes),
            qh: planes::pack::<2, 32, 64>(codes, 4),
            scales: *scales,
            d: d.to_le_bytes(),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [i8; 16], [u8; 256]) {
        let mut codes = planes::unpack_nibbles::<64, 256>(&self.ql);
        planes::unpack::<2, 32>(&self.qh, 4, &mut codes);
        (f16::from_le_bytes(self.d), self.scales, codes)
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
                *value = scale * (f32::from(*code) - 32.0);
            }
        }
    }
}
