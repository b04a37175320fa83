//! Blocks of 32 whose scale is searched, one block per lane.
//!
//! Enters: rows and column importance. Leaves: packed blocks, the same bytes however the rows are batched.
//! Knows no type: which values the codes stand for is the type's business.

use std::marker::PhantomData;

use bytemuck::{Pod, cast_slice_mut};
use half::f16;
use pulp::{Arch, Simd, WithSimd};

use super::{
    ScaleOverflow,
    lanes::{Lanes, load, unload_codes},
    super_block::{mean_square, power_of_two_of, saturates},
};

/// Weights in a block.
const BLOCK: usize = 32;

/// A block per lane, ready for a search.
pub struct Problem<S: Simd> {
    /// Weights divided by `unit`: every magnitude below 2, nothing NaN.
    pub x: [Lanes<S>; BLOCK],
    /// What a squared error counts: at least zero, of a size that sums without overflow.
    pub weight: [Lanes<S>; BLOCK],
    /// A power of two, the exponent of the largest magnitude.
    unit: Lanes<S>,
    /// 1 where the block held a NaN or an infinity, which the search sees as zero.
    nonfinite: Lanes<S>,
}

/// What a search found: each weight is `d value(code) + m`, in units of the problem.
pub struct Solution<S: Simd> {
    /// Scale, an f16 in original units.
    pub d: Lanes<S>,
    /// Offset, an f16 in original units.
    pub m: Lanes<S>,
    /// Codes.
    pub codes: [Lanes<S>; BLOCK],
}

/// Over which weights `x^2` is averaged to temper the importance of large weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Energy {
    /// The mean over the row.
    Row,
    /// Twice the mean over the block.
    TwiceBlock,
}

/// A type of 32 elements a block whose scale is searched.
pub trait SearchedType {
    /// The packed block.
    type Block: Pod;
    /// `e` in the weight of an error, `importance * sqrt(e + x^2)`. Without importance it is `x^2`.
    const ENERGY: Energy;

    /// Chooses scales and codes.
    fn search<S: Simd>(simd: S, problem: &Problem<S>) -> Solution<S>;

    /// Packs a block.
    fn pack(d: f16, m: f16, codes: &[u8; BLOCK]) -> Self::Block;
}

/// Quantizes whole rows. Counted in the result: f16 scales cut to the largest f16, and blocks with a NaN
/// or an infinity, which is stored as if it were zero.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn quantize<T: SearchedType>(
    row_len: usize,
    rows: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    let out = cast_slice_mut::<u8, T::Block>(out);
    assert_eq!(rows.len(), out.len() * BLOCK, "a block per 32 elements");
    Arch::new().dispatch(Run::<T> {
        row_len,
        rows,
        importance,
        out,
        ty: PhantomData,
    })
}

pub(super) struct Run<'a, T: SearchedType> {
    pub row_len: usize,
    pub rows: &'a [f32],
    pub importance: Option<&'a [f32]>,
    pub out: &'a mut [T::Block],
    pub ty: PhantomData<T>,
}

impl<T: SearchedType> WithSimd for Run<'_, T> {
    type Output = ScaleOverflow;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> ScaleOverflow {
        let out = std::mem::take(&mut self.out);
        let lanes = Lanes::<S>::COUNT;
        let mut overflow = 0;
        let mut problem = Problem::empty(simd);
        let mut energy_of_row = RowEnergy::default();
        let batches = self.rows.chunks(lanes * BLOCK).zip(out.chunks_mut(lanes));
        for (batch, (rows, out)) in batches.enumerate() {
            problem.load(simd, rows);
            self.weigh(
                simd,
                batch * lanes * BLOCK,
                &mut problem,
                &mut energy_of_row,
            );
            let solution = T::search(simd, &problem);
            let (d, m) = (solution.d * problem.unit, solution.m * problem.unit);
            for (lane, block) in out.iter_mut().enumerate() {
                let mut codes = [0; BLOCK];
                unload_codes(&solution.codes, lane, &mut codes);
                let (d, m) = (d.as_slice()[lane], m.as_slice()[lane]);
                overflow += saturates(d) + saturates(m);
                overflow += u64::from(problem.nonfinite.as_slice()[lane] != 0.0);
                *block = T::pack(f16::from_f32(d), f16::from_f32(m), &codes);
            }
        }
        ScaleOverflow(overflow)
    }
}

