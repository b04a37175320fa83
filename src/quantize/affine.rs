//! The search behind Q2_K, Q4_K and Q5_K, where a weight is `d sc q - dmin m`.
//!
//! Enters: a problem. Leaves: the f16 scales `d` and `dmin`, each sub-block's small whole `sc` and
//! `m`, and the codes `q`. Knows no block layout.

use pulp::Simd;

use super::{
    lanes::Lanes,
    super_block::{Problem, SUPER_BLOCK},
};

/// What tells the affine types apart.
#[derive(Clone, Copy, Debug)]
pub struct AffineGrid {
    /// Largest code.
    pub codes: f32,
    /// Largest `sc` and `m`.
    pub scales: f32,
    /// First fits of a sub-block that start at its minimum.
    pub plain: Sweep,
    /// First fits of a sub-block, each starting at the best offset so far.
    pub drift: Sweep,
    /// Descents at the level of the super-block.
    pub rounds: usize,
    pub wide: usize,
    pub share: f32,
    pub always: bool,
    pub factors: usize,
    pub factor_step: f32,
}

/// What an affine search found, with `SUBS` sub-blocks in a super-block.
pub struct AffineSolution<S: Simd, const SUBS: usize> {
    /// Scale of the scales, in units of the original weights.
    pub d: Lanes<S>,
    /// Scale of the offsets, in units of the original weights.
    pub dmin: Lanes<S>,
    /// Scale of each sub-block, in units of `d`.
    pub scales: [Lanes<S>; SUBS],
    /// Offset of each sub-block, in units of `dmin`.
    pub mins: [Lanes<S>; SUBS],
    /// Code of each weight.
    pub codes: [Lanes<S>; SUPER_BLOCK],
}

/// Scales as far as they are chosen, in units of the problem.
#[derive(Clone, Copy)]
struct Scales<S: Simd, const SUBS: usize> {
    d: Lanes<S>,
    dmin: Lanes<S>,
    scales: [Lanes<S>; SUBS],
    mins: [Lanes<S>; SUBS],
}

/// Sums over a sub-block whose weights `x` are stored as `step q - offset`, with `r` what is left.
#[derive(Clone, Copy)]
struct Moments<S: Simd> {
    /// Sum of weight r^2.
    error: Lanes<S>,
    /// Sum of weight r.
    r: Lanes<S>,
    /// Sum of weight r q.
    rq: Lanes<S>,
    /// Sum of weight.
    w: Lanes<S>,
    /// Sum of weight q.
    q: Lanes<S>,
    /// Sum of weight q^2.
    qq: Lanes<S>,
}

/// Chooses scales and codes of least weighted squared error.
#[inline(always)]
pub fn search<S: Simd, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &AffineGrid,
) -> AffineSolution<S, SUBS> {
    let best = choose_scales::<S, SUBS>(simd, problem, grid);
    let mut codes = problem.x;
    for j in 0..SUBS {
        let (step, offset) = best.of(j);
        let inverse = step.recip_or_zero();
        for x in &mut codes[j * (SUPER_BLOCK / SUBS)..][..SUPER_BLOCK / SUBS] {
            *x = code(*x, inverse, offset, grid);
        }
    }
    AffineSolution {
        d: problem.in_original_units(best.d),
        dmin: problem.in_original_units(best.dmin),
        scales: best.scales,
        mins: best.mins,
        codes,
    }
}

/// The code nearest to `x` among `step q - offset`.
#[inline(always)]
fn code<S: Simd>(x: Lanes<S>, inverse: Lanes<S>, offset: Lanes<S>, grid: &AffineGrid) -> Lanes<S> {
    ((x + offset) * inverse).max(x.like(0.0)).min(x.like(grid.codes)).round()
}

