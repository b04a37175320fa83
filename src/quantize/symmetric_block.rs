//! The search behind the types without an offset: a weight is `d value(code)`.
//!
//! Enters: a problem. Leaves: the f16 scale and the values of least weighted squared error that were found.

use pulp::Simd;

use super::{lanes::Lanes, searched_block::Problem};

/// The values codes stand for.
pub trait Values {
    /// Where the search starts: what the value of largest magnitude is mapped to, in turn.
    fn targets() -> impl Iterator<Item = f32>;

    /// The nearest value.
    fn nearest<S: Simd>(x: Lanes<S>) -> Lanes<S>;
}

/// Rounds of choosing values for the scale and the scale for the values.
const ROUNDS: usize = 3;

/// Returns the scale; the codes follow from it.
#[inline(always)]
pub fn search<S: Simd, V: Values>(simd: S, problem: &Problem<S>) -> Lanes<S> {
    let zero = Lanes::zero(simd);
    let per_extreme = extreme(simd, problem).recip_or_zero();
    let (mut most, mut d) = (zero, zero);
    for target in V::targets() {
        let fit = Fit::of::<V>(problem, zero.like(target) * per_extreme);
        // Compares qx^2 / qq without dividing.
        let better = (fit.qx * fit.qx).gt(most * fit.qq);
        let scale = fit.scale();
        d = better.select(scale, d);
        most = better.select(scale * fit.qx, most);
    }
    refine::<S, V>(problem, d)
}

/// Alternates between the nearest values and their best scale, and keeps the best scale seen, all as f16.
#[inline(always)]
fn refine<S: Simd, V: Values>(problem: &Problem<S>, d: Lanes<S>) -> Lanes<S> {
    let mut d = problem.round_to_f16(d);
    let (mut best, mut least) = (d, d.like(f32::INFINITY));
    for _ in 0..ROUNDS {
        let fit = Fit::of::<V>(problem, d.recip_or_zero());
        // The error without the sum of weight x^2, which no scale changes.
        let error = d * (d * fit.qq - fit.qx - fit.qx);
        let better = error.lt(least);
        if !better.any() {
            break;
        }
        best = better.select(d, best);
        least = better.select(error, least);
        d = problem.round_to_f16(fit.scale());
    }
    best
}

/// Weighted sums over the values nearest to the scaled weights.
#[derive(Clone, Copy)]
struct Fit<S: Simd> {
    /// Sum of weight value x.
    qx: Lanes<S>,
    /// Sum of weight value^2.
    qq: Lanes<S>,
}

impl<S: Simd> Fit<S> {
    #[inline(always)]
    fn of<V: Values>(problem: &Problem<S>, inverse: Lanes<S>) -> Self {
        let zero = inverse.like(0.0);
        let (mut qx, mut qq) = (zero, zero);
        for (&x, &weight) in problem.x.iter().zip(&problem.weight) {
            let value = V::nearest(x * inverse);
            let wq = weight * value;
            qx += wq * x;
            qq += wq * value;
        }
        Self { qx, qq }
    }

    /// The scale of least error for these values.
    #[inline(always)]
    fn scale(self) -> Lanes<S> {
        self.qx * self.qq.recip_or_zero()
    }
}

/// The first value of largest magnitude.
#[inline(always)]
fn extreme<S: Simd>(simd: S, problem: &Problem<S>) -> Lanes<S> {
    let mut extreme = Lanes::zero(simd);
    for &x in &problem.x {
        extreme = x.abs().gt(extreme.abs()).select(x, extreme);
    }
    extreme
}
