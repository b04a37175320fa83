//! The search behind Q3_K, Q6_K and IQ4_XS, where a weight is `d sc value(q)`.
//!
//! Enters: a problem. Leaves: the f16 scale `d`, each sub-block's small whole `sc`, and the codes
//! `q`. Knows no block layout.
//!
//! As in the affine search, whole scales are chosen by the error that the stored weights really have,
//! after first fits like ggml's (`make_qx_quants`, `quantize_row_iq4_nl_impl`).

use half::f16;
use pulp::Simd;

use super::{
    lanes::{Lanes, Mask, unload_codes},
    super_block::{Problem, SUPER_BLOCK, Sweep, saturates},
};

/// What tells codebooks apart, but for where they begin and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeValues {
    /// Whole numbers.
    Whole,
    /// The uneven values of IQ4_NL and IQ4_XS.
    Uneven,
    /// E2M1, doubled.
    Floats,
}

/// The values that codes stand for.
pub trait Codebook {
    /// Which they are.
    const VALUES: CodeValues = CodeValues::Whole;
    /// The value of code 0, the one of largest magnitude.
    const FIRST: f32;
    /// The value of the last code, of the other sign.
    const LAST: f32;
    /// How values are rounded to.
    type Nearest: Nearest;
    /// How values are rounded to.
    const NEAREST: Self::Nearest;

    /// The value nearest to `x`.
    #[inline(always)]
    fn nearest<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        Self::NEAREST.nearest(x)
    }

    /// The code of the value nearest to `x`; that value, where no other is told.
    #[inline(always)]
    fn code<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        Self::nearest(x)
    }
}

/// Rounding to the values of a codebook. Codebooks of whole numbers share it, and so share what is compiled around it.
pub trait Nearest: Copy + Send + Sync {
    /// The value nearest to `x`.
    fn nearest<S: Simd>(self, x: Lanes<S>) -> Lanes<S>;
}

/// To whole numbers.
#[derive(Debug, Clone, Copy)]
pub struct NearestWhole {
    /// The least.
    pub first: f32,
    /// The largest.
    pub last: f32,
}

impl Nearest for NearestWhole {
    #[inline(always)]
    fn nearest<S: Simd>(self, x: Lanes<S>) -> Lanes<S> {
        x.max(x.like(self.first)).min(x.like(self.last)).round()
    }
}

/// The whole numbers from `-HALF` to `HALF - 1`.
pub struct Whole<const HALF: i32>;

impl<const HALF: i32> Codebook for Whole<HALF> {
    const FIRST: f32 = -HALF as f32;
    const LAST: f32 = (HALF - 1) as f32;
    type Nearest = NearestWhole;
    const NEAREST: NearestWhole = NearestWhole {
        first: Self::FIRST,
        last: Self::LAST,
    };

    #[inline(always)]
    fn code<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        Self::nearest(x) - x.like(Self::FIRST)
    }
}

/// What tells the symmetric types apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SymmetricGrid {
    /// `sc` runs from its negative to one less.
    pub scales: f32,
    /// First fits: the place of a sub-block's largest weight, less `FIRST`.
    pub first: Sweep,
    /// First fits: the place of a sub-block's largest weight, less `LAST`.
    pub last: Sweep,
    /// First fits around the best so far: relative change of the inverse step.
    pub around: Sweep,
    /// Values of `d`: multiples in the largest step, less `scales`.
    pub factors: Sweep,
    /// How far from its own each sub-block's `sc` is tried.
    pub reach: usize,
    /// How often scales and codes are fitted to each other in the end.
    pub rounds: usize,
}

/// What a symmetric search found, with `SUBS` sub-blocks in a super-block.
pub struct SymmetricSolution<S: Simd, const SUBS: usize> {
    /// In units of the original weights.
    d: Lanes<S>,
    scales: [Lanes<S>; SUBS],
    codes: [Lanes<S>; SUPER_BLOCK],
}

