//! TQ2_0: the largest magnitude as scale, codes to the nearest of -1, 0 and 1.

use half::f16;
use pulp::Simd;

use crate::formats::block::BlockTQ2_0;

use super::small_block::{Grid, PlainType, largest_magnitude, low_byte};

/// Same bytes as ggml's `quantize_row_tq2_0_ref`.
pub struct TQ2_0;

impl PlainType<256> for TQ2_0 {
    type Block = BlockTQ2_0;
    const SCALES: usize = 1;

    #[inline(always)]
    fn extremes<S: Simd>(simd: S, x: &[f32; 256]) -> (f32, f32) {
        (largest_magnitude(simd, x), 0.0)
    }

    #[inline(always)]
    fn grid((extreme, _): (f32, f32)) -> Grid {
        Grid::new(extreme, 0.0)
    }

    #[inline(always)]
    fn code(x: f32, inverse: f32, _: f32) -> u8 {
        low_byte((x * inverse).round() + 1.0)
    }

    #[inline(always)]
    fn pack(_: (f32, f32), (d, _): (f16, f16), codes: &[u8; 256]) -> BlockTQ2_0 {
        BlockTQ2_0::pack(d, codes)
    }
}
