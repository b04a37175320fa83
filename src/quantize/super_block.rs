//! Super-blocks of 256 weights, one per lane, on their way into a search and out of it.
//!
//! Enters: rows and column importance. Leaves: whole packed super-blocks, the same bytes however the
//! rows are batched. Knows no type: what a search minimizes and packs is the type's business.

use bytemuck::Pod;
use pulp::{Arch, Simd, WithSimd};

use super::{
    ScaleOverflow,
    lanes::{F16_MAX, Lanes, load},
};

/// Weights in a super-block (ggml `QK_K`).
pub const SUPER_BLOCK: usize = 256;

/// A super-block per lane, ready for a search.
pub struct Problem<S: Simd> {
    /// Weights divided by `unit`: every magnitude below 4, nothing NaN.
    pub x: [Lanes<S>; SUPER_BLOCK],
    /// What a squared error counts: at least zero, all of a size that squares and sums without overflow.
    pub weight: [Lanes<S>; SUPER_BLOCK],
    /// A power of two, the exponent of the largest magnitude.
    unit: Lanes<S>,
    /// 1 where the super-block held a NaN or an infinity, which the search sees as zero.
    nonfinite: Lanes<S>,
}

/// How much a squared error counts when there is no importance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighting {
    /// `|x|`.
    Magnitude,
    /// `|x|` plus the root mean square of the 32 weights around.
    MagnitudePlusRms,
    /// `x^2`.
    Square,
}

/// How much a squared error counts, given the importance of its column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ImportanceWeighting {
    /// The importance alone.
    Plain,
    /// The importance times `sqrt(factor * mean of x^2 over the super-block + x^2)`.
    Energy {
        /// Share of the mean.
        factor: f32,
    },
}

/// Evenly spaced values to try.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sweep {
    /// The first one.
    pub first: f32,
    /// From one to the next.
    pub step: f32,
    /// How many.
    pub tries: usize,
}

impl Sweep {
    /// No values.
    pub const NONE: Self = Self::new(0.0, 0.0, 0);

    /// `tries` values from `first` on, `step` apart.
    pub const fn new(first: f32, step: f32, tries: usize) -> Self {
        Self { first, step, tries }
    }

    /// Value `k`.
    #[inline(always)]
    pub fn at(&self, k: usize) -> f32 {
        self.first + self.step * k as f32
    }
}

/// A type made of super-blocks.
pub trait SuperBlockType {
    /// The packed super-block.
    type Block: Pod;
    /// Weights of errors without importance (ggml `quantize_row_*_ref`).
    const WEIGHTING: Weighting;
    /// Weights of errors with importance (ggml `quantize_row_*_impl`).
    const IMPORTANCE_WEIGHTING: ImportanceWeighting;

    /// Scales and codes of every lane.
    type Solution<S: Simd>;

    /// Chooses scales and codes.
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S>;

    /// Packs one lane; also how many of its f16 scales were cut to the largest f16.
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> (Self::Block, u64);
}

/// 1 for a scale that had to be cut to the largest f16, else 0.
#[inline(always)]
pub fn saturates(scale: f32) -> u64 {
    u64::from(scale.abs() >= F16_MAX)
}

/// Quantizes rows of whole super-blocks; every super-block gives the same bytes alone and in company.
///
/// `rows`: row-major, `row_len` a multiple of 256; `importance`: [`row_len`], at least zero; `out`: one
/// block for every 256 weights. Counted in the result: f16 scales cut to the largest f16, and
/// super-blocks with a NaN or an infinity, which is stored as if it were zero.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn quantize<T: SuperBlockType>(
    rows: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    Arch::new().dispatch(Run::<T>::new(rows, row_len, importance, out))
}

/// The quantization of some rows, for any CPU.
pub(super) struct Run<'a, T: SuperBlockType> {
    rows: &'a [f32],
    row_len: usize,
    importance: Option<&'a [f32]>,
    blocks: &'a mut [T::Block],
}

