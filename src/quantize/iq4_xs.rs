//! IQ4_XS: 4-bit codes for 16 uneven values, 6-bit scale per 32.
//!
//! Enters: rows. Leaves: blocks. The search is `symmetric`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    ScaleOverflow,
    lanes::Lanes,
    super_block::{self, ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
    symmetric::{Codebook, SymmetricGrid, SymmetricSolution, search},
};
use crate::formats::block::{BlockIQ4XS, IQ4_NL_VALUES};

/// Quantizes rows to IQ4_XS (see [`super_block::quantize`]).
///
/// Errors count as in ggml's `quantize_row_iq4_nl_impl`.
pub fn quantize(
    rows: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    super_block::quantize::<IQ4XS>(rows, row_len, importance, out)
}

pub(super) struct IQ4XS;

const GRID: SymmetricGrid = SymmetricGrid {
    scales: 32.0,
    first: Sweep {
        first: -6.0,
        step: 2.0,
        tries: 7,
    },
    last: Sweep {
        first: -4.0,
        step: 4.0,
        tries: 3,
    },
    around: Sweep {
        first: 0.0,
        step: 0.0,
        tries: 1,
    },
    factors: Sweep {
        first: -4.0,
        step: 0.25,
        tries: 33,
    },
    reach: 1,
    rounds: 2,
};

impl SuperBlockType for IQ4XS {
    type Block = BlockIQ4XS;
    const WEIGHTING: Weighting = Weighting::Square;
    const IMPORTANCE_WEIGHTING: ImportanceWeighting = ImportanceWeighting::Energy { factor: 2.0 };

    type Solution<S: Simd> = SymmetricSolution<S, 8>;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S> {
        search::<S, Iq4Values, 8>(simd, problem, &GRID)
    }

    #[inline(always)]
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (BlockIQ4XS, u64) {
        let found = solution.lane(lane);
        (
            BlockIQ4XS::pack(found.d, &found.scales, &found.codes),
            found.saturated,
        )
    }
}

/// The uneven values of IQ4_NL and IQ4_XS.
pub(super) struct Iq4Values;

impl Codebook for Iq4Values {
    const FIRST: f32 = IQ4_NL_VALUES[0];
    const LAST: f32 = IQ4_NL_VALUES[15];

    #[inline(always)]
    fn nearest<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        let mut nearest = x.like(Self::FIRST);
        for pair in IQ4_NL_VALUES.windows(2) {
            let below = x.lt(x.like(0.5 * (pair[0] + pair[1])));
            nearest = below.select(nearest, x.like(pair[1]));
        }
        nearest
    }

    #[inline(always)]
    fn code<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        let mut code = x.like(0.0);
        for (low, pair) in IQ4_NL_VALUES.windows(2).enumerate() {
            let below = x.lt(x.like(0.5 * (pair[0] + pair[1])));
            code = below.select(code, x.like(low as f32 + 1.0));
        }
        code
    }
}
