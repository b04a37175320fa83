//! Q5_K: 5-bit codes, 6-bit scale and offset per 32.
//!
//! Enters: rows. Leaves: blocks. The search is `affine`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    affine::{AffineGrid, AffineSolution, search},
    super_block::{ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
};
use crate::formats::block::BlockQ5K;

/// Errors count as in ggml's `quantize_row_q5_K_ref` and `quantize_row_q5_K_impl`.
#[allow(non_camel_case_types, reason = "the name is ggml's")]
pub(super) struct Q5_K;

pub(super) const GRID: AffineGrid = AffineGrid {
    codes: 31.0,
    scales: 63.0,
    plain: Sweep::new(-0.6, 0.3, 5),
    drift: Sweep::new(-0.9, 0.3, 7),
    factors: Sweep::new(-4.0, 0.25, 33),
    rounds: 3,
};

impl SuperBlockType for Q5_K {
    type Block = BlockQ5K;
    const WEIGHTING: Weighting = Weighting::MagnitudePlusRms;
    const IMPORTANCE_WEIGHTING: ImportanceWeighting = ImportanceWeighting::Energy { factor: 2.0 };

    type Solution<S: Simd> = AffineSolution<S, 8>;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S> {
        search(simd, problem, &GRID)
    }

    #[inline(always)]
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (BlockQ5K, u64) {
        let found = solution.lane(lane);
        let block = BlockQ5K::pack(
            found.d,
            found.dmin,
            &found.scales,
            &found.mins,
            &found.codes,
        );
        (block, found.saturated)
    }
}
