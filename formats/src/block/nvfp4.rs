//! NVFP4: E2M1 codes with an unsigned E4M3 scale per 16, value `VALUES[code] scale(d)`.

use bytemuck::{Pod, Zeroable};

use super::mxfp4::VALUES;
use super::planes::{pack_nibbles, unpack_nibbles};

/// Half of the UE4M3 value, to go with the doubled values of MXFP4; 0x00 and 0x7F are zero.
#[inline(always)]
pub fn scale(d: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(d >> 3) & 15, f32::from(d & 7));
    match (d, exponent) {
        (0 | 0x7f, _) => 0.0,
        (_, 0) => mantissa * (1.0 / 1024.0),
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent + 119) << 23),
    }
}

/// A block of 64 elements, `block_nvfp4` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockNVFP4 {
    /// Scales of each 16, UE4M3 (see [`scale`]).
    pub d: [u8; 4],
    /// Per 16 elements eight bytes; byte `j`: element `j` (low) and `j + 8` (high).
    pub qs: [u8; 32],
}

const _: () = assert!(size_of::<BlockNVFP4>() == 36 && align_of::<BlockNVFP4>() == 1);

impl BlockNVFP4 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 64;

    /// `d`: a scale per 16; `codes`: 0 to 15.
    #[inline(always)]
    pub fn pack(d: &[u8; 4], codes: &[u8; 64]) -> Self {
        Self {
            d: *d,
            qs: pack_nibbles::<8, 32>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> ([u8; 4], [u8; 64]) {
        (self.d, unpack_nibbles::<8, 64>(&self.qs))
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        for ((values, codes), d) in out
            .as_chunks_mut::<16>()
            .0
            .iter_mut()
            .zip(codes.as_chunks::<16>().0)
            .zip(d)
        {
            let d = scale(d);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = d * VALUES[usize::from(code & 15)];
            }
        }
    }
}
