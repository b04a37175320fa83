//! The search behind Q4_0, Q5_0 and IQ4_NL, where a weight is `d value(code)`.
//!
//! Enters: a problem. Leaves: the f16 scale and the codes of least weighted squared error that were found.

use pulp::Simd;

use super::{
    lanes::Lanes,
    searched_block::{Problem, Solution},
    super_block::Sweep,
    symmetric::{Codebook, Fit, largest},
};

/// Rounds of choosing codes for the scale and the scale for the codes.
const ROUNDS: usize = 3;

/// Chooses scale and codes.
///
/// `first`, `last`: where the weight of largest magnitude is put in turn, less the first and the last
/// value. ggml's searches stay within one step of the first value; wider ones from both ends lower the
/// error by 1 % (Q4_0), 3 % (Q5_0), 7 % and without importance 13 % (IQ4_NL).
#[inline(always)]
pub fn search<S: Simd, C: Codebook>(
    simd: S,
    problem: &Problem<S>,
    first: &Sweep,
    last: &Sweep,
) -> Solution<S> {
    let zero = Lanes::zero(simd);
    let per_largest = largest(&problem.x).recip_or_zero();
    let (mut most, mut d) = (zero, zero);
    for (end, sweep) in [(C::FIRST, first), (C::LAST, last)] {
        for k in 0..sweep.tries {
            let inverse = per_largest * zero.like(end + sweep.at(k));
            let fit = Fit::to::<C>(&problem.x, &problem.weight, inverse);
            let better = fit.gain.gt(most);
            most = better.select(fit.gain, most);
            d = better.select(fit.step, d);
        }
    }
    let d = refine::<S, C>(problem, d);
    let inverse = d.recip_or_zero();
    let mut codes = problem.x;
    for code in &mut codes {
        *code = C::code(*code * inverse);
    }
    Solution { d, m: zero, codes }
}

/// Alternates between the nearest codes and their best scale, and keeps the best scale seen, all as f16.
#[inline(always)]
fn refine<S: Simd, C: Codebook>(problem: &Problem<S>, d: Lanes<S>) -> Lanes<S> {
    let mut d = problem.round_to_f16(d);
    let (mut best, mut least) = (d, d.like(f32::INFINITY));
    for _ in 0..ROUNDS {
        let fit = Fit::to::<C>(&problem.x, &problem.weight, d.recip_or_zero());
        // The error without the weighted energy, which no scale changes.
        let error = fit.stiffness * (d - fit.step) * (d - fit.step) - fit.gain;
        let better = error.lt(least);
        if !better.any() {
            break;
        }
        best = better.select(d, best);
        least = better.select(error, least);
        d = problem.round_to_f16(fit.step);
    }
    best
}
