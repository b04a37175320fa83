//! Q2_K: 2-bit codes, 4-bit scale and offset per 16.
//!
//! Enters: rows. Leaves: blocks. The search is `affine`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    affine::{AffineGrid, AffineSolution, search},
    super_block::{ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
};
use crate::formats::block::BlockQ2K;

/// Errors count as in ggml's `quantize_row_q2_K_ref` and `quantize_row_q2_K_impl`.
#[allow(non_camel_case_types, reason = "the name is ggml's")]
pub(super) struct Q2_K;

pub(super) const GRID: AffineGrid = AffineGrid {
    codes: 3.0,
    scales: 15.0,
    plain: Sweep::new(-0.6, 0.3, 5),
    drift: Sweep::new(-0.9, 0.3, 7),
    factors: Sweep::new(-4.0, 0.25, 33),
    rounds: 3,
};

impl SuperBlockType for Q2_K {
    type Block = BlockQ2K;
    const WEIGHTING: Weighting = Weighting::Magnitude;
    const IMPORTANCE_WEIGHTING: ImportanceWeighting = ImportanceWeighting::Energy { factor: 1.0 };

    type Solution<S: Simd> = AffineSolution<S, 16>;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S> {
        search(simd, problem, &GRID)
    }

    #[inline(always)]
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (BlockQ2K, u64) {
        let found = solution.lane(lane);
        let block = BlockQ2K::pack(
            found.d,
            found.dmin,
            &found.scales,
            &found.mins,
            &found.codes,
        );
        (block, found.saturated)
    }
}