impl<'a, T: SuperBlockType> Run<'a, T> {
    pub(super) fn new(
        rows: &'a [f32],
        row_len: usize,
        importance: Option<&'a [f32]>,
        out: &'a mut [u8],
    ) -> Self {
        assert!(
            row_len > 0
                && row_len.is_multiple_of(SUPER_BLOCK)
                && rows.len().is_multiple_of(row_len),
            "rows of whole super-blocks"
        );
        assert!(
            importance.is_none_or(|values| values.len() == row_len),
            "an importance per column"
        );
        let blocks: &mut [T::Block] = bytemuck::cast_slice_mut(out);
        assert_eq!(
            blocks.len(),
            rows.len() / SUPER_BLOCK,
            "a block per 256 weights"
        );
        Self {
            rows,
            row_len,
            importance,
            blocks,
        }
    }
}

impl<T: SuperBlockType> WithSimd for Run<'_, T> {
    type Output = ScaleOverflow;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> ScaleOverflow {
        let lanes = Lanes::<S>::COUNT;
        let mut problem = Problem::empty(simd);
        let mut overflow = ScaleOverflow(0);
        let batches = self
            .rows
            .chunks(lanes * SUPER_BLOCK)
            .zip(self.blocks.chunks_mut(lanes));
        let mut column = 0;
        for (rows, blocks) in batches {
            problem.load(simd, rows);
            match self.importance {
                None => problem.weigh::<T>(),
                Some(importance) => {
                    let starts =
                        (0..blocks.len()).map(|b| (column + b * SUPER_BLOCK) % self.row_len);
                    let columns = starts.map(|start| &importance[start..start + SUPER_BLOCK]);
                    problem.weigh_by_importance::<T>(simd, columns);
                }
            }
            let solution = T::search(simd, &problem);
            for (lane, block) in blocks.iter_mut().enumerate() {
                let saturated;
                (*block, saturated) = T::pack(&solution, lane);
                overflow.0 += saturated + u64::from(problem.nonfinite.as_slice()[lane] != 0.0);
            }
            column = (column + lanes * SUPER_BLOCK) % self.row_len;
        }
        overflow
    }
}

impl<S: Simd> Problem<S> {
    #[inline(always)]
    fn empty(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self {
            x: [zero; SUPER_BLOCK],
            weight: [zero; SUPER_BLOCK],
            unit: zero,
            nonfinite: zero,
        }
    }

    /// Super-blocks that are in lanes already, one a lane; an error in each column counts `columns`.
    #[inline(always)]
    pub fn of_lanes(simd: S, x: &[Lanes<S>], columns: &[f32]) -> Self {
        let mut problem = Self::empty(simd);
        problem.x.copy_from_slice(x);
        problem.normalize();
        for (weight, column) in problem.weight.iter_mut().zip(columns) {
            *weight = Lanes::splat(simd, *column);
        }
        problem
    }

    /// Weights and error weights of sub-block `j` of `SUBS`.
    #[inline(always)]
    pub fn sub_block<const SUBS: usize>(&self, j: usize) -> (&[Lanes<S>], &[Lanes<S>]) {
        let len = SUPER_BLOCK / SUBS;
        (&self.x[j * len..][..len], &self.weight[j * len..][..len])
    }

    /// The nearest f16 to a scale of `x`, in the same units.
    #[inline(always)]
    pub fn round_to_f16(&self, scale: Lanes<S>) -> Lanes<S> {
        (scale * self.unit).round_to_f16() / self.unit
    }

    /// A scale of `x` in units of the original weights.
    #[inline(always)]
    pub fn in_original_units(&self, scale: Lanes<S>) -> Lanes<S> {
        scale * self.unit
    }

    /// Brings super-blocks to one size, so that no square overflows or vanishes.
    #[inline(always)]
    fn load(&mut self, simd: S, rows: &[f32]) {
        load(simd, &mut self.x, rows.chunks_exact(SUPER_BLOCK));
        self.normalize();
    }

