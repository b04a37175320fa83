//! Q4_0: the scale that makes the value of largest magnitude -8.

use half::f16;
use pulp::Simd;

use crate::formats::block::BlockQ4_0;

use super::small_block::{Grid, PlainType, first_extreme, low_byte};

/// Same bytes as ggml's `quantize_row_q4_0_ref`.
pub struct Q4_0;

impl PlainType<32> for Q4_0 {
    type Block = BlockQ4_0;
    const SCALES: usize = 1;

    #[inline(always)]
    fn extremes<S: Simd>(simd: S, x: &[f32; 32]) -> (f32, f32) {
        (first_extreme(simd, x), 0.0)
    }

    #[inline(always)]
    fn grid((extreme, _): (f32, f32)) -> Grid {
        Grid::new(extreme / -8.0, 0.0)
    }

    #[inline(always)]
    fn code(x: f32, inverse: f32, _: f32) -> u8 {
        low_byte((x * inverse + 8.5).trunc().min(15.0))
    }

    #[inline(always)]
    fn pack(_: (f32, f32), (d, _): (f16, f16), codes: &[u8; 32]) -> BlockQ4_0 {
        BlockQ4_0::pack(d, codes)
    }
}
