//! Q6_K: 6-bit codes, 8-bit scale per 16.
//!
//! Enters: rows. Leaves: blocks. The search is `symmetric`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    super_block::{ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
    symmetric::{SymmetricGrid, SymmetricSolution, Whole, search},
};
use crate::formats::block::BlockQ6K;

/// Errors count as in ggml's `quantize_row_q6_K_ref` and `quantize_row_q6_K_impl`.
#[allow(non_camel_case_types, reason = "the name is ggml's")]
pub(super) struct Q6_K;

pub(super) const GRID: SymmetricGrid = SymmetricGrid {
    scales: 128.0,
    first: Sweep::new(-0.6, 0.6, 3),
    last: Sweep::NONE,
    around: Sweep::NONE,
    factors: Sweep::new(0.0, 0.0, 1),
    reach: 6,
    rounds: 2,
};

impl SuperBlockType for Q6_K {
    type Block = BlockQ6K;
    const WEIGHTING: Weighting = Weighting::Square;
    const IMPORTANCE_WEIGHTING: ImportanceWeighting = ImportanceWeighting::Plain;

    type Solution<S: Simd> = SymmetricSolution<S, 16>;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S> {
        search::<S, Whole<32>, 16>(simd, problem, &GRID)
    }

    #[inline(always)]
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (BlockQ6K, u64) {
        let found = solution.lane(lane);
        (
            BlockQ6K::pack(found.d, &found.scales, &found.codes),
            found.saturated,
        )
    }
}