/// One lane of a symmetric solution, as blocks are packed from.
pub struct SymmetricLane<const SUBS: usize> {
    /// Scale of the scales.
    pub d: f16,
    /// `sc` of each sub-block.
    pub scales: [i8; SUBS],
    /// `q` of each weight.
    pub codes: [u8; SUPER_BLOCK],
    /// Whether the f16 scale was cut to the largest f16: 1 or 0.
    pub saturated: u64,
}

impl<S: Simd, const SUBS: usize> SymmetricSolution<S, SUBS> {
    /// One lane.
    #[inline(always)]
    pub fn lane(&self, lane: usize) -> SymmetricLane<SUBS> {
        let d = self.d.as_slice()[lane];
        let mut scales = [0u8; SUBS];
        let mut codes = [0; SUPER_BLOCK];
        unload_codes(&self.scales, lane, &mut scales);
        unload_codes(&self.codes, lane, &mut codes);
        SymmetricLane {
            d: f16::from_f32(d),
            scales: scales.map(u8::cast_signed),
            codes,
            saturated: saturates(d),
        }
    }
}

/// Chooses scales and codes of least weighted squared error.
#[inline(always)]
pub fn search<S: Simd, C: Codebook, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &SymmetricGrid,
) -> SymmetricSolution<S, SUBS> {
    let best = choose_scales::<S, C, SUBS>(simd, problem, grid);
    let mut codes = problem.x;
    for (j, codes) in codes.chunks_exact_mut(SUPER_BLOCK / SUBS).enumerate() {
        let inverse = best.of(j).recip_or_zero();
        for x in codes {
            *x = C::code(*x * inverse);
        }
    }
    SymmetricSolution {
        d: problem.in_original_units(best.d),
        scales: best.scales,
        codes,
    }
}

/// The f16 factor of scales of least weighted squared error, in units of the original weights.
#[inline(always)]
pub fn factor<S: Simd, C: Codebook, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &SymmetricGrid,
) -> Lanes<S> {
    problem.in_original_units(choose_scales::<S, C, SUBS>(simd, problem, grid).d)
}

/// The step of one sub-block of least weighted squared error, with nothing rounded but the codes.
#[inline(always)]
pub fn fit_sub_block<S: Simd, C: Codebook>(
    xs: &[Lanes<S>],
    ws: &[Lanes<S>],
    grid: &SymmetricGrid,
) -> Lanes<S> {
    Fit::best::<C>(xs, ws, grid).step
}

#[inline(always)]
fn choose_scales<S: Simd, C: Codebook, const SUBS: usize>(
    simd: S,
    problem: &Problem<S>,
    grid: &SymmetricGrid,
) -> Scales<S, SUBS> {
    let zero = Lanes::zero(simd);
    let (mut steps, mut stiffness) = ([zero; SUBS], [zero; SUBS]);
    for j in 0..SUBS {
        let (xs, ws) = problem.sub_block::<SUBS>(j);
        let fit = Fit::best::<C>(xs, ws, grid);
        (steps[j], stiffness[j]) = (fit.step, fit.stiffness);
    }
    let mut scales = Scales::nearest(problem, &steps, &stiffness, grid);
    let mut best = Scales::by_extremes::<C>(simd, problem, grid);
    let (_, mut least) = best.moments::<C>(simd, problem);
    for round in 0..=grid.rounds {
        let (mut moments, error) = scales.moments::<C>(simd, problem);
        let better = error.lt(least);
        least = better.select(error, least);
        best = best.or_where(better, &scales);
        if round == 0 {
            scales.look_around::<C>(problem, &mut moments, grid);
        }
        if round < grid.rounds {
            scales.descend(problem, &moments, grid);
        }
    }
    best
}

/// A sub-block stored as `step value(q)` with any step.
#[derive(Clone, Copy)]
pub struct Fit<S: Simd> {
    /// The step.
    pub step: Lanes<S>,
    /// How much of the weighted energy it explains.
    pub gain: Lanes<S>,
    /// Sum of weight value^2: how much an error of the step costs.
    pub stiffness: Lanes<S>,
}