#[inline(always)]
fn choose_scales<S: Simd, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &AffineGrid,
) -> Scales<S, SUBS> {
    let zero = Lanes::zero(simd);
    let mut fits = [Fit { step: zero, offset: zero, gain: zero, stiffness: zero }; SUBS];
    let mut others = fits;
    let mut weights = [zero; SUBS];
    for j in 0..SUBS {
        let (xs, ws) = problem.sub_block::<SUBS>(j);
        let spread = Spread::of(xs, ws);
        let plain = spread.sweep::<false>(xs, ws, &grid.plain, grid);
        let drift = spread.sweep::<true>(xs, ws, &grid.drift, grid);
        let better = drift.gain.gt(plain.gain);
        fits[j] = plain.or_where(better, &drift);
        others[j] = drift.or_where(better, &plain);
        weights[j] = spread.w;
    }
    let mut scales = Scales::nearest(problem, &fits, &weights, grid);
    let mut best = scales;
    let mut least = zero.like(f32::INFINITY);
    for round in 0..=grid.rounds {
        let mut moments = [Moments::zero(simd); SUBS];
        let mut error = zero;
        for j in 0..SUBS {
            let (xs, ws) = problem.sub_block::<SUBS>(j);
            let (step, offset) = scales.of(j);
            moments[j] = Moments::of(xs, ws, step, offset, grid);
            error += moments[j].error;
        }
        let better = error.lt(least);
        least = better.select(error, least);
        best = best.or_where(better, &scales);
        if round < grid.rounds {
            if round < grid.wide { scales.look_around(problem, &mut moments, (round == 0).then_some(&others), grid); }
 scales = scales.descend(problem, moments, grid);
        }
    }
    best
}

/// A sub-block stored as `step q - offset` with any step and offset.
#[derive(Clone, Copy)]
struct Fit<S: Simd> {
    step: Lanes<S>,
    offset: Lanes<S>,
    /// How much of the weighted energy around the mean it explains.
    gain: Lanes<S>,
    /// Sum of weight q^2 around the mean: how much an error of the step costs.
    stiffness: Lanes<S>,
}

/// Numbers of steps in a sub-block's range to try, as distances from the largest code.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// The first distance.
    pub first: f32,
    /// From one distance to the next.
    pub step: f32,
    /// How many.
    pub tries: usize,
}

impl<S: Simd> Fit<S> {
    #[inline(always)]
    fn or_where(self, mask: super::lanes::Mask<S>, other: &Self) -> Self {
        Self {
            step: mask.select(other.step, self.step),
            offset: mask.select(other.offset, self.offset),
            gain: mask.select(other.gain, self.gain),
            stiffness: mask.select(other.stiffness, self.stiffness),
        }
    }
}

/// Sums over a sub-block that no choice of codes changes.
#[derive(Clone, Copy)]
struct Spread<S: Simd> {
    low: Lanes<S>,
    high: Lanes<S>,
    w: Lanes<S>,
    per_w: Lanes<S>,
    mean: Lanes<S>,
}

impl<S: Simd> Spread<S> {
    #[inline(always)]
    fn of(xs: &[Lanes<S>], ws: &[Lanes<S>]) -> Self {
        let zero = xs[0].like(0.0);
        let (mut low, mut high, mut w, mut wx) = (zero, xs[0], zero, zero);
        for (&x, &weight) in xs.iter().zip(ws) {
            low = low.min(x);
            high = high.max(x);
            w += weight;
            wx += weight * x;
        }
        let per_w = w.recip_or_zero();
        Self { low, high, w, per_w, mean: wx * per_w }
    }

    #[inline(always)]
    fn start(&self, grid: &AffineGrid) -> Fit<S> {
        let zero = self.low.like(0.0);
        Fit {
            step: (self.high - self.low) * zero.like(1.0 / grid.codes),
            offset: -self.low,
            gain: zero.like(f32::NEG_INFINITY),
            stiffness: zero,
        }
    }

