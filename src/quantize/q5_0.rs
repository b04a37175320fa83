//! Q5_0: the scale that makes the value of largest magnitude -16, or with importance a searched one.

use half::f16;
use pulp::Simd;

use crate::formats::block::BlockQ5_0;

use super::{
    searched_block::{Energy, Problem, SearchedType, Solution},
    small_block::{Grid, PlainType, first_extreme, low_byte},
    super_block::Sweep,
    symmetric::Whole,
    symmetric_block,
};

/// Without importance the same bytes as ggml's `quantize_row_q5_0_ref`; with it, weights of errors as in
/// `quantize_row_q5_0_impl`.
pub struct Q5_0;

impl PlainType<32> for Q5_0 {
    type Block = BlockQ5_0;
    const SCALES: usize = 1;

    #[inline(always)]
    fn extremes<S: Simd>(simd: S, x: &[f32; 32]) -> (f32, f32) {
        (first_extreme(simd, x), 0.0)
    }

    #[inline(always)]
    fn grid((extreme, _): (f32, f32)) -> Grid {
        Grid::new(extreme / -16.0, 0.0)
    }

    #[inline(always)]
    fn code(x: f32, inverse: f32, _: f32) -> u8 {
        low_byte((x * inverse + 16.5).trunc().min(31.0))
    }

    #[inline(always)]
    fn pack(_: (f32, f32), (d, _): (f16, f16), codes: &[u8; 32]) -> BlockQ5_0 {
        BlockQ5_0::pack(d, codes)
    }
}

impl SearchedType for Q5_0 {
    type Block = BlockQ5_0;
    const ENERGY: Energy = Energy::Row;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Solution<S> {
        const FIRST: Sweep = Sweep::new(-1.0, 0.6, 10);
        const LAST: Sweep = Sweep::new(1.4, -0.6, 10);
        symmetric_block::search::<S, Whole<16>>(simd, problem, &FIRST, &LAST)
    }

    #[inline(always)]
    fn pack(d: f16, _: f16, codes: &[u8; 32]) -> BlockQ5_0 {
        BlockQ5_0::pack(d, codes)
    }
}
