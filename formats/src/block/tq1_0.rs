//! TQ1_0: ternary codes, five to a byte, with one scale per 256, value `(code - 1) d`.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// A block of 256 elements, `block_tq1_0` in ggml-common.h.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ1_0 {
    /// Five trits per byte: trit `n` of byte `m < 32` is element `m + 32n`, of byte `32 + m` element `160 + m + 16n`.
    pub qs: [u8; 48],
    /// Four trits per byte: trit `n` of byte `m` is element `240 + m + 4n`.
    pub qh: [u8; 4],
    /// Scale, f16.
    pub d: [u8; 2],
}

const _: () = assert!(size_of::<BlockTQ1_0>() == 54 && align_of::<BlockTQ1_0>() == 1);

impl BlockTQ1_0 {
    /// Elements of one block.
    pub const ELEMENTS: usize = 256;

    /// `codes`: 0 to 2.
    #[inline(always)]
    pub fn pack(d: f16, codes: &[u8; 256]) -> Self {
        let mut qs = [0; 48];
        let mut qh = [0; 4];
        pack_trits::<32, 5>(&codes[..160], &mut qs[..32]);
        pack_trits::<16, 5>(&codes[160..240], &mut qs[32..]);
        pack_trits::<4, 4>(&codes[240..], &mut qh);
        Self {
            qs,
            qh,
            d: d.to_le_bytes(),
        }
    }

    /// What [`pack`](Self::pack) was given.
    #[inline(always)]
    pub fn parts(&self) -> (f16, [u8; 256]) {
        let mut codes = [0; 256];
        unpack_trits::<32>(&self.qs[..32], &mut codes[..160]);
        unpack_trits::<16>(&self.qs[32..], &mut codes[160..240]);
        unpack_trits::<4>(&self.qh, &mut codes[240..]);
        (f16::from_le_bytes(self.d), codes)
    }

    /// The values, in element order.
    #[inline(always)]
    pub fn unpack(&self, out: &mut [f32; Self::ELEMENTS]) {
        let (d, codes) = self.parts();
        let d = d.to_f32();
        for (value, code) in out.iter_mut().zip(codes) {
            *value = (f32::from(code) - 1.0) * d;
        }
    }
}

/// Byte `m` is the ternary fraction 0.t0 t1 t2 t3 t4 of codes `m + STRIDE n`, in 256ths, rounded up.
#[inline(always)]
fn pack_trits<const STRIDE: usize, const TRITS: usize>(codes: &[u8], bytes: &mut [u8]) {
    for (m, byte) in bytes.iter_mut().enumerate() {
        let mut value = 0u16;
        for n in 0..5 {
            let trit = if n < TRITS {
                codes[m + STRIDE * n].min(2)
            } else {
                0
            };
            value = value * 3 + u16::from(trit);
        }
        *byte = (value * 256).div_ceil(243) as u8;
    }
}

/// The inverse of [`pack_trits`]: multiplying by a power of three moves a trit to the front.
#[inline(always)]
fn unpack_trits<const STRIDE: usize>(bytes: &[u8], codes: &mut [u8]) {
    let mut power = 1u8;
    for codes in codes.as_chunks_mut::<STRIDE>().0 {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
        power = power.wrapping_mul(3);
    }
}
