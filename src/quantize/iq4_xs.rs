//! IQ4_XS: 4-bit codes for 16 uneven values, 6-bit scale per 32.
//!
//! Enters: rows. Leaves: blocks. The search is `symmetric`'s, the layout `formats::block`'s.

use pulp::Simd;

use super::{
    lanes::Lanes,
    super_block::{ImportanceWeighting, Problem, SuperBlockType, Sweep, Weighting},
    symmetric::{CodeValues, Codebook, Nearest, SymmetricGrid, SymmetricSolution, search},
};
use crate::formats::block::{BlockIQ4XS, IQ4_NL_VALUES};

/// Errors count as in ggml's `quantize_row_iq4_nl_impl`.
#[allow(non_camel_case_types, reason = "the name is ggml's")]
pub(super) struct IQ4_XS;

pub(super) const GRID: SymmetricGrid = SymmetricGrid {
    scales: 32.0,
    first: Sweep::new(-6.0, 2.0, 7),
    last: Sweep::new(-4.0, 4.0, 3),
    around: Sweep::new(0.0, 0.0, 1),
    factors: Sweep::new(-4.0, 0.25, 33),
    reach: 1,
    rounds: 2,
};

impl SuperBlockType for IQ4_XS {
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
#[derive(Debug, Clone, Copy)]
pub struct Iq4Values;

impl Nearest for Iq4Values {
    #[inline(always)]
    fn nearest<S: Simd>(self, x: Lanes<S>) -> Lanes<S> {
        let mut nearest = x.like(Self::FIRST);
        for pair in IQ4_NL_VALUES.windows(2) {
            let below = x.lt(x.like(0.5 * (pair[0] + pair[1])));
            nearest = below.select(nearest, x.like(pair[1]));
        }
        nearest
    }
}

impl Codebook for Iq4Values {
    const VALUES: CodeValues = CodeValues::Uneven;
    const FIRST: f32 = IQ4_NL_VALUES[0];
    const LAST: f32 = IQ4_NL_VALUES[15];
    type Nearest = Self;
    const NEAREST: Self = Self;

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
