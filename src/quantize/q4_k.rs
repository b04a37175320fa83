//! Q4_K: 4-bit codes, 6-bit scale and offset per 32.
//!
//! Enters: rows. Leaves: blocks. The search is `affine`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    ScaleOverflow,
    affine::{AffineGrid, AffineSolution, search},
    super_block::{self, ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
};
use crate::formats::block::BlockQ4K;

/// Quantizes rows to Q4_K (see [`super_block::quantize`]).
///
/// Errors count as in ggml's `quantize_row_q4_k_ref` and `quantize_row_q4_k_impl`.
pub fn quantize(
    rows: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    super_block::quantize::<Q4K>(rows, row_len, importance, out)
}

pub(super) struct Q4K;

const GRID: AffineGrid = AffineGrid {
    codes: 15.0,
    scales: 63.0,
    plain: Sweep {
        first: -0.6,
        step: 0.3,
        tries: 5,
    },
    drift: Sweep {
        first: -0.9,
        step: 0.3,
        tries: 7,
    },
    factors: Sweep {
        first: -4.0,
        step: 0.25,
        tries: 33,
    },
    rounds: 3,
};

impl SuperBlockType for Q4K {
    type Block = BlockQ4K;
    const WEIGHTING: Weighting = Weighting::MagnitudePlusRms;
    const IMPORTANCE_WEIGHTING: ImportanceWeighting = ImportanceWeighting::Energy { factor: 2.0 };

    type Solution<S: Simd> = AffineSolution<S, 8>;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S> {
        search(simd, problem, &GRID)
    }

    #[inline(always)]
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (BlockQ4K, u64) {
        let found = solution.lane(lane);
        let block = BlockQ4K::pack(
            found.d,
            found.dmin,
            &found.scales,
            &found.mins,
            &found.codes,
        );
        (block, found.saturated)
    }
}