impl<S: Simd> Fit<S> {
    /// The best of all steps tried.
    #[inline(always)]
    fn best<C: Codebook>(xs: &[Lanes<S>], ws: &[Lanes<S>], grid: &SymmetricGrid) -> Self {
        let zero = xs[0].like(0.0);
        let per_largest = largest(xs).recip_or_zero();
        let mut best = Self {
            step: zero,
            gain: zero,
            stiffness: zero,
        };
        for (end, sweep) in [(C::FIRST, &grid.first), (C::LAST, &grid.last)] {
            for k in 0..sweep.tries {
                let fit = Self::to::<C>(xs, ws, per_largest * zero.like(end + sweep.at(k)));
                best = best.or_where(fit.gain.gt(best.gain), &fit);
            }
        }
        for k in 0..grid.around.tries {
            let inverse = best.step.recip_or_zero() * zero.like(1.0 + grid.around.at(k));
            let fit = Self::to::<C>(xs, ws, inverse);
            best = best.or_where(fit.gain.gt(best.gain), &fit);
        }
        best
    }

    /// Rounds to values and fits the step to them by weighted least squares.
    #[inline(always)]
    pub fn to<C: Codebook>(xs: &[Lanes<S>], ws: &[Lanes<S>], inverse: Lanes<S>) -> Self {
        let zero = inverse.like(0.0);
        let (mut qq, mut qx) = (zero, zero);
        for (&x, &w) in xs.iter().zip(ws) {
            let q = C::nearest(x * inverse);
            let wq = w * q;
            qq += wq * q;
            qx += wq * x;
        }
        let step = qx * qq.recip_or_zero();
        Self {
            step,
            gain: step * qx,
            stiffness: qq,
        }
    }

    #[inline(always)]
    fn or_where(self, mask: Mask<S>, other: &Self) -> Self {
        Self {
            step: mask.select(other.step, self.step),
            gain: mask.select(other.gain, self.gain),
            stiffness: mask.select(other.stiffness, self.stiffness),
        }
    }
}

/// Scales as far as they are chosen, in units of the problem.
#[derive(Clone, Copy)]
struct Scales<S: Simd, const SUBS: usize> {
    d: Lanes<S>,
    scales: [Lanes<S>; SUBS],
}

/// Sums over a sub-block whose weights `x` are stored as `step value`, with `r` what is left.
#[derive(Clone, Copy)]
struct Moments<S: Simd> {
    /// Sum of weight r^2.
    error: Lanes<S>,
    /// Sum of weight r value.
    rq: Lanes<S>,
    /// Sum of weight value^2.
    qq: Lanes<S>,
}

impl<S: Simd> Moments<S> {
    #[inline(always)]
    fn zero(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self {
            error: zero,
            rq: zero,
            qq: zero,
        }
    }

    #[inline(always)]
    fn of<C: Codebook>(xs: &[Lanes<S>], ws: &[Lanes<S>], step: Lanes<S>) -> Self {
        let zero = step.like(0.0);
        let inverse = step.recip_or_zero();
        let mut sums = Self {
            error: zero,
            rq: zero,
            qq: zero,
        };
        for (&x, &w) in xs.iter().zip(ws) {
            let q = C::nearest(x * inverse);
            let r = x - step * q;
            let wr = w * r;
            sums.error += wr * r;
            sums.rq += wr * q;
            sums.qq += w * q * q;
        }
        sums
    }

    #[inline(always)]
    fn or_where(self, mask: Mask<S>, other: &Self) -> Self {
        Self {
            error: mask.select(other.error, self.error),
            rq: mask.select(other.rq, self.rq),
            qq: mask.select(other.qq, self.qq),
        }
    }
}

impl<S: Simd, const SUBS: usize> Scales<S, SUBS> {
    #[inline(always)]
    fn of(&self, j: usize) -> Lanes<S> {
        self.d * self.scales[j]
    }

