//! The search behind Q2_K, Q4_K and Q5_K, where a weight is `d sc q - dmin m`.
//!
//! Enters: a problem. Leaves: the f16 scales `d` and `dmin`, each sub-block's small whole `sc` and
//! `m`, and the codes `q`. Knows no block layout.
//!
//! ggml fits each sub-block with any step and offset (`make_qkx2_quants`, `make_qkx3_quants`), rounds
//! both to whole multiples and stops there. Here the multiples are then chosen anew, by the error that
//! the stored weights really have, and `d` and `dmin` refitted; only improvements are kept.

use half::f16;
use pulp::Simd;

use super::{
    lanes::{Lanes, Mask, unload_codes},
    super_block::{Problem, SUPER_BLOCK, Sweep, saturates},
};

/// What tells the affine types apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AffineGrid {
    /// Largest code.
    pub codes: f32,
    /// Largest `sc` and `m`.
    pub scales: f32,
    /// First fits from the least weight up: steps in the range, less `codes`.
    pub plain: Sweep,
    /// First fits from the best offset so far up: steps in the range, less `codes`.
    pub drift: Sweep,
    /// Values of `d` and `dmin`: multiples in the largest step or offset, less `scales`.
    pub factors: Sweep,
    /// How often scales and codes are fitted to each other in the end.
    pub rounds: usize,
}

/// What an affine search found, with `SUBS` sub-blocks in a super-block.
pub struct AffineSolution<S: Simd, const SUBS: usize> {
    /// In units of the original weights.
    d: Lanes<S>,
    /// In units of the original weights.
    dmin: Lanes<S>,
    scales: [Lanes<S>; SUBS],
    mins: [Lanes<S>; SUBS],
    codes: [Lanes<S>; SUPER_BLOCK],
}

/// One lane of an affine solution, as blocks are packed from.
pub struct AffineLane<const SUBS: usize> {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the offsets.
    pub dmin: f16,
    /// `sc` of each sub-block.
    pub scales: [u8; SUBS],
    /// `m` of each sub-block.
    pub mins: [u8; SUBS],
    /// `q` of each weight.
    pub codes: [u8; SUPER_BLOCK],
    /// How many of the f16 scales were cut to the largest f16.
    pub saturated: u64,
}

