//! F32, F16 and BF16: every element on its own, rounded to nearest even.

use half::bf16;
use pulp::Arch;

use super::{ScaleOverflow, small_block::f16_bits};

/// Stores f32, little endian.
pub fn f32(rows: &[f32], out: &mut [u8]) -> ScaleOverflow {
    for (bytes, x) in out.as_chunks_mut().0.iter_mut().zip(rows) {
        *bytes = x.to_le_bytes();
    }
    ScaleOverflow(0)
}

/// Rounds to F16; counts the finite values that become infinite.
pub fn f16(rows: &[f32], out: &mut [u8]) -> ScaleOverflow {
    narrow(rows, out, 0x7c00, f16_bits)
}

/// Rounds to BF16; counts the finite values that become infinite.
pub fn bf16(rows: &[f32], out: &mut [u8]) -> ScaleOverflow {
    narrow(rows, out, bf16::INFINITY.to_bits(), bf16_bits)
}

#[inline(always)]
fn narrow(rows: &[f32], out: &mut [u8], infinity: u16, bits: impl Fn(f32) -> u16) -> ScaleOverflow {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut overflow = 0;
            for (xs, out) in rows.chunks(1 << 16).zip(out.chunks_mut(2 << 16)) {
                let mut infinite = 0u32;
                for (bytes, x) in out.as_chunks_mut().0.iter_mut().zip(xs) {
                    let bits = bits(*x);
                    infinite += u32::from(bits & 0x7fff == infinity && x.is_finite());
                    *bytes = bits.to_le_bytes();
                }
                overflow += u64::from(infinite);
            }
            ScaleOverflow(overflow)
        },
    )
}

/// The bits of the nearest BF16, ties to even; NaN stays NaN and turns quiet.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        quiet
    } else {
        rounded
    }
}