    #[inline(always)]
    fn or_where(mut self, mask: Mask<S>, other: &Self) -> Self {
        self.d = mask.select(other.d, self.d);
        for j in 0..SUBS {
            self.scales[j] = mask.select(other.scales[j], self.scales[j]);
        }
        self
    }

    /// What plain rounding would take: each sub-block's largest weight at the first value, the largest
    /// step at the first scale.
    #[inline(always)]
    fn by_extremes<C: Codebook>(simd: S, problem: &Problem<S>, grid: &SymmetricGrid) -> Self {
        let mut scales = [Lanes::zero(simd); SUBS];
        for (j, step) in scales.iter_mut().enumerate() {
            *step = largest(problem.sub_block::<SUBS>(j).0) * step.like(1.0 / C::FIRST);
        }
        let d = problem.round_to_f16(largest(&scales) * Lanes::splat(simd, -1.0 / grid.scales));
        let inverse = d.recip_or_zero();
        for scale in &mut scales {
            *scale = grid.whole(*scale * inverse);
        }
        Self { d, scales }
    }

    /// What the scales leave of each sub-block, and the weighted squared error of the super-block.
    #[inline(always)]
    fn moments<C: Codebook>(
        &self,
        simd: S,
        problem: &Problem<S>,
    ) -> ([Moments<S>; SUBS], Lanes<S>) {
        let mut moments = [Moments::zero(simd); SUBS];
        let mut error = Lanes::zero(simd);
        for (j, sums) in moments.iter_mut().enumerate() {
            let (xs, ws) = problem.sub_block::<SUBS>(j);
            *sums = Moments::of::<C>(xs, ws, self.of(j));
            error += sums.error;
        }
        (moments, error)
    }

    /// The f16 factor whose whole multiples come nearest to the steps.
    #[inline(always)]
    fn nearest(
        problem: &Problem<S>,
        steps: &[Lanes<S>; SUBS],
        stiffness: &[Lanes<S>; SUBS],
        grid: &SymmetricGrid,
    ) -> Self {
        let zero = steps[0].like(0.0);
        let largest = largest(steps);
        let (mut best, mut least) = (zero, zero.like(f32::INFINITY));
        for end in [-grid.scales, grid.scales - 1.0] {
            for k in 0..grid.factors.tries {
                let reach = end * (1.0 + grid.factors.at(k) / grid.scales);
                let factor = problem.round_to_f16(largest * zero.like(1.0 / reach));
                let inverse = factor.recip_or_zero();
                let mut error = zero;
                for (&step, &stiffness) in steps.iter().zip(stiffness) {
                    let r = step - factor * grid.whole(step * inverse);
                    error += stiffness * r * r;
                }
                let better = error.lt(least);
                least = better.select(error, least);
                best = better.select(factor, best);
            }
        }
        let inverse = best.recip_or_zero();
        let mut scales = *steps;
        for scale in &mut scales {
            *scale = grid.whole(*scale * inverse);
        }
        Self { d: best, scales }
    }

    /// Tries the scales next to each sub-block's own, with codes chosen anew.
    #[inline(always)]
    fn look_around<C: Codebook>(
        &mut self,
        problem: &Problem<S>,
        moments: &mut [Moments<S>; SUBS],
        grid: &SymmetricGrid,
    ) {
        for (j, sums) in moments.iter_mut().enumerate() {
            let (xs, ws) = problem.sub_block::<SUBS>(j);
            let own = self.scales[j];
            for k in 1..=grid.reach {
                for shift in [-(k as f32), k as f32] {
                    let scale = grid.whole(own + own.like(shift));
                    let other = Moments::of::<C>(xs, ws, self.d * scale);
                    let better = other.error.lt(sums.error);
                    self.scales[j] = better.select(scale, self.scales[j]);
                    *sums = sums.or_where(better, &other);
                }
            }
        }
    }