impl<S: Simd, const SUBS: usize> AffineSolution<S, SUBS> {
    /// One lane.
    #[inline(always)]
    pub fn lane(&self, lane: usize) -> AffineLane<SUBS> {
        let (d, dmin) = (self.d.as_slice()[lane], self.dmin.as_slice()[lane]);
        let mut result = AffineLane {
            d: f16::from_f32(d),
            dmin: f16::from_f32(dmin),
            scales: [0; SUBS],
            mins: [0; SUBS],
            codes: [0; SUPER_BLOCK],
            saturated: saturates(d) + saturates(dmin),
        };
        unload_codes(&self.scales, lane, &mut result.scales);
        unload_codes(&self.mins, lane, &mut result.mins);
        unload_codes(&self.codes, lane, &mut result.codes);
        result
    }
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
    for (j, codes) in codes.chunks_exact_mut(SUPER_BLOCK / SUBS).enumerate() {
        let (step, offset) = best.of(j);
        let inverse = step.recip_or_zero();
        for x in codes {
            *x = code(*x, offset, inverse, grid);
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

/// The f16 factors of scales and offsets of least weighted squared error, in units of the original weights.
#[inline(always)]
pub fn factors<S: Simd, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &AffineGrid,
) -> (Lanes<S>, Lanes<S>) {
    let best = choose_scales::<S, SUBS>(simd, problem, grid);
    (
        problem.in_original_units(best.d),
        problem.in_original_units(best.dmin),
    )
}

/// Step and offset of one sub-block of least weighted squared error, with nothing rounded but the codes.
#[inline(always)]
pub fn fit_sub_block<S: Simd>(
    xs: &[Lanes<S>],
    ws: &[Lanes<S>],
    grid: &AffineGrid,
) -> (Lanes<S>, Lanes<S>) {
    let (best, _) = two_fits(xs, ws, grid);
    (best.step, best.offset)
}

#[inline(always)]
fn choose_scales<S: Simd, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &AffineGrid,
) -> Scales<S, SUBS> {
    let mut fits = [Fit::zero(simd); SUBS];
    let mut seconds = fits;
    for j in 0..SUBS {
        let (xs, ws) = problem.sub_block::<SUBS>(j);
        (fits[j], seconds[j]) = two_fits(xs, ws, grid);
    }
    let mut scales = Scales::nearest(problem, &fits, grid);
    let mut best = scales;
    let mut least = Lanes::splat(simd, f32::INFINITY);
    for round in 0..=grid.rounds {
        let mut moments = [Moments::zero(simd); SUBS];
        let mut error = Lanes::zero(simd);
        for (j, sums) in moments.iter_mut().enumerate() {
            let (xs, ws) = problem.sub_block::<SUBS>(j);
            *sums = Moments::of(xs, ws, scales.of(j), grid);
            error += sums.error;
        }
        let better = error.lt(least);
        least = better.select(error, least);
        best = best.or_where(better, &scales);
        if round == 0 {
            scales.look_around(problem, &seconds, &mut moments, grid);
        }
        if round < grid.rounds {
            scales.descend(problem, &mut moments, grid);
        }
    }
    best
}

/// The code nearest to `x` among `step q - offset`, where `inverse` is `1 / step`.
#[inline(always)]
fn code<S: Simd>(x: Lanes<S>, offset: Lanes<S>, inverse: Lanes<S>, grid: &AffineGrid) -> Lanes<S> {
    ((x + offset) * inverse)
        .max(x.like(0.0))
        .min(x.like(grid.codes))
        .round()
}

/// A sub-block stored as `step q - offset` with any step and offset.
#[derive(Clone, Copy)]
struct Fit<S: Simd> {
    step: Lanes<S>,
    offset: Lanes<S>,
    /// How much of the weighted energy around the mean it explains.
    gain: Lanes<S>,
    /// Sum of weight (q - mean q)^2: what an error of the step costs.
    stiffness: Lanes<S>,
    /// Sum of weight: what an error of the offset costs.
    w: Lanes<S>,
}

/// The best of all fits, and the best from the other of two starts: least weight or drifting offset.
#[inline(always)]
fn two_fits<S: Simd>(xs: &[Lanes<S>], ws: &[Lanes<S>], grid: &AffineGrid) -> (Fit<S>, Fit<S>) {
    let range = Range::of(xs, ws);
    let mut wxs = [range.mean; SUPER_BLOCK / 8];
    let wxs = &mut wxs[..xs.len()];
    for ((wx, &x), &w) in wxs.iter_mut().zip(xs).zip(ws) {
        *wx = w * (x - range.mean);
    }
    let wxs = &*wxs;
    let bottom = range.whole(grid);
    let mut plain = bottom;
    let per_range = (range.high - range.low).recip_or_zero();
    for k in 0..grid.plain.tries {
        let inverse = per_range * per_range.like(grid.codes + grid.plain.at(k));
        let fit = range.fit(xs, ws, wxs, bottom.offset, inverse, grid);
        plain = plain.or_where(fit.gain.gt(plain.gain), &fit);
    }
    let mut drift = bottom;
    for k in 0..grid.drift.tries {
        let per_range = (range.high + drift.offset).recip_or_zero();
        let inverse = per_range * per_range.like(grid.codes + grid.drift.at(k));
        let fit = range.fit(xs, ws, wxs, drift.offset, inverse, grid);
        drift = drift.or_where(fit.gain.gt(drift.gain), &fit);
    }
    let better = drift.gain.gt(plain.gain);
    (
        plain.or_where(better, &drift),
        drift.or_where(better, &plain),
    )
}

/// What no choice of codes changes in a sub-block.
struct Range<S: Simd> {
    /// At most 0.
    low: Lanes<S>,
    high: Lanes<S>,
    w: Lanes<S>,
    per_w: Lanes<S>,
    mean: Lanes<S>,
}

impl<S: Simd> Range<S> {
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
        Self {
            low,
            high,
            w,
            per_w,
            mean: wx * per_w,
        }
    }

