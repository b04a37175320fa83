//! Q3_K: 3-bit codes, 6-bit scale per 16.
//!
//! Enters: rows. Leaves: blocks. The search is `symmetric`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    ScaleOverflow,
    super_block::{self, ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
    symmetric::{SymmetricGrid, SymmetricSolution, Whole, search},
};
use crate::formats::block::BlockQ3K;

/// Quantizes rows to Q3_K (see [`super_block::quantize`]).
///
/// Errors count as in ggml's `quantize_row_q3_K_ref` and `quantize_row_q3_K_impl`.
pub fn quantize(
    rows: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    super_block::quantize::<Q3K>(rows, row_len, importance, out)
}

pub(super) struct Q3K;

const GRID: SymmetricGrid = SymmetricGrid {
    scales: 32.0,
    first: Sweep {
        first: -0.9,
        step: 0.2,
        tries: 10,
    },
    last: Sweep {
        first: -0.6,
        step: 0.2,
        tries: 7,
    },
    around: Sweep {
        first: -0.05,
        step: 0.05,
        tries: 3,
    },
    factors: Sweep {
        first: -4.0,
        step: 0.25,
        tries: 33,
    },
    reach: 2,
    rounds: 3,
};

impl SuperBlockType for Q3K {
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