    /// With the codes as they are, moves every sub-block to its best whole scale, then `d` to its
    /// weighted least squares.
    #[inline(always)]
    fn descend(
        &mut self,
        problem: &Problem<S>,
        moments: &[Moments<S>; SUBS],
        grid: &SymmetricGrid,
    ) {
        let zero = self.d.like(0.0);
        let (mut dd, mut rd) = (zero, zero);
        for (scale, sums) in self.scales.iter_mut().zip(moments) {
            let moved = grid.whole(*scale + sums.rq * (self.d * sums.qq).recip_or_zero());
            let rq = sums.rq - self.d * (moved - *scale) * sums.qq;
            dd += moved * moved * sums.qq;
            rd += moved * rq;
            *scale = moved;
        }
        self.d = problem.round_to_f16(self.d + rd * dd.recip_or_zero());
    }
}

impl SymmetricGrid {
    /// The nearest scale.
    #[inline(always)]
    pub fn whole<S: Simd>(&self, scale: Lanes<S>) -> Lanes<S> {
        scale
            .max(scale.like(-self.scales))
            .min(scale.like(self.scales - 1.0))
            .round()
    }
}

/// The value of largest magnitude, the first of equals.
#[inline(always)]
pub fn largest<S: Simd>(values: &[Lanes<S>]) -> Lanes<S> {
    let mut largest = values[0];
    for &value in values {
        largest = value.abs().gt(largest.abs()).select(value, largest);
    }
    largest
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::{super::iq4_xs::Iq4Values, *};
    use crate::formats::block::IQ4_NL_VALUES;

    fn lane(value: f32) -> Lanes<Scalar> {
        Lanes::splat(Scalar, value)
    }

    fn value(lanes: Lanes<Scalar>) -> f32 {
        lanes.as_slice()[0]
    }

    #[test]
    fn the_nearest_value_is_nearest() {
        fn check<C: Codebook>(values: &[f32]) {
            for i in -300..=300 {
                let x = values[0] * i as f32 / 251.0;
                let nearest = value(C::nearest(lane(x)));
                let code = value(C::code(lane(x))) as usize;
                let least = values
                    .iter()
                    .map(|v| (v - x).abs())
                    .fold(f32::MAX, f32::min);
                assert_eq!((nearest - x).abs(), least, "{x}");
                assert_eq!(values[code], nearest, "{x}");
            }
            assert_eq!((C::FIRST, C::LAST), (values[0], values[values.len() - 1]));
        }
        let whole = |half: i32| -> Vec<f32> { (-half..half).map(|v| v as f32).collect() };
        check::<Whole<4>>(&whole(4));
        check::<Whole<32>>(&whole(32));
        check::<Iq4Values>(&IQ4_NL_VALUES);
    }

    #[test]
    fn sums_have_the_bits_of_plain_loops() {
        let xs: Vec<f32> = (0..16).map(|i| (i as f32 * 1.7).sin()).collect();
        let ws: Vec<f32> = (0..16).map(|i| 0.1 + (i * 11 % 7) as f32).collect();
        let (mut error, mut rq, mut qq, mut qx) = (0f32, 0f32, 0f32, 0f32);
        let step = -0.2f32;
        for (x, w) in xs.iter().zip(&ws) {
            let q = (x * (1.0 / step)).clamp(-4.0, 3.0).round_ties_even();
            let r = x - step * q;
            error += w * r * r;
            rq += w * r * q;
            qq += w * q * q;
            qx += w * q * x;
        }
        let lanes = |values: &[f32]| -> Vec<_> { values.iter().map(|&v| lane(v)).collect() };
        let (xs, ws) = (lanes(&xs), lanes(&ws));
        let sums = Moments::of::<Whole<4>>(&xs, &ws, lane(step));
        assert_eq!(
            (value(sums.error), value(sums.rq), value(sums.qq)),
            (error, rq, qq)
        );
        let fit = Fit::to::<Whole<4>>(&xs, &ws, lane(1.0 / step));
        assert_eq!(
            (value(fit.step), value(fit.stiffness)),
            (qx * (1.0 / qq), qq)
        );
    }
}
