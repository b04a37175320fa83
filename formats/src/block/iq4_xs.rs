//! IQ4_XS: 4-bit codes into the table of IQ4_NL, signed 6-bit scale per 32, value `d scale VALUES[code]`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::iq4_nl::VALUES;
use super::planes::{pack_nibbles, unpack_nibbles};

/// A block of 256 elements, `block_iq4_xs` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4XS {
    /// Scale of the scales, f16.
    pub d: [u8; 2],
    /// Upper two bits of each scale plus 32: bits `2b` of the u16.
    pub scales_h: [u8; 2],
    /// Low four bits of each scale plus 32: nibble `b % 2` of byte `b / 2`.
    pub scales_l: [u8; 4],
    /// Per 32 elements sixteen bytes; byte `j`: element `j` (low) and `j + 16` (high).
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockIQ4XS>() == 136 && align_of::<BlockIQ4XS>() == 1);

impl BlockIQ4XS {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `scales`: -32 to 31, per 32; `codes`: 0 to 15.
    #[inline(always)]
    pub fn pack(d: f16, scales: &[i8; 8], codes: &[u8; 256]) -> Self {
        let (mut scales_h, mut scales_l) = (0u16, [0; 4]);
        for (b, scale) in scales.iter().enumerate() {
            let scale = scale.wrapping_add(32) as u8;
            scales_h |= u16::from((scale >> 4) & 3) << (2 * b);
            scales_l[b / 2] |= (scale & 15) << (4 * (b % 2));
        }
        Self {
            d: d.to_le_bytes(),
            scales_h: scales_h.to_le_bytes(),
            scales_l,
            qs: pack_nibbles::<16, 128>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [i8; 8], [u8; 256]) {
        let scales_h = u16::from_le_bytes(self.scales_h);
        let mut scales = [0; 8];
        for (b, scale) in scales.iter_mut().enumerate() {
            let low = (self.scales_l[b / 2] >> (4 * (b % 2))) & 15;
            let high = ((scales_h >> (2 * b)) & 3) as u8;
            *scale = (low | (high << 4)) as i8 - 32;
        }
        (
            f16::from_le_bytes(self.d),
            scales,
            unpack_nibbles::<16, 256>(&self.qs),
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, scales, codes) = self.parts();
        let d = d.to_f32();
        let groups = out
            .as_chunks_mut::<32>()
            .0
            .iter_mut()
            .zip(codes.as_chunks::<32>().0);
        for ((values, codes), scale) in groups.zip(scales) {
            let scale = d * f32::from(scale);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = scale * VALUES[usize::from(code & 15)];
            }
        }
    }
}