impl<T: SearchedType> Run<'_, T> {
    /// Weighs the errors of the blocks from element `first` on; `energy_of_row` is of the row asked for last.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        simd: S,
        first: usize,
        problem: &mut Problem<S>,
        energy_of_row: &mut RowEnergy,
    ) {
        let Some(importance) = self.importance else {
            return problem.weigh_by_square();
        };
        let starts = (first..self.rows.len())
            .step_by(BLOCK)
            .take(Lanes::<S>::COUNT);
        let energy = match T::ENERGY {
            Energy::Row => {
                let means = starts.clone().map(|at| {
                    let index = at / self.row_len;
                    energy_of_row.of(index, || &self.rows[index * self.row_len..][..self.row_len])
                });
                problem.energy_of_rows(simd, means)
            }
            Energy::TwiceBlock => {
                let energy = mean_square(&problem.x);
                energy + energy
            }
        };
        let columns = starts.map(|at| &importance[at % self.row_len..][..BLOCK]);
        problem.weigh_by_importance(simd, columns, energy);
    }
}

impl<S: Simd> Problem<S> {
    #[inline(always)]
    fn empty(simd: S) -> Self {
        let zero = Lanes::zero(simd);
        Self {
            x: [zero; BLOCK],
            weight: [zero; BLOCK],
            unit: zero,
            nonfinite: zero,
        }
    }

    /// Blocks that are in lanes already, one a lane; an error counts `weights`.
    #[inline(always)]
    pub fn of_lanes(x: &[Lanes<S>], weights: &[Lanes<S>]) -> Self {
        let zero = x[0].like(0.0);
        let mut problem = Self {
            x: [zero; BLOCK],
            weight: [zero; BLOCK],
            unit: zero,
            nonfinite: zero,
        };
        problem.x.copy_from_slice(x);
        problem.normalize();
        problem.weight.copy_from_slice(weights);
        problem
    }

    /// A scale of `x` in units of the original weights.
    #[inline(always)]
    pub fn in_original_units(&self, scale: Lanes<S>) -> Lanes<S> {
        scale * self.unit
    }

    /// The nearest f16 to a scale, in the same units.
    #[inline(always)]
    pub fn round_to_f16(&self, scale: Lanes<S>) -> Lanes<S> {
        (scale * self.unit).round_to_f16() / self.unit
    }

    /// Brings blocks to one size, so that no square overflows or vanishes.
    #[inline(always)]
    fn load(&mut self, simd: S, rows: &[f32]) {
        load(simd, &mut self.x, rows.chunks_exact(BLOCK));
        self.normalize();
    }

    #[inline(always)]
    fn normalize(&mut self) {
        let zero = self.unit.like(0.0);
        let mut largest = zero;
        self.nonfinite = zero;
        for x in &mut self.x {
            let finite = x.abs().lt(zero.like(f32::INFINITY));
            self.nonfinite = finite.select(self.nonfinite, zero.like(1.0));
            *x = finite.select(*x, zero);
            largest = largest.max(x.abs());
        }
        self.unit = power_of_two_of(largest);
        let inverse = zero.like(1.0) / self.unit;
        for x in &mut self.x {
            *x = *x * inverse;
        }
    }

    #[inline(always)]
    fn weigh_by_square(&mut self) {
        for (weight, x) in self.weight.iter_mut().zip(&self.x) {
            *weight = *x * *x;
        }
    }

    /// `means`: of `x^2` over the row of each lane.
    #[inline(always)]
    fn energy_of_rows(&self, simd: S, means: impl Iterator<Item = f64>) -> Lanes<S> {
        let mut energy = Lanes::zero(simd);
        let units = self.unit.as_slice();
        for ((energy, unit), mean) in energy.as_mut_slice().iter_mut().zip(units).zip(means) {
            let in_units = mean / (f64::from(*unit) * f64::from(*unit));
            *energy = in_units.min(1e30) as f32;
        }
        energy
    }

    /// Columns that never mattered get a millionth of the largest importance, so that they stay sane.
    #[inline(always)]
    fn weigh_by_importance<'a>(
        &mut self,
        simd: S,
        columns: impl Iterator<Item = &'a [f32]>,
        energy: Lanes<S>,
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
        for (weight, &x) in self.weight.iter_mut().zip(&self.x) {
            *weight = (*weight * inverse).max(floor) * (energy + x * x).sqrt();
        }
    }
}

/// The mean of `x^2` over the row that was asked for last: rows are mostly longer than batches.
#[derive(Default)]
struct RowEnergy {
    row: Option<usize>,
    mean: f64,
}

impl RowEnergy {
    #[inline(always)]
    fn of<'a>(&mut self, index: usize, row: impl FnOnce() -> &'a [f32]) -> f64 {
        if self.row != Some(index) {
            *self = Self {
                row: Some(index),
                mean: mean_square_of_row(row()),
            };
        }
        self.mean
    }
}

/// Summed in eight columns, which compiles to vector code with the same bits on every CPU.
#[inline(always)]
fn mean_square_of_row(row: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    for x in row.as_chunks::<8>().0 {
        for (sum, x) in sums.iter_mut().zip(x) {
            let x = if x.is_finite() { f64::from(*x) } else { 0.0 };
            *sum += x * x;
        }
    }
    sums.iter().sum::<f64>() / row.len() as f64
}