    #[inline(always)]
    fn normalize(&mut self) {
        let zero = self.unit.like(0.0);
        let mut largest = zero;
        self.nonfinite = zero;
        for x in &mut self.x {
            let finite = x.abs().lt(x.like(f32::INFINITY));
            self.nonfinite = finite.select(self.nonfinite, x.like(1.0));
            *x = finite.select(*x, zero);
            largest = largest.max(x.abs());
        }
        self.unit = power_of_two_of(largest);
        let inverse = self.unit.like(1.0) / self.unit;
        for x in &mut self.x {
            *x = *x * inverse;
        }
    }

    #[inline(always)]
    fn weigh<T: SuperBlockType>(&mut self) {
        match T::WEIGHTING {
            Weighting::Magnitude => {
                for (weight, x) in self.weight.iter_mut().zip(&self.x) {
                    *weight = x.abs();
                }
            }
            Weighting::Square => {
                for (weight, x) in self.weight.iter_mut().zip(&self.x) {
                    *weight = *x * *x;
                }
            }
            Weighting::MagnitudePlusRms => {
                for (weights, xs) in self
                    .weight
                    .chunks_exact_mut(32)
                    .zip(self.x.chunks_exact(32))
                {
                    let rms = mean_square(xs).sqrt();
                    for (weight, x) in weights.iter_mut().zip(xs) {
                        *weight = rms + x.abs();
                    }
                }
            }
        }
    }

    /// Columns that never mattered get a millionth of the largest importance, so that they stay sane.
    #[inline(always)]
    fn weigh_by_importance<'a, T: SuperBlockType>(
        &mut self,
        simd: S,
        columns: impl IntoIterator<Item = &'a [f32]>,
    ) {
        load(simd, &mut self.weight, columns);
        let zero = Lanes::zero(simd);
        let mut largest = zero;
        for weight in &mut self.weight {
            *weight = weight
                .gt(zero)
                .select(*weight, zero)
                .min(zero.like(f32::MAX));
            largest = largest.max(*weight);
        }
        let inverse = zero.like(1.0) / power_of_two_of(largest);
        let one = zero.like(1.0);
        let floor = largest
            .gt(zero)
            .select(largest * inverse * one.like(1e-6), one);
        let energy = match T::IMPORTANCE_WEIGHTING {
            ImportanceWeighting::Plain => None,
            ImportanceWeighting::Energy { factor } => {
                Some(mean_square(&self.x) * zero.like(factor))
            }
        };
        for (weight, &x) in self.weight.iter_mut().zip(&self.x) {
            let importance = (*weight * inverse).max(floor);
            *weight = match energy {
                None => importance,
                Some(energy) => importance * (energy + x * x).sqrt(),
            };
        }
    }
}

/// The power of two in the exponent, kept where it and its inverse are normal; 1 for 0.
#[inline(always)]
pub fn power_of_two_of<S: Simd>(magnitude: Lanes<S>) -> Lanes<S> {
    let one = magnitude.like(1.0);
    let clamped = magnitude
        .power_of_two()
        .max(one.like(2f32.powi(-126)))
        .min(one.like(2f32.powi(126)));
    magnitude.gt(magnitude.like(0.0)).select(clamped, one)
}

/// The mean of the squares.
#[inline(always)]
pub fn mean_square<S: Simd>(xs: &[Lanes<S>]) -> Lanes<S> {
    let mut sum = xs[0].like(0.0);
    for &x in xs {
        sum += x * x;
    }
    sum * sum.like(1.0 / xs.len() as f32)
}

#[cfg(test)]
mod tests {
    use half::f16;
    use pulp::{Scalar, Simd};

    use super::super::{
        iq4_xs::IQ4_XS, q2_k::Q2_K, q3_k::Q3_K, q4_k::Q4_K, q5_k::Q5_K, q6_k::Q6_K, quantize_rows,
    };
    use super::*;
    use crate::formats::{
        GgmlType,
        block::{IQ4_NL_VALUES, dequantize},
    };

    const TYPES: [GgmlType; 6] = [
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_XS,
    ];
    const ROW_LEN: usize = 512;

