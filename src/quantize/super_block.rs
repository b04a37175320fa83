//! Super-blocks of 256 weights, one per lane, on their way into a search and out of it.
//!
//! Enters: rows and column importance. Leaves: whole packed super-blocks, the same bytes however the
//! rows are batched. Knows no type: what a search minimizes and packs is the type's business.

use pulp::{Arch, Simd, WithSimd};

use super::lanes::{F16_MAX, Lanes, load};

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

/// A type made of super-blocks.
pub trait SuperBlockType {
    /// Bytes of one super-block.
    const BYTES: usize;
    /// Weights of errors without importance (ggml `quantize_row_*_ref`).
    const WEIGHTING: Weighting;
    /// Weights of errors with importance (ggml `quantize_row_*_impl`).
    const IMPORTANCE_WEIGHTING: ImportanceWeighting;

    /// Scales and codes of every lane.
    type Solution<S: Simd>;

    /// Chooses scales and codes.
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Self::Solution<S>;

    /// The f16 scales of one lane, in units of the original weights.
    fn f16_scales<S: Simd>(solution: &Self::Solution<S>, lane: usize) -> [f32; 2];

    /// Packs one lane into `BYTES` bytes.
    fn pack<S: Simd>(solution: &Self::Solution<S>, lane: usize, block: &mut [u8]);
}

/// Quantizes rows of whole super-blocks; returns how many super-blocks have a scale beyond f16 or a
/// weight that is not finite.
///
/// `rows`: row-major, `row_len` a multiple of 256; `importance`: `row_len` values; `out`: `T::BYTES`
/// for every 256 weights.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn quantize<T: SuperBlockType>(
    rows: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> u64 {
    assert!(row_len > 0 && row_len.is_multiple_of(SUPER_BLOCK), "a row is whole super-blocks");
    assert!(rows.len().is_multiple_of(row_len), "rows are whole");
    assert!(importance.is_none_or(|values| values.len() == row_len), "an importance per column");
    assert_eq!(out.len(), rows.len() / SUPER_BLOCK * T::BYTES, "a super-block per 256 weights");
    Arch::new().dispatch(Run::<T> { rows, row_len, importance, out, ty: std::marker::PhantomData })
}

pub(super) struct Run<'a, T> {
    pub rows: &'a [f32],
    pub row_len: usize,
    pub importance: Option<&'a [f32]>,
    pub out: &'a mut [u8],
    pub ty: std::marker::PhantomData<T>,
}

impl<T: SuperBlockType> WithSimd for Run<'_, T> {
    type Output = u64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> u64 {
        let lanes = Lanes::<S>::COUNT;
        let mut problem = Problem::empty(simd);
        let mut misfits = 0;
        let batches = self.rows.chunks(lanes * SUPER_BLOCK).zip(self.out.chunks_mut(lanes * T::BYTES));
        for (batch, (rows, out)) in batches.enumerate() {
            problem.load(simd, rows);
            match self.importance {
                None => problem.weigh::<T>(),
                Some(importance) => {
                    let first = batch * lanes * SUPER_BLOCK;
                    let columns = (0..rows.len() / SUPER_BLOCK).map(|block| {
                        let column = (first + block * SUPER_BLOCK) % self.row_len;
                        &importance[column..column + SUPER_BLOCK]
                    });
                    problem.weigh_by_importance::<T>(simd, columns);
                }
            }
            let solution = T::search(simd, &problem);
            for (lane, block) in out.chunks_exact_mut(T::BYTES).enumerate() {
                T::pack(&solution, lane, block);
                let saturated = T::f16_scales(&solution, lane).iter().any(|d| d.abs() >= F16_MAX);
                let nonfinite = problem.nonfinite.as_slice()[lane] != 0.0;
                misfits += u64::from(saturated || nonfinite);
            }
        }
        misfits
    }
}

impl<S: Simd> Problem<S> {
    #[inline(always)]
    fn empty(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self { x: [zero; SUPER_BLOCK], weight: [zero; SUPER_BLOCK], unit: zero, nonfinite: zero }
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
        let zero = Lanes::zero(simd);
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
                for (weights, xs) in self.weight.chunks_exact_mut(32).zip(self.x.chunks_exact(32)) {
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
            *weight = weight.gt(zero).select(*weight, zero).min(zero.like(f32::MAX));
            largest = largest.max(*weight);
        }
        let inverse = zero.like(1.0) / power_of_two_of(largest);
        let floor = (largest * inverse).max(zero.like(f32::MIN_POSITIVE)) * zero.like(1e-6);
        let energy = match T::IMPORTANCE_WEIGHTING {
            ImportanceWeighting::Plain => None,
            ImportanceWeighting::Energy { factor } => Some(mean_square(&self.x) * zero.like(factor)),
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

/// The power of two in the exponent, kept where it and its inverse are normal.
#[inline(always)]
fn power_of_two_of<S: Simd>(magnitude: Lanes<S>) -> Lanes<S> {
    let one = magnitude.like(1.0);
    let clamped = magnitude.power_of_two().max(one.like(2f32.powi(-126))).min(one.like(2f32.powi(126)));
    magnitude.gt(magnitude.like(0.0)).select(clamped, one)
}

#[inline(always)]
fn mean_square<S: Simd>(xs: &[Lanes<S>]) -> Lanes<S> {
    let mut sum = xs[0].like(0.0);
    for &x in xs {
        sum += x * x;
    }
    sum * sum.like(1.0 / xs.len() as f32)
}
