//! Q5_1: the smallest value as offset, the scale that makes the largest 31; with importance both searched.

use half::f16;
use pulp::Simd;

use crate::formats::block::BlockQ5_1;

use super::{
    affine_block,
    searched_block::{Energy, Problem, SearchedType, Solution},
    small_block::{Grid, PlainType, low_byte, range},
};

/// Without importance the same bytes as ggml's `quantize_row_q5_1_ref`; with it, weights of errors as in
/// `quantize_row_q5_1_impl`.
pub struct Q5_1;

impl PlainType<32> for Q5_1 {
    type Block = BlockQ5_1;
    const SCALES: usize = 2;

    #[inline(always)]
    fn extremes<S: Simd>(simd: S, x: &[f32; 32]) -> (f32, f32) {
        range(simd, x)
    }

    #[inline(always)]
    fn grid((low, high): (f32, f32)) -> Grid {
        Grid::new((high - low) / 31.0, low)
    }

    #[inline(always)]
    fn code(x: f32, inverse: f32, offset: f32) -> u8 {
        low_byte(((x - offset) * inverse + 0.5).trunc().min(31.0))
    }

    #[inline(always)]
    fn pack(_: (f32, f32), (d, m): (f16, f16), codes: &[u8; 32]) -> BlockQ5_1 {
        BlockQ5_1::pack(d, m, codes)
    }
}

impl SearchedType for Q5_1 {
    type Block = BlockQ5_1;
    const ENERGY: Energy = Energy::Row;

    #[inline(always)]
    fn search<S: Simd>(_: S, problem: &Problem<S>) -> Solution<S> {
        affine_block::search(problem, 31.0)
    }

    #[inline(always)]
    fn pack(d: f16, m: f16, codes: &[u8; 32]) -> BlockQ5_1 {
        BlockQ5_1::pack(d, m, codes)
    }
}
