//! IQ4_NL: a searched scale for sixteen fixed values.

use half::f16;
use pulp::Simd;

use crate::formats::block::BlockIQ4NL;

use super::{
    iq4_xs::Iq4Values,
    searched_block::{Energy, Problem, SearchedType, Solution},
    super_block::Sweep,
    symmetric_block,
};

/// Weights of errors as in ggml's `quantize_row_iq4_nl_impl`.
pub struct IQ4NL;

impl SearchedType for IQ4NL {
    type Block = BlockIQ4NL;
    const ENERGY: Energy = Energy::TwiceBlock;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Solution<S> {
        const FIRST: Sweep = Sweep::new(-17.0, 8.0, 10);
        const LAST: Sweep = Sweep::new(21.0, -8.0, 10);
        symmetric_block::search::<S, Iq4Values>(simd, problem, &FIRST, &LAST)
    }

    #[inline(always)]
    fn pack(d: f16, _: f16, codes: &[u8; 32]) -> BlockIQ4NL {
        BlockIQ4NL::pack(d, codes)
    }
}