    /// The grid from end to end, which every fit beats.
    #[inline(always)]
    fn whole(&self, grid: &AffineGrid) -> Fit<S> {
        Fit {
            step: (self.high - self.low) * self.w.like(1.0 / grid.codes),
            offset: -self.low,
            gain: self.w.like(f32::NEG_INFINITY),
            stiffness: self.w.like(0.0),
            w: self.w,
        }
    }

    /// Rounds to the codes of some step and offset, then fits both to them by weighted least squares,
    /// the offset not below zero.
    #[inline(always)]
    fn fit(
        &self,
        xs: &[Lanes<S>],
        ws: &[Lanes<S>],
        wxs: &[Lanes<S>],
        offset: Lanes<S>,
        inverse: Lanes<S>,
        grid: &AffineGrid,
    ) -> Fit<S> {
        let zero = offset.like(0.0);
        let (mut q, mut qq, mut qx) = (zero, zero, zero);
        for ((&x, &w), &wx) in xs.iter().zip(ws).zip(wxs) {
            let code = code(x, offset, inverse, grid);
            let wq = w * code;
            q += wq;
            qq += wq * code;
            qx += wx * code;
        }
        let center = q * self.per_w;
        let stiffness = qq - q * center;
        let free = (qx * center).gt(self.mean * stiffness);
        let numerator = free.select(qx, qx + self.mean * q);
        let step = numerator * free.select(stiffness, qq).recip_or_zero();
        let gain = step * numerator - free.select(zero, self.w * self.mean * self.mean);
        Fit {
            step,
            offset: free.select(step * center - self.mean, zero),
            gain: stiffness
                .gt(zero)
                .select(gain, zero.like(f32::NEG_INFINITY)),
            stiffness,
            w: self.w,
        }
    }
}

impl<S: Simd> Fit<S> {
    #[inline(always)]
    fn zero(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self {
            step: zero,
            offset: zero,
            gain: zero,
            stiffness: zero,
            w: zero,
        }
    }

    #[inline(always)]
    fn or_where(self, mask: Mask<S>, other: &Self) -> Self {
        Self {
            step: mask.select(other.step, self.step),
            offset: mask.select(other.offset, self.offset),
            gain: mask.select(other.gain, self.gain),
            stiffness: mask.select(other.stiffness, self.stiffness),
            w: self.w,
        }
    }
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

impl<S: Simd> Moments<S> {
    #[inline(always)]
    fn zero(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self {
            error: zero,
            r: zero,
            rq: zero,
            w: zero,
            q: zero,
            qq: zero,
        }
    }

