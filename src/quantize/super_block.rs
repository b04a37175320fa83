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
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    first: f32,
    step: f32,
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
        let floor = (largest * inverse).max(zero.like(f32::MIN_POSITIVE)) * zero.like(1e-6);
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

/// The power of two in the exponent, kept where it and its inverse are normal.
#[inline(always)]
fn power_of_two_of<S: Simd>(magnitude: Lanes<S>) -> Lanes<S> {
    let one = magnitude.like(1.0);
    let clamped = magnitude
        .power_of_two()
        .max(one.like(2f32.powi(-126)))
        .min(one.like(2f32.powi(126)));
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