    #[inline(always)]
    fn sweep<const DRIFT: bool>(&self, xs: &[Lanes<S>], ws: &[Lanes<S>], sweep: &Sweep, grid: &AffineGrid) -> Fit<S> {
        let mut best = self.start(grid);
        let mut per_range = (self.high - self.low).recip_or_zero();
        let mut base = -self.low;
        for k in 0..sweep.tries {
            if DRIFT {
                per_range = (self.high + best.offset).recip_or_zero();
                base = best.offset;
            }
            let inverse = per_range * base.like(grid.codes + sweep.first + sweep.step * k as f32);
            let fit = self.fit(xs, ws, base, inverse, grid);
            best = best.or_where(fit.gain.gt(best.gain), &fit);
        }
        best
    }

    /// Rounds to codes and fits step and offset to them by weighted least squares, the offset not below zero.
    #[inline(always)]
    fn fit(&self, xs: &[Lanes<S>], ws: &[Lanes<S>], base: Lanes<S>, inverse: Lanes<S>, grid: &AffineGrid) -> Fit<S> {
        let zero = base.like(0.0);
        let (mut q1, mut qq, mut qx) = (zero, zero, zero);
        for (&x, &w) in xs.iter().zip(ws) {
            let q = code(x, inverse, base, grid);
            let wq = w * q;
            q1 += wq;
            qq += wq * q;
            qx += wq * (x - self.mean);
        }
        let center = q1 * self.per_w;
        let spread = qq - q1 * center;
        let free = (qx * center).gt(self.mean * spread);
        let num = free.select(qx, qx + self.mean * q1);
        let den = free.select(spread, qq);
        let step = num * den.recip_or_zero();
        let gain = step * num;
        Fit {
            step,
            offset: free.select(step * center - self.mean, zero),
            gain: spread.gt(zero).select(free.select(gain, gain - self.w * self.mean * self.mean), zero.like(f32::NEG_INFINITY)),
            stiffness: spread,
        }
    }
}

impl<S: Simd> Problem<S> {
    /// Weights and error weights of sub-block `j` of `SUBS`.
    #[inline(always)]
    fn sub_block<const SUBS: usize>(&self, j: usize) -> (&[Lanes<S>], &[Lanes<S>]) {
        let len = SUPER_BLOCK / SUBS;
        (&self.x[j * len..][..len], &self.weight[j * len..][..len])
    }
}

impl<S: Simd> Moments<S> {
    #[inline(always)]
    fn zero(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self { error: zero, r: zero, rq: zero, w: zero, q: zero, qq: zero }
    }

    #[inline(always)]
    fn of(xs: &[Lanes<S>], ws: &[Lanes<S>], step: Lanes<S>, offset: Lanes<S>, grid: &AffineGrid) -> Self {
        let zero = step.like(0.0);
        let inverse = step.recip_or_zero();
        let mut sums = Self { error: zero, r: zero, rq: zero, w: zero, q: zero, qq: zero };
        for (&x, &w) in xs.iter().zip(ws) {
            let q = code(x, inverse, offset, grid);
            let r = x + offset - step * q;
            let (wr, wq) = (w * r, w * q);
            sums.error += wr * r;
            sums.r += wr;
            sums.rq += wr * q;
            sums.w += w;
            sums.q += wq;
            sums.qq += wq * q;
        }
        sums
    }

    #[inline(always)]
    fn or_where(self, mask: super::lanes::Mask<S>, other: &Self) -> Self {
        Self {
            error: mask.select(other.error, self.error),
            r: mask.select(other.r, self.r),
            rq: mask.select(other.rq, self.rq),
            w: self.w,
            q: mask.select(other.q, self.q),
            qq: mask.select(other.qq, self.qq),
        }
    }

    /// The same codes under another step and offset.
    #[inline(always)]
    fn moved(self, step: Lanes<S>, offset: Lanes<S>) -> Self {
        Self {
            error: self.error_moved(step, offset),
            r: self.r - step * self.q + offset * self.w,
            rq: self.rq - step * self.qq + offset * self.q,
            ..self
        }
    }

    /// The error if the step grew by `step` and the offset by `offset`.
    #[inline(always)]
    fn error_moved(self, step: Lanes<S>, offset: Lanes<S>) -> Lanes<S> {
        let two = step.like(2.0);
        self.error + step * (step * self.qq - two * self.rq)
            + offset * (offset * self.w + two * (self.r - step * self.q))
    }
}

