//! The search behind Q4_1 and Q5_1, where a weight is `d code + m`.
//!
//! Enters: a problem. Leaves: the f16 scale and offset of least weighted squared error that were found.

use pulp::Simd;

use super::{
    lanes::Lanes,
    searched_block::{Problem, Solution},
};

/// By how much the number of steps in the tried range differs from the largest code.
const FIRST: f32 = -1.8;
const STEP: f32 = 0.3;
const TRIES: usize = 12;
/// How often all are tried, each time from the best line so far.
const PASSES: usize = 3;
/// Rounds of choosing codes for scale and offset, and those for the codes.
const ROUNDS: usize = 3;

/// Chooses scale, offset and codes `0..=largest`.
#[inline(always)]
pub fn search<S: Simd>(problem: &Problem<S>, largest: f32) -> Solution<S> {
    let totals = Totals::of(problem);
    let line = refine(
        problem,
        &totals,
        first_fit(problem, &totals, largest),
        largest,
    );
    let mut codes = problem.x;
    for code in &mut codes {
        *code = line.code(*code, largest);
    }
    Solution {
        d: line.d,
        m: line.m,
        codes,
    }
}

/// What the codes stand for: `d code + m`.
#[derive(Clone, Copy)]
struct Line<S: Simd> {
    d: Lanes<S>,
    m: Lanes<S>,
    inverse: Lanes<S>,
}

impl<S: Simd> Line<S> {
    #[inline(always)]
    fn new(d: Lanes<S>, m: Lanes<S>) -> Self {
        Self {
            d,
            m,
            inverse: d.recip_or_zero(),
        }
    }

    /// The line that keeps its value of code 0 and reaches `high` in so many steps.
    #[inline(always)]
    fn upwards_to(&self, high: Lanes<S>, steps: f32) -> Self {
        Self::new((high - self.m) * high.like(1.0 / steps), self.m)
    }

    /// The line that keeps its value of the largest code and reaches `low` in so many steps down.
    #[inline(always)]
    fn downwards_to(&self, low: Lanes<S>, steps: f32, largest: f32) -> Self {
        let top = self.m + self.d * low.like(largest);
        let d = (top - low) * low.like(1.0 / steps);
        Self::new(d, top - d * low.like(largest))
    }

    #[inline(always)]
    fn rounded(self, problem: &Problem<S>) -> Self {
        Self::new(problem.round_to_f16(self.d), problem.round_to_f16(self.m))
    }

    #[inline(always)]
    fn code(&self, x: Lanes<S>, largest: f32) -> Lanes<S> {
        ((x - self.m) * self.inverse)
            .max(x.like(0.0))
            .min(x.like(largest))
            .round()
    }
}

/// What does not depend on the codes.
struct Totals<S: Simd> {
    low: Lanes<S>,
    high: Lanes<S>,
    /// Sum of weight.
    weight: Lanes<S>,
    /// Its inverse.
    per_weight: Lanes<S>,
    /// Weighted mean of x.
    mean: Lanes<S>,
}

impl<S: Simd> Totals<S> {
    #[inline(always)]
    fn of(problem: &Problem<S>) -> Self {
        let zero = problem.x[0].like(0.0);
        let (mut low, mut high) = (problem.x[0], problem.x[0]);
        let (mut w, mut wx) = (zero, zero);
        for (&x, &weight) in problem.x.iter().zip(&problem.weight) {
            low = low.min(x);
            high = high.max(x);
            w += weight;
            wx += weight * x;
        }
        let per_weight = w.recip_or_zero();
        Self {
            low,
            high,
            weight: w,
            per_weight,
            mean: wx * per_weight,
        }
    }
}

/// Weighted sums over codes, with x relative to its mean.
struct Fit<S: Simd> {
    /// Sum of weight code.
    q: Lanes<S>,
    /// Sum of weight code^2.
    qq: Lanes<S>,
    /// Sum of weight code (x - mean).
    qx: Lanes<S>,
}

impl<S: Simd> Fit<S> {
    #[inline(always)]
    fn of(problem: &Problem<S>, totals: &Totals<S>, line: &Line<S>, largest: f32) -> Self {
        let zero = line.d.like(0.0);
        let mut fit = Self {
            q: zero,
            qq: zero,
            qx: zero,
        };
        for (&x, &weight) in problem.x.iter().zip(&problem.weight) {
            let code = line.code(x, largest);
            let wq = weight * code;
            fit.q += wq;
            fit.qq += wq * code;
            fit.qx += wq * (x - totals.mean);
        }
        fit
    }

    /// The weighted squared error of a line with these codes, without the part that no line changes.
    #[inline(always)]
    fn error(&self, totals: &Totals<S>, line: &Line<S>) -> Lanes<S> {
        let m = line.m - totals.mean;
        let cross = m * self.q - self.qx;
        line.d * (line.d * self.qq + cross + cross) + m * m * totals.weight
    }

    /// Scale and offset of least error for these codes.
    #[inline(always)]
    fn line(&self, totals: &Totals<S>) -> Line<S> {
        let mean = self.q * totals.per_weight;
        let spread = self.qq - self.q * mean;
        // Where all codes are equal, nothing but rounding errors is left.
        let told_apart = spread.gt(self.qq * spread.like(1e-6));
        let d = told_apart.select(self.qx * spread.recip_or_zero(), spread.like(0.0));
        Line::new(d, totals.mean - d * mean)
    }
}

/// Tries ranges from one end of the best line so far to the other end of the values, in as many steps
/// as there are codes, a few more or fewer; codes are rounded on the try, which is then fitted to them.
///
/// ggml's `make_qkx3_quants` holds the lower end in its single pass; with the upper end held in every
/// other one the errors of Q4_1 and Q5_1 fall by 3 % and 5 %.
#[inline(always)]
fn first_fit<S: Simd>(problem: &Problem<S>, totals: &Totals<S>, largest: f32) -> Line<S> {
    let range = totals.high - totals.low;
    let mut best = Line::new(range * range.like(1.0 / largest), totals.low);
    let mut most = range.like(0.0);
    for attempt in 0..PASSES * TRIES {
        let steps = largest + FIRST + STEP * (attempt % TRIES) as f32;
        let tried = if (attempt / TRIES).is_multiple_of(2) {
            best.upwards_to(totals.high, steps)
        } else {
            best.downwards_to(totals.low, steps, largest)
        };
        let fit = Fit::of(problem, totals, &tried, largest);
        let line = fit.line(totals);
        let gain = line.d * fit.qx;
        let better = gain.gt(most);
        most = better.select(gain, most);
        best.d = better.select(line.d, best.d);
        best.m = better.select(line.m, best.m);
    }
    best
}

/// Alternates between codes and line, and keeps the best line seen, all as f16.
#[inline(always)]
fn refine<S: Simd>(
    problem: &Problem<S>,
    totals: &Totals<S>,
    line: Line<S>,
    largest: f32,
) -> Line<S> {
    let mut line = line.rounded(problem);
    let (mut best, mut least) = (line, line.d.like(f32::INFINITY));
    for _ in 0..ROUNDS {
        let fit = Fit::of(problem, totals, &line, largest);
        let error = fit.error(totals, &line);
        let better = error.lt(least);
        if !better.any() {
            break;
        }
        least = better.select(error, least);
        best = Line::new(better.select(line.d, best.d), better.select(line.m, best.m));
        line = fit.line(totals).rounded(problem);
    }
    best
}
