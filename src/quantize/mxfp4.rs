//! MXFP4: the power of two that puts the largest magnitude between 4 and 8, then the nearest codes.
//!
//! As in the OCP Microscaling specification 1.0, section 6.3: what lies above 6 saturates.

use half::f16;
use pulp::Simd;

use crate::formats::block::{BlockMXFP4, mxfp4_scale};

use super::small_block::{Grid, PlainType, largest_magnitude};

/// Halfway between the magnitudes of neighbouring codes, in units of [`mxfp4_scale`].
pub(super) const MIDPOINTS: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];

/// Same bytes as ggml's `quantize_row_mxfp4_ref`, except where the largest magnitude is below 2^-125 or
/// not finite, which it leaves undefined: there the exponent is clamped.
pub struct MXFP4;

impl PlainType<32> for MXFP4 {
    type Block = BlockMXFP4;
    const SCALES: usize = 0;

    #[inline(always)]
    fn extremes<S: Simd>(simd: S, x: &[f32; 32]) -> (f32, f32) {
        (largest_magnitude(simd, x), 0.0)
    }

    /// `step` is the exponent, `offset` its [`mxfp4_scale`].
    #[inline(always)]
    fn grid((largest, _): (f32, f32)) -> Grid {
        let e = exponent(largest);
        Grid {
            step: f32::from(e),
            inverse: 0.0,
            offset: mxfp4_scale(e),
        }
    }

    #[inline(always)]
    fn code(x: f32, _: f32, scale: f32) -> u8 {
        let mut code = 0;
        for midpoint in MIDPOINTS {
            code += u8::from(x.abs() > midpoint * scale);
        }
        code | (u8::from(x < 0.0 && code > 0) << 3)
    }

    #[inline(always)]
    fn pack((e, _): (f32, f32), _: (f16, f16), codes: &[u8; 32]) -> BlockMXFP4 {
        BlockMXFP4::pack(e as u8, codes)
    }
}

/// `floor(log2(largest)) - 2` with the bias of E8M0, the logarithm rounded to f32 as in ggml: within a
/// few units below a power of two it is already the next whole number.
#[inline(always)]
fn exponent(largest: f32) -> u8 {
    let bits = largest.to_bits();
    let mut log2 = (bits >> 23) as i32 - 127;
    if bits & 0x007f_ff80 == 0x007f_ff80 {
        log2 = (f64::from(largest).log2() as f32).floor() as i32;
    }
    if largest == 0.0 {
        0
    } else {
        (log2 + 125).clamp(0, 254) as u8
    }
}
