//! IQ4_NL: 4-bit codes into a fixed table with one scale per 32, value `d VALUES[code]`.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::planes::{pack_nibbles, unpack_nibbles};

/// The table of IQ4_NL and IQ4_XS (`kvalues_iq4nl` in ggml-common.h).
pub const VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// A block of 32 elements, `block_iq4_nl` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4NL {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Byte `j`: low four bits of element `j` (low) and `j + 16` (high).
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockIQ4NL>() == 18 && align_of::<BlockIQ4NL>() == 1);

impl BlockIQ4NL {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `codes`: 0 to 15.
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 32]) -> Self {
        Self {
            d: d.to_le_bytes(),
            qs: pack_nibbles::<16, 16>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 32]) {
        (
            f16::from_le_bytes(self.d),
            unpack_nibbles::<16, 32>(&self.qs),
        )
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = d * VALUES[usize::from(code & 15)];
        }
    }
}
