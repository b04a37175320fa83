//! Q8_0: the scale that makes the largest magnitude 127.

use half::f16;
use pulp::Simd;

use crate::formats::block::BlockQ8_0;

use super::small_block::{Grid, PlainType, largest_magnitude, low_byte};

/// Same bytes as ggml's `quantize_row_q8_0_ref`.
pub struct Q8_0;

impl PlainType<32> for Q8_0 {
    type Block = BlockQ8_0;
    const SCALES: usize = 1;

    #[inline(always)]
    fn extremes<S: Simd>(simd: S, x: &[f32; 32]) -> (f32, f32) {
        (largest_magnitude(simd, x), 0.0)
    }

    #[inline(always)]
    fn grid((extreme, _): (f32, f32)) -> Grid {
        Grid::new(extreme / 127.0, 0.0)
    }

    #[inline(always)]
    fn code(x: f32, inverse: f32, _: f32) -> u8 {
        low_byte((x * inverse).round())
    }

    #[inline(always)]
    fn pack(_: (f32, f32), (d, _): (f16, f16), codes: &[u8; 32]) -> BlockQ8_0 {
        BlockQ8_0::pack(d, bytemuck::cast_ref(codes))
    }
}