    /// Even numbers in -1.0..1.0, the same on every machine.
    fn uniform(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Rows that searches meet or had better survive, with a name each.
    fn samples() -> Vec<(&'static str, Vec<f32>)> {
        let even = uniform(4 * ROW_LEN, 1);
        let bell: Vec<f32> = uniform(12 * ROW_LEN, 2)
            .chunks(3)
            .map(|c| c.iter().sum())
            .collect();
        let mut outlier = bell.clone();
        outlier[700] = 300.0;
        let sizes = bell
            .iter()
            .enumerate()
            .map(|(i, x)| x * 10f32.powi((i / 32 % 8) as i32 - 4));
        vec![
            ("zeros", vec![0.0; 2 * ROW_LEN]),
            ("ones", vec![1.0; 2 * ROW_LEN]),
            ("minus a third", vec![-1.0 / 3.0; 2 * ROW_LEN]),
            ("positive", even.iter().map(|x| x.abs() + 2.0).collect()),
            ("heavy tails", bell.iter().map(|x| x * x * x).collect()),
            ("many sizes", sizes.collect()),
            ("below every f16", bell.iter().map(|x| x * 1e-30).collect()),
            ("small", bell.iter().map(|x| x * 1e-3).collect()),
            ("single outlier", outlier),
            ("even", even),
            ("bell", bell),
        ]
    }

    fn importance() -> Vec<f32> {
        let mut importance: Vec<f32> = uniform(ROW_LEN, 3).iter().map(|x| x * x * 100.0).collect();
        importance[40..80].fill(0.0);
        importance
    }

    fn bytes_of(ty: GgmlType, rows: &[f32], importance: Option<&[f32]>) -> (Vec<u8>, u64) {
        let mut out = vec![0; ty.bytes_for(rows.len() as u64).unwrap() as usize];
        let overflow = quantize_rows(ty, ROW_LEN, rows, importance, &mut out);
        (out, overflow.0)
    }

    fn stored(ty: GgmlType, rows: &[f32], importance: Option<&[f32]>) -> (Vec<f32>, u64) {
        let (bytes, overflow) = bytes_of(ty, rows, importance);
        let mut values = vec![0.0; rows.len()];
        dequantize(ty, &bytes, &mut values).unwrap();
        (values, overflow)
    }

    /// Calls `check(type, name of the rows, rows, importance)` for everything.
    fn for_all(check: impl Fn(GgmlType, &str, &[f32], Option<&[f32]>)) {
        let importance = importance();
        for ty in TYPES {
            for (name, rows) in samples() {
                check(ty, name, &rows, None);
                check(ty, name, &rows, Some(&importance));
            }
        }
    }

    #[test]
    fn one_lane_and_eight_give_the_same_bytes() {
        fn check<T: SuperBlockType>(context: &str, rows: &[f32], importance: Option<&[f32]>) {
            let bytes = rows.len() / SUPER_BLOCK * size_of::<T::Block>();
            let mut expected = vec![0; bytes];
            let _ = quantize::<T>(rows, ROW_LEN, importance, &mut expected);
            let mut out = vec![0; bytes];
            let _ = Scalar.vectorize(Run::<T>::new(rows, ROW_LEN, importance, &mut out));
            assert!(out == expected, "one lane, {context}");
            #[cfg(target_arch = "x86_64")]
            if let Some(avx2) = pulp::x86::V3::try_new() {
                out.fill(0);
                let _ = Simd::vectorize(avx2, Run::<T>::new(rows, ROW_LEN, importance, &mut out));
                assert!(out == expected, "eight lanes, {context}");
            }
        }
        for_all(|ty, name, rows, importance| {
            let context = format!("{ty}, {name}, importance: {}", importance.is_some());
            let check = match ty {
                GgmlType::Q2_K => check::<Q2_K>,
                GgmlType::Q3_K => check::<Q3_K>,
                GgmlType::Q4_K => check::<Q4_K>,
                GgmlType::Q5_K => check::<Q5_K>,
                GgmlType::Q6_K => check::<Q6_K>,
                _ => check::<IQ4_XS>,
            };
            check(&context, rows, importance);
        });
    }

    #[test]
    fn a_row_alone_gives_the_same_bytes() {
        for_all(|ty, name, rows, importance| {
            let (expected, _) = bytes_of(ty, rows, importance);
            let alone = rows
                .chunks(ROW_LEN)
                .flat_map(|row| bytes_of(ty, row, importance).0);
            assert!(
                alone.eq(expected),
                "{ty}, {name}, importance: {}",
                importance.is_some()
            );
        });
    }

    #[test]
    fn zeros_stay_zero() {
        for ty in TYPES {
            assert_eq!(
                stored(ty, &[0.0; ROW_LEN], None),
                (vec![0.0; ROW_LEN], 0),
                "{ty}"
            );
            let nothing_matters = [0.0; ROW_LEN];
            let (values, _) = stored(ty, &[0.5; ROW_LEN], Some(&nothing_matters));
            assert!(
                values.iter().all(|value| (value - 0.5).abs() < 0.05),
                "{ty}"
            );
        }
    }

    /// What anybody would store: steps and offsets from the extremes, rounded to whole multiples of the
    /// largest one's share, and the nearest codes.
    fn plainly_rounded(ty: GgmlType, rows: &[f32]) -> Vec<f32> {
        let block = |block| match ty {
            GgmlType::Q2_K => affine_by_extremes(16, 3.0, 15.0, block),
            GgmlType::Q4_K => affine_by_extremes(32, 15.0, 63.0, block),
            GgmlType::Q5_K => affine_by_extremes(32, 31.0, 63.0, block),
            GgmlType::Q3_K => symmetric_by_extremes(16, &whole(4), 32.0, block),
            GgmlType::Q6_K => symmetric_by_extremes(16, &whole(32), 128.0, block),
            _ => symmetric_by_extremes(32, &IQ4_NL_VALUES, 32.0, block),
        };
        rows.chunks(SUPER_BLOCK).flat_map(block).collect()
    }

    fn whole(half: i32) -> Vec<f32> {
        (-half..half).map(|value| value as f32).collect()
    }

    /// Never zero.
    fn to_f16(scale: f32) -> f32 {
        let nearest = f16::from_f32(scale).to_f32();
        if nearest == 0.0 {
            f32::MIN_POSITIVE
        } else {
            nearest
        }
    }

    fn affine_by_extremes(len: usize, codes: f32, scales: f32, block: &[f32]) -> Vec<f32> {
        let lows = block
            .chunks(len)
            .map(|sub| sub.iter().fold(0f32, |low, &x| low.min(x)));
        let steps = block
            .chunks(len)
            .zip(lows.clone())
            .map(|(sub, low)| (sub.iter().fold(0f32, |high, &x| high.max(x)) - low) / codes);
        let d = to_f16(steps.clone().fold(f32::MIN_POSITIVE, f32::max) / scales);
        let deepest = lows
            .clone()
            .map(|low| -low)
            .fold(f32::MIN_POSITIVE, f32::max);
        let dmin = to_f16(deepest / scales);
        let subs = block
            .chunks(len)
            .zip(steps.zip(lows))
            .flat_map(|(sub, (step, low))| {
                let (step, offset) = ((step / d).round() * d, (-low / dmin).round() * dmin);
                let per_step = if step == 0.0 { 0.0 } else { 1.0 / step };
                let code = move |x: f32| ((x + offset) * per_step).round().clamp(0.0, codes);
                sub.iter().map(move |&x| code(x) * step - offset)
            });
        subs.collect()
    }

    fn symmetric_by_extremes(len: usize, values: &[f32], scales: f32, block: &[f32]) -> Vec<f32> {
        let larger = |a: f32, b: f32| if b.abs() > a.abs() { b } else { a };
        let steps = block
            .chunks(len)
            .map(|sub| sub.iter().copied().fold(0.0, larger) / values[0]);
        let d = to_f16(larger(f32::MIN_POSITIVE, steps.clone().fold(0.0, larger)) / -scales);
        let subs = block.chunks(len).zip(steps).flat_map(|(sub, step)| {
            let step = (step / d).round().min(scales - 1.0) * d;
            let nearest = move |x: f32| {
                let distance = |value: &f32| (value * step - x).abs();
                let pick = values
                    .iter()
                    .min_by(|a, b| distance(a).total_cmp(&distance(b)));
                pick.unwrap() * step
            };
            sub.iter().map(move |&x| nearest(x))
        });
        subs.collect()
    }

    /// With the weights of the type's search.
    fn weighted_error(
        ty: GgmlType,
        rows: &[f32],
        stored: &[f32],
        importance: Option<&[f32]>,
    ) -> f64 {
        let mean_square =
            |xs: &[f32]| xs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / xs.len() as f64;
        let weight = |i: usize| {
            let x = f64::from(rows[i]);
            let energy = mean_square(&rows[i / 256 * 256..][..256]);
            match (
                importance.map(|importance| f64::from(importance[i % ROW_LEN])),
                ty,
            ) {
                (Some(importance), GgmlType::Q6_K) => importance,
                (Some(importance), GgmlType::Q2_K) => importance * (energy + x * x).sqrt(),
                (Some(importance), _) => importance * (2.0 * energy + x * x).sqrt(),
                (None, GgmlType::Q2_K) => x.abs(),
                (None, GgmlType::Q4_K | GgmlType::Q5_K) => {
                    x.abs() + mean_square(&rows[i / 32 * 32..][..32]).sqrt()
                }
                (None, _) => x * x,
            }
        };
        let square = |i: usize| (f64::from(stored[i]) - f64::from(rows[i])).powi(2);
        (0..rows.len()).map(|i| weight(i) * square(i)).sum()
    }

    #[test]
    fn the_error_is_not_above_plain_rounding() {
        for_all(|ty, name, rows, importance| {
            let zeros = vec![0.0; rows.len()];
            let below_f16 = name == "below every f16";
            let (values, overflow) = stored(ty, rows, importance);
            let ours = weighted_error(ty, rows, &values, importance);
            let plain = weighted_error(ty, rows, &plainly_rounded(ty, rows), importance);
            assert_eq!(overflow, 0, "{ty}, {name}");
            assert!(values.iter().all(|value| value.is_finite()), "{ty}, {name}");
            // A constant ties between codes, of which only some have an exact f16 step.
            let f16_rounding = 2f64.powi(-22) * weighted_error(ty, rows, &zeros, importance);
            assert!(
                below_f16 || ours <= plain + f16_rounding,
                "{ty}, {name}, importance: {}: {ours:e}, plain {plain:e}",
                importance.is_some()
            );
        });
    }

    #[test]
    fn what_is_not_finite_is_counted_and_harms_only_itself() {
        for ty in TYPES {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut rows = uniform(2 * ROW_LEN, 5);
                rows[300] = 0.0;
                let (expected, _) = stored(ty, &rows, None);
                rows[300] = bad;
                assert_eq!(stored(ty, &rows, None), (expected, 1), "{ty}, {bad}");
            }
            let mut importance = importance();
            importance[3..6].copy_from_slice(&[f32::NAN, f32::INFINITY, -1.0]);
            let (values, _) = stored(ty, &uniform(ROW_LEN, 6), Some(&importance));
            assert!(values.iter().all(|value| value.is_finite()), "{ty}");
        }
    }

    #[test]
    fn scales_beyond_f16_are_counted_and_cut() {
        for ty in TYPES {
            for size in [1e12, f32::MAX] {
                let mut rows = uniform(2 * ROW_LEN, 7);
                rows[256..512].iter_mut().for_each(|x| *x *= size);
                let (values, overflow) = stored(ty, &rows, None);
                assert!((1..=2).contains(&overflow), "{ty}, {size}: {overflow}");
                assert!(values.iter().all(|value| value.is_finite()), "{ty}, {size}");
            }
        }
    }

    #[test]
    fn powers_of_two_change_nothing_but_d() {
        let rows = uniform(2 * ROW_LEN, 8);
        let importance = importance();
        let larger: Vec<f32> = rows.iter().map(|x| x * 64.0).collect();
        let keener: Vec<f32> = importance.iter().map(|x| x * 65536.0).collect();
        for ty in TYPES {
            let (expected, _) = stored(ty, &larger, Some(&importance));
            assert_eq!(stored(ty, &larger, Some(&keener)).0, expected, "{ty}");
        }
    }
}