    #[inline(always)]
    fn of(
        xs: &[Lanes<S>],
        ws: &[Lanes<S>],
        (step, offset): (Lanes<S>, Lanes<S>),
        grid: &AffineGrid,
    ) -> Self {
        let zero = step.like(0.0);
        let inverse = step.recip_or_zero();
        let mut sums = Self {
            error: zero,
            r: zero,
            rq: zero,
            w: zero,
            q: zero,
            qq: zero,
        };
        for (&x, &w) in xs.iter().zip(ws) {
            let q = code(x, offset, inverse, grid);
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
    fn or_where(self, mask: Mask<S>, other: &Self) -> Self {
        Self {
            error: mask.select(other.error, self.error),
            r: mask.select(other.r, self.r),
            rq: mask.select(other.rq, self.rq),
            w: self.w,
            q: mask.select(other.q, self.q),
            qq: mask.select(other.qq, self.qq),
        }
    }

    /// The same codes where the step has grown by `step` and the offset by `offset`.
    #[inline(always)]
    fn moved(self, step: Lanes<S>, offset: Lanes<S>) -> Self {
        Self {
            error: self.error_moved(step, offset),
            r: self.r - step * self.q + offset * self.w,
            rq: self.rq - step * self.qq + offset * self.q,
            ..self
        }
    }

    #[inline(always)]
    fn error_moved(&self, step: Lanes<S>, offset: Lanes<S>) -> Lanes<S> {
        let two = step.like(2.0);
        self.error
            + step * (step * self.qq - two * self.rq)
            + offset * (offset * self.w + two * (self.r - step * self.q))
    }
}

/// Scales as far as they are chosen, in units of the problem.
#[derive(Clone, Copy)]
struct Scales<S: Simd, const SUBS: usize> {
    d: Lanes<S>,
    dmin: Lanes<S>,
    scales: [Lanes<S>; SUBS],
    mins: [Lanes<S>; SUBS],
}

impl<S: Simd, const SUBS: usize> Scales<S, SUBS> {
    /// The `d` and `dmin` whose whole multiples come nearest to the fits.
    #[inline(always)]
    fn nearest(problem: &Problem<S>, fits: &[Fit<S>; SUBS], grid: &AffineGrid) -> Self {
        let zero = fits[0].step.like(0.0);
        let (mut steps, mut stiffness) = ([zero; SUBS], [zero; SUBS]);
        let (mut offsets, mut weights) = ([zero; SUBS], [zero; SUBS]);
        for (j, fit) in fits.iter().enumerate() {
            (steps[j], stiffness[j]) = (fit.step, fit.stiffness);
            (offsets[j], weights[j]) = (fit.offset, fit.w);
        }
        let d = common_factor(problem, &steps, &stiffness, grid);
        let dmin = common_factor(problem, &offsets, &weights, grid);
        let (per_d, per_dmin) = (d.recip_or_zero(), dmin.recip_or_zero());
        for j in 0..SUBS {
            steps[j] = grid.whole(steps[j] * per_d);
            offsets[j] = grid.whole(offsets[j] * per_dmin);
        }
        Self {
            d,
            dmin,
            scales: steps,
            mins: offsets,
        }
    }

    /// Step and offset of sub-block `j`.
    #[inline(always)]
    fn of(&self, j: usize) -> (Lanes<S>, Lanes<S>) {
        (self.d * self.scales[j], self.dmin * self.mins[j])
    }

    #[inline(always)]
    fn or_where(mut self, mask: Mask<S>, other: &Self) -> Self {
        self.d = mask.select(other.d, self.d);
        self.dmin = mask.select(other.dmin, self.dmin);
        for j in 0..SUBS {
            self.scales[j] = mask.select(other.scales[j], self.scales[j]);
            self.mins[j] = mask.select(other.mins[j], self.mins[j]);
        }
        self
    }

    /// Tries, with codes chosen anew, each sub-block's second fit, the scales next to its own with the
    /// middle kept, and the offsets about a third of a step away with the top kept: other local minima.
    #[inline(always)]
    fn look_around(
        &mut self,
        problem: &Problem<S>,
        seconds: &[Fit<S>; SUBS],
        moments: &mut [Moments<S>; SUBS],
        grid: &AffineGrid,
    ) {
        const THIRD: f32 = 0.35;
        let (per_d, per_dmin) = (self.d.recip_or_zero(), self.dmin.recip_or_zero());
        for j in 0..SUBS {
            let second = &seconds[j];
            self.accept(
                j,
                second.step * per_d,
                second.offset * per_dmin,
                problem,
                moments,
                grid,
            );
            let (scale, min) = (self.scales[j], self.mins[j]);
            let middle = moments[j].q * moments[j].w.recip_or_zero() * self.d * per_dmin;
            for shift in [-1.0, 1.0] {
                let other = grid.whole(scale + scale.like(shift));
                self.accept(
                    j,
                    other,
                    min + (other - scale) * middle,
                    problem,
                    moments,
                    grid,
                );
            }
            let (scale, min) = (self.scales[j], self.mins[j]);
            let per_code = self.dmin * per_d * per_d.like(1.0 / grid.codes);
            for share in [-THIRD, THIRD] {
                let other = grid.whole(min + self.d * scale * per_dmin * min.like(share));
                self.accept(
                    j,
                    scale + (other - min) * per_code,
                    other,
                    problem,
                    moments,
                    grid,
                );
            }
        }
    }

    /// Takes the nearest whole scales for sub-block `j` where they leave less error.
    #[inline(always)]
    fn accept(
        &mut self,
        j: usize,
        scale: Lanes<S>,
        min: Lanes<S>,
        problem: &Problem<S>,
        moments: &mut [Moments<S>; SUBS],
        grid: &AffineGrid,
    ) {
        let (scale, min) = (grid.whole(scale), grid.whole(min));
        let (xs, ws) = problem.sub_block::<SUBS>(j);
        let other = Moments::of(xs, ws, (self.d * scale, self.dmin * min), grid);
        let better = other.error.lt(moments[j].error);
        self.scales[j] = better.select(scale, self.scales[j]);
        self.mins[j] = better.select(min, self.mins[j]);
        moments[j] = moments[j].or_where(better, &other);
    }

    /// With the codes as they are, moves every sub-block to its best whole scales, then `d` and `dmin`
    /// to their weighted least squares.
    #[inline(always)]
    fn descend(
        &mut self,
        problem: &Problem<S>,
        moments: &mut [Moments<S>; SUBS],
        grid: &AffineGrid,
    ) {
        let zero = self.d.like(0.0);
        let (mut dd, mut dm, mut mm, mut rd, mut rm) = (zero, zero, zero, zero, zero);
        for (j, sums) in moments.iter_mut().enumerate() {
            self.descend_sub_block(j, sums, grid);
            let (scale, min) = (self.scales[j], self.mins[j]);
            dd += scale * scale * sums.qq;
            dm += scale * min * sums.q;
            mm += min * min * sums.w;
            rd += scale * sums.rq;
            rm += min * sums.r;
        }
        let determinant = dd * mm - dm * dm;
        let both = determinant.gt(zero);
        let inverse = determinant.recip_or_zero();
        let d = both.select((rd * mm - rm * dm) * inverse, rd * dd.recip_or_zero());
        let dmin = both.select((rd * dm - rm * dd) * inverse, zero);
        self.d = problem.round_to_f16((self.d + d).max(zero));
        self.dmin = problem.round_to_f16((self.dmin + dmin).max(zero));
    }

    /// The best `sc` for each `m` near.
    #[inline(always)]
    fn descend_sub_block(&mut self, j: usize, sums: &mut Moments<S>, grid: &AffineGrid) {
        let (scale, min) = (self.scales[j], self.mins[j]);
        let per_scale = (self.d * sums.qq).recip_or_zero();
        let mut least = sums.error;
        for shift in [0.0, -1.0, 1.0, -2.0, 2.0] {
            let other_min = grid.whole(min + min.like(shift));
            let offset = self.dmin * (other_min - min);
            let other_scale = grid.whole(scale + (sums.rq + offset * sums.q) * per_scale);
            let error = sums.error_moved(self.d * (other_scale - scale), offset);
            let better = error.lt(least);
            least = better.select(error, least);
            self.scales[j] = better.select(other_scale, self.scales[j]);
            self.mins[j] = better.select(other_min, self.mins[j]);
        }
        *sums = sums.moved(
            self.d * (self.scales[j] - scale),
            self.dmin * (self.mins[j] - min),
        );
    }
}

impl AffineGrid {
    /// The nearest `sc` or `m`.
    #[inline(always)]
    pub fn whole<S: Simd>(&self, scale: Lanes<S>) -> Lanes<S> {
        scale
            .max(scale.like(0.0))
            .min(scale.like(self.scales))
            .round()
    }
}

/// The f16 factor whose whole multiples come nearest to some values that are not negative.
#[inline(always)]
fn common_factor<S: Simd, const SUBS: usize>(
    problem: &Problem<S>,
    values: &[Lanes<S>; SUBS],
    weights: &[Lanes<S>; SUBS],
    grid: &AffineGrid,
) -> Lanes<S> {
    let zero = values[0].like(0.0);
    let mut largest = zero;
    for &value in values {
        largest = largest.max(value);
    }
    let (mut best, mut least) = (zero, zero.like(f32::INFINITY));
    for k in 0..grid.factors.tries {
        let reach = zero.like(1.0 / (grid.scales + grid.factors.at(k)));
        let factor = problem.round_to_f16(largest * reach);
        let inverse = factor.recip_or_zero();
        let mut error = zero;
        for (&value, &weight) in values.iter().zip(weights) {
            let r = value - factor * grid.whole(value * inverse);
            error += weight * r * r;
        }
        let better = error.lt(least);
        least = better.select(error, least);
        best = better.select(factor, best);
    }
    best
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;

    const GRID: AffineGrid = AffineGrid {
        codes: 15.0,
        scales: 63.0,
        plain: Sweep::NONE,
        drift: Sweep::NONE,
        factors: Sweep::NONE,
        rounds: 0,
    };

    fn lanes(values: &[f32]) -> Vec<Lanes<Scalar>> {
        values
            .iter()
            .map(|&value| Lanes::splat(Scalar, value))
            .collect()
    }

    fn bits(value: Lanes<Scalar>) -> u32 {
        value.as_slice()[0].to_bits()
    }

    /// 32 weights around `middle`, and what errors count.
    fn sub_block(middle: f32) -> (Vec<f32>, Vec<f32>) {
        let xs = (0..32).map(|i| ((i * 37 % 32) as f32 * 0.7).sin() + middle);
        (
            xs.collect(),
            (0..32).map(|i| 0.1 + (i * 11 % 7) as f32).collect(),
        )
    }

    fn nearest_code(x: f32, offset: f32, inverse: f32) -> f32 {
        ((x + offset) * inverse)
            .clamp(0.0, GRID.codes)
            .round_ties_even()
    }

    #[test]
    fn a_fit_has_the_bits_of_plain_loops() {
        for (middle, offset, fitted_free) in
            [(0.0, 1.1, true), (-2.0, 3.1, true), (1.5, -0.3, false)]
        {
            let (xs, ws) = sub_block(middle);
            let w: f32 = ws.iter().fold(0.0, |sum, w| sum + w);
            let wx = xs.iter().zip(&ws).fold(0.0, |sum, (x, w)| sum + w * x);
            let mean = wx * (1.0 / w);
            let inverse = 6.5;
            let (mut q, mut qq, mut qx) = (0f32, 0f32, 0f32);
            for (x, w) in xs.iter().zip(&ws) {
                let code = nearest_code(*x, offset, inverse);
                q += w * code;
                qq += w * code * code;
                qx += w * (x - mean) * code;
            }
            let center = q * (1.0 / w);
            let stiffness = qq - q * center;
            let free = qx * center > mean * stiffness;
            let (numerator, denominator) = if free {
                (qx, stiffness)
            } else {
                (qx + mean * q, qq)
            };
            let step = numerator * (1.0 / denominator);

            let (xs, ws) = (lanes(&xs), lanes(&ws));
            let range = Range::of(&xs, &ws);
            let wxs: Vec<_> = xs
                .iter()
                .zip(&ws)
                .map(|(&x, &w)| w * (x - range.mean))
                .collect();
            let like = |value| Lanes::splat(Scalar, value);
            let fit = range.fit(&xs, &ws, &wxs, like(offset), like(inverse), &GRID);
            assert_eq!(bits(fit.step), step.to_bits());
            let fitted_offset = if free { step * center - mean } else { 0.0 };
            assert_eq!(bits(fit.offset), fitted_offset.to_bits());
            assert_eq!(free, fitted_free, "both kinds of fit are seen");
        }
    }

    #[test]
    fn moments_foresee_the_error_of_other_scales() {
        let (xs, ws) = sub_block(0.2);
        let (step, offset, more_step, more_offset) = (0.13f32, 0.9f32, 0.01f32, -0.03f32);
        let like = |value| Lanes::splat(Scalar, value);
        let scales = (like(step), like(offset));
        let sums = Moments::of(&lanes(&xs), &lanes(&ws), scales, &GRID);
        let error = |step: f32, offset: f32, inverse: f32, code_offset: f32| -> f64 {
            let errors = xs.iter().zip(&ws).map(|(&x, &w)| {
                let q = nearest_code(x, code_offset, inverse);
                f64::from(w) * f64::from(x + offset - step * q).powi(2)
            });
            errors.sum()
        };
        let (now, then) = (
            error(step, offset, 1.0 / step, offset),
            error(step + more_step, offset + more_offset, 1.0 / step, offset),
        );
        let moved = sums.moved(like(more_step), like(more_offset));
        for (found, expected) in [(sums.error, now), (moved.error, then)] {
            let found = f64::from(found.as_slice()[0]);
            assert!(
                (found / expected - 1.0).abs() < 1e-5,
                "{found}, expected {expected}"
            );
        }
        assert!(then > now, "the test moves away from the optimum");
    }
}
