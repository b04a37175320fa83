//! MXFP4: E2M1 codes with a power of two per 32, value `VALUES[code] 2^(e - 128)`.

use bytemuck::{Pod, Zeroable};

use super::planes::{pack_nibbles, unpack_nibbles};

/// Twice the value of each E2M1 code (`kvalues_mxfp4` in ggml-common.h); code 8 is zero.
pub const VALUES: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];

/// Half of the E8M0 value, to go with the doubled [`VALUES`]: `2^(e - 128)`.
#[inline(always)]
pub fn scale(e: u8) -> f32 {
    let bits = match e {
        0 | 1 => 0x0020_0000 << e,
        _ => (u32::from(e) - 1) << 23,
    };
    f32::from_bits(bits)
}

/// A block of 32 elements, `block_mxfp4` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMXFP4 {
    /// Exponent, E8M0 with the bias of [`scale`].
    pub e: u8,
    /// Byte `j`: low four bits of element `j` (low) and `j + 16` (high).
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockMXFP4>() == 17 && align_of::<BlockMXFP4>() == 1);

impl BlockMXFP4 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 32;

    /// `codes`: 0 to 15.
    #[inline(always)]
    pub fn pack(e: u8, codes: &[u8; 32]) -> Self {
        Self {
            e,
            qs: pack_nibbles::<16, 16>(codes),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (u8, [u8; 32]) {
        (self.e, unpack_nibbles::<16, 32>(&self.qs))
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (e, codes) = self.parts();
        let d = scale(e);
        for (value, code) in out.iter_mut().zip(codes) {
            *value = d * VALUES[usize::from(code & 15)];
        }
    }
}