impl<S: Simd, const SUBS: usize> Scales<S, SUBS> {
    #[inline(always)]
    fn of(&self, j: usize) -> (Lanes<S>, Lanes<S>) {
        (self.d * self.scales[j], self.dmin * self.mins[j])
    }

    /// The grid that just reaches the largest step and offset.
    #[inline(always)]
    fn nearest(
        problem: &Problem<S>,
        fits: &[Fit<S>; SUBS],
        weights: &[Lanes<S>; SUBS],
        grid: &AffineGrid,
    ) -> Self {
        let (mut steps, mut offsets, mut stiffness) = (*weights, *weights, *weights);
        for j in 0..SUBS {
            (steps[j], offsets[j], stiffness[j]) = (fits[j].step, fits[j].offset, fits[j].stiffness);
        }
        let (d, scales) = whole_multiples(problem, &steps, &stiffness, grid);
        let (dmin, mins) = whole_multiples(problem, &offsets, weights, grid);
        Self { d, dmin, scales, mins }
    }

    #[inline(always)]
    fn or_where(self, mask: super::lanes::Mask<S>, other: &Self) -> Self {
        let mut result = self;
        result.d = mask.select(other.d, self.d);
        result.dmin = mask.select(other.dmin, self.dmin);
        for j in 0..SUBS {
            result.scales[j] = mask.select(other.scales[j], self.scales[j]);
            result.mins[j] = mask.select(other.mins[j], self.mins[j]);
        }
        result
    }

    /// With the codes as they are, moves every sub-block to its best whole scales, then `d` and `dmin`
    /// to their weighted least squares.
    #[inline(always)]
    fn descend(mut self, problem: &Problem<S>, mut moments: [Moments<S>; SUBS], grid: &AffineGrid) -> Self {
        let zero = self.d.like(0.0);
        let (mut dd, mut dm, mut mm, mut rd, mut rm) = (zero, zero, zero, zero, zero);
        for j in 0..SUBS {
            let (scale, min) = self.best_whole(j, &moments[j], grid);
            moments[j] =
                moments[j].moved(self.d * (scale - self.scales[j]), self.dmin * (min - self.mins[j]));
            (self.scales[j], self.mins[j]) = (scale, min);
            let sums = &moments[j];
            dd += scale * scale * sums.qq;
            dm += scale * min * sums.q;
            mm += min * min * sums.w;
            rd += scale * sums.rq;
            rm += min * sums.r;
        }
        let determinant = dd * mm - dm * dm;
        let both = determinant.gt(zero);
        let scale = determinant.recip_or_zero();
        let d = both.select((rd * mm - rm * dm) * scale, rd * dd.recip_or_zero());
        let dmin = both.select((rd * dm - rm * dd) * scale, zero);
        self.d = problem.round_to_f16((self.d + d).max(zero));
        self.dmin = problem.round_to_f16((self.dmin + dmin).max(zero));
        self
    }

