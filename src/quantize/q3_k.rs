//! Q3_K: 3-bit codes, 6-bit scale per 16.
//!
//! Enters: rows. Leaves: blocks. The search is `symmetric`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    super_block::{ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
    symmetric::{SymmetricGrid, SymmetricSolution, Whole, search},
};
use crate::formats::block::BlockQ3K;

/// Errors count as in ggml's `quantize_row_q3_K_ref` and `quantize_row_q3_K_impl`.
#[allow(non_camel_case_types, reason = "the name is ggml's")]
pub(super) struct Q3_K;

pub(super) const GRID: SymmetricGrid = SymmetricGrid {
    scales: 32.0,
    first: Sweep::new(-0.9, 0.2, 10),
    last: Sweep::new(-0.6, 0.2, 7),
    around: Sweep::new(-0.05, 0.05, 3),
    factors: Sweep::new(-4.0, 0.25, 33),
    reach: 2,
    rounds: 3,
};

impl SuperBlockType for Q3_K {
    type Block = BlockQ3K;
    const WEIGHTING: Weighting = Weighting::Square;
    const IMPORTANCE_WEIGHTING: ImportanceWeighting = ImportanceWeighting::Energy { factor: 2.0 };

    type Solution<S: Simd> = SymmetricSolution<S, 16>;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S> {
        search::<S, Whole<4>, 16>(simd, problem, &GRID)
    }

    #[inline(always)]
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (BlockQ3K, u64) {
        let found = solution.lane(lane);
        (
            BlockQ3K::pack(found.d, &found.scales, &found.codes),
            found.saturated,
        )
    }
}
