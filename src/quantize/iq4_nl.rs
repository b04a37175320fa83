//! IQ4_NL: a searched scale for sixteen fixed values.

use half::f16;
use pulp::Simd;

use crate::formats::block::{BlockIQ4NL, IQ4_NL_VALUES};

use super::{
    lanes::Lanes,
    searched_block::{Energy, Problem, SearchedType, Solution},
    symmetric_block::{self, Values},
};

/// Weights of errors as in ggml's `quantize_row_iq4_nl_impl`.
pub struct IQ4NL;

impl SearchedType for IQ4NL {
    type Block = BlockIQ4NL;
    const ENERGY: Energy = Energy::TwiceBlock;

    #[inline(always)]
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Solution<S> {
        let d = symmetric_block::search::<S, Self>(simd, problem);
        let inverse = d.recip_or_zero();
        let mut codes = problem.x;
        for code in &mut codes {
            *code = nearest_code(*code * inverse);
        }
        Solution {
            d,
            m: Lanes::zero(simd),
            codes,
        }
    }

    #[inline(always)]
    fn pack(d: f16, _: f16, codes: &[u8; 32]) -> BlockIQ4NL {
        BlockIQ4NL::pack(d, codes)
    }
}

impl Values for IQ4NL {
    #[inline(always)]
    fn targets() -> impl Iterator<Item = f32> {
        (0..10)
            .map(|k| 8.0 * k as f32)
            .flat_map(|k| [k - 144.0, 134.0 - k])
    }

    #[inline(always)]
    fn nearest<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        let mut value = x.like(IQ4_NL_VALUES[0]);
        for pair in IQ4_NL_VALUES.windows(2) {
            value = x
                .lt(x.like((pair[0] + pair[1]) / 2.0))
                .select(value, x.like(pair[1]));
        }
        value
    }
}

#[inline(always)]
fn nearest_code<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let mut code = x.like(0.0);
    for (i, pair) in IQ4_NL_VALUES.windows(2).enumerate() {
        code = x
            .lt(x.like((pair[0] + pair[1]) / 2.0))
            .select(code, x.like(i as f32 + 1.0));
    }
    code
}