    /// Tries the scales next to each sub-block's own, with codes chosen anew.
    #[inline(always)]
    fn look_around(&mut self, problem: &Problem<S>, moments: &mut [Moments<S>; SUBS], others: Option<&[Fit<S>; SUBS]>, grid: &AffineGrid) {
        let per_d = self.d.recip_or_zero();
        let zero = self.d.like(0.0);
        let limit = zero.like(grid.scales);
        let per_dmin = self.dmin.recip_or_zero();
        for j in 0..SUBS {
            let (xs, ws) = problem.sub_block::<SUBS>(j);
            let (mut scale, mut min, mut sums) = (self.scales[j], self.mins[j], moments[j]);
            let center = sums.q * sums.w.recip_or_zero();
            if let Some(others) = others {
                let other_scale = (others[j].step * per_d).min(limit).round();
                let other_min = (others[j].offset * per_dmin).min(limit).round();
                let other = Moments::of(xs, ws, self.d * other_scale, self.dmin * other_min, grid);
                let better = other.error.lt(sums.error);
                scale = better.select(other_scale, scale);
                min = better.select(other_min, min);
                sums = sums.or_where(better, &other);
            }
            for shift in [-1.0, 1.0f32] {
                let other_scale = (self.scales[j] + zero.like(shift)).max(zero).min(limit);
                let shift_min = self.d * (other_scale - self.scales[j]) * center * per_dmin;
                let other_min = (self.mins[j] + shift_min).max(zero).min(limit).round();
                let other = Moments::of(xs, ws, self.d * other_scale, self.dmin * other_min, grid);
                let better = other.error.lt(sums.error);
                scale = better.select(other_scale, scale);
                min = better.select(other_min, min);
                sums = sums.or_where(better, &other);
            }
            if others.is_some() || grid.always {
            for share in [-grid.share, grid.share] {
                let shift = (self.d * self.scales[j] * zero.like(share) * per_dmin).round();
                let other_min = (self.mins[j] + shift).max(zero).min(limit);
                let other_scale = (self.scales[j] + self.dmin * (other_min - self.mins[j]) * per_d * zero.like(1.0 / grid.codes)).max(zero).min(limit).round();
                let other = Moments::of(xs, ws, self.d * other_scale, self.dmin * other_min, grid);
                let better = other.error.lt(sums.error);
                scale = better.select(other_scale, scale);
                min = better.select(other_min, min);
                sums = sums.or_where(better, &other);
            }
            }
            self.scales[j] = scale;
            self.mins[j] = min;
            moments[j] = sums;
        }
    }

    #[inline(always)]
    fn best_whole(&self, j: usize, sums: &Moments<S>, grid: &AffineGrid) -> (Lanes<S>, Lanes<S>) {
        let zero = self.d.like(0.0);
        let limit = zero.like(grid.scales);
        let per_step = (self.d * sums.qq).recip_or_zero();
        let (mut scale, mut min, mut least) = (self.scales[j], self.mins[j], sums.error);
        for shift in [0.0, -1.0, 1.0, -2.0, 2.0f32] {
            let other_min = (self.mins[j] + zero.like(shift)).max(zero).min(limit);
            let offset = self.dmin * (other_min - self.mins[j]);
            let wanted = (sums.rq + offset * sums.q) * per_step;
            let other_scale = (self.scales[j] + wanted).max(zero).min(limit).round();
            let error = sums.error_moved(self.d * (other_scale - self.scales[j]), offset);
            let better = error.lt(least);
            least = better.select(error, least);
            scale = better.select(other_scale, scale);
            min = better.select(other_min, min);
        }
        (scale, min)
    }
}

/// A common f16 factor of some values that are not negative, and the nearest whole multiples.
#[inline(always)]
fn whole_multiples<S: Simd, const SUBS: usize>(
    problem: &Problem<S>,
    values: &[Lanes<S>; SUBS],
    weights: &[Lanes<S>; SUBS],
    grid: &AffineGrid,
) -> (Lanes<S>, [Lanes<S>; SUBS]) {
    let limit = values[0].like(grid.scales);
    let zero = limit.like(0.0);
    let mut largest = zero;
    for &value in values {
        largest = largest.max(value);
    }
    let mut best = zero;
    let mut least = zero.like(f32::INFINITY);
    for k in 0..grid.factors {
        let factor = problem.round_to_f16(largest / (limit + zero.like(grid.factor_step * (k as f32 - grid.factors as f32 * 0.5 + 0.5))));
        let inverse = factor.recip_or_zero();
        let mut error = zero;
        for (&value, &weight) in values.iter().zip(weights) {
            let r = value - factor * (value * inverse).min(limit).round();
            error += weight * r * r;
        }
        let better = error.lt(least);
        least = better.select(error, least);
        best = better.select(factor, best);
    }
    let inverse = best.recip_or_zero();
    let mut multiples = *values;
    for value in &mut multiples {
        *value = (*value * inverse).min(limit).round();
    }
    (best, multiples)
}
