//! Q6_K: 6-bit codes, 8-bit scale per 16.
//!
//! Enters: rows. Leaves: blocks. The search is `symmetric`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    ScaleOverflow,
    super_block::{self, ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
    symmetric::{SymmetricGrid, SymmetricSolution, Whole, search},
};
use crate::formats::block::BlockQ6K;

/// Quantizes rows to Q6_K (see [`super_block::quantize`]).
///
/// Errors count as in ggml's `quantize_row_q6_K_ref` and `quantize_row_q6_K_impl`.
pub fn quantize(
    rows: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    super_block::quantize::<Q6K>(rows, row_len, importance, out)
}

pub(super) struct Q6K;

const GRID: SymmetricGrid = SymmetricGrid {
    scales: 128.0,
    first: Sweep {
        first: -0.6,
        step: 0.6,
        tries: 3,
    },
    last: Sweep {
        first: 0.0,
        step: 0.0,
        tries: 0,
    },
    around: Sweep {
        first: 0.0,
        step: 0.0,
        tries: 0,
    },
    factors: Sweep {
        first: 0.0,
        step: 0.0,
        tries: 1,
    },
    reach: 6,
    rounds: 2,
};

impl SuperBlockType for Q6K {
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
