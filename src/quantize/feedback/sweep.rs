//! One pass over the columns of sixteen rows: errors of columns already rounded are repaired by those to come.
//!
//! Enters: targets of a chunk of columns, the factor of the second moments. Leaves: values, scales and errors. One row per
//! lane, sums in order of columns: the bits are the same on every CPU.
//!
//! Source: GPTQ, arXiv:2210.17323, Algorithm 1. Ours chooses the scales of a sub-block when it is reached, on targets that
//! hold the repairs so far, by running the feedback inside the sub-block for every candidate.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::lanes::Lanes;
use super::super::symmetric::Nearest;
use super::cholesky::{Factor, STRIP, Strips};
use super::compiled::CompiledGrid;
use super::scales::{Candidates, Scales};

/// Rows that go side by side.
pub const ROWS: usize = 16;
/// Candidates that are simulated together: enough to hide the latency of a sum that must be in order.
const GROUP: usize = 4;

/// One value for each of the sixteen rows.
pub type Row = [f32; ROWS];

/// Sixteen rows of a matrix while they are rounded, column by column.
#[derive(Debug)]
pub struct Half {
    /// What the rounded weights should be, `[column]`.
    pub wanted: Vec<Row>,
    /// Wanted less rounded, `[column]`.
    pub errors: Vec<Row>,
    /// Value of the code, `[column]`.
    pub values: Vec<Row>,
    /// `[sub-block][d, dmin, scale, min]`.
    pub scales: Vec<[Row; 4]>,
}

impl Half {
    /// Rows that are not there stay zero.
    pub fn new(rows: &[&[f32]], columns: usize, sub: usize) -> Self {
        let mut wanted = vec![[0.0; ROWS]; columns];
        for (lane, row) in rows.iter().enumerate() {
            for (wanted, value) in wanted.iter_mut().zip(*row) {
                wanted[lane] = *value;
            }
        }
        Self {
            errors: vec![[0.0; ROWS]; columns],
            values: vec![[0.0; ROWS]; columns],
            scales: vec![[[0.0; ROWS]; 4]; columns / sub],
            wanted,
        }
    }

    /// Rows of errors alone.
    pub fn of_errors(rows: &[&[f32]], columns: usize) -> Self {
        let wanted = Self::new(rows, columns, columns);
        Self {
            errors: wanted.wanted,
            wanted: Vec::new(),
            values: Vec::new(),
            scales: Vec::new(),
        }
    }
}

#[inline(always)]
pub(super) fn write<S: Simd>(row: &mut [f32], lanes: Lanes<S>) {
    row[..Lanes::<S>::COUNT].copy_from_slice(lanes.as_slice());
}

/// The first pass over a chunk of columns, all that came before it done.
pub struct FirstPass<'a, N, const SUB: usize> {
    /// The rows.
    pub half: &'a mut Half,
    /// Columns of the chunk: whole blocks.
    pub chunk: Range<usize>,
    /// What they should be, with the repairs of everything before the chunk, `[column of the chunk]`.
    pub targets: &'a mut [Row],
    /// The factor of the second moments.
    pub factor: &'a Factor,
    /// Who knows scales to try.
    pub grid: &'a dyn CompiledGrid,
    /// Rounds to the type's codes.
    pub nearest: N,
}

impl<N: Nearest, const SUB: usize> WithSimd for FirstPass<'_, N, SUB> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let mut candidates = Candidates::none();
        let mut inner = [[0.0; SUB]; SUB];
        let size = self.grid.block();
        for block in self.chunk.clone().step_by(size) {
            let columns = block - self.chunk.start..block - self.chunk.start + size;
            let pivots = &self.factor.pivots[block..block + size];
            let mut head = self.half.scales[block / SUB];
            self.grid
                .begin(&self.targets[columns.clone()], pivots, &mut head);
            for (at, pivots) in columns.step_by(SUB).zip(pivots.chunks_exact(SUB)) {
                let targets = &self.targets[at..at + SUB];
                self.grid
                    .candidates(&head, targets, pivots, &mut candidates);
                let first = self.chunk.start + at;
                gather(&self.factor.feedback, first, &mut inner);
                let tried = candidates.in_groups(GROUP);
                for lane in (0..ROWS).step_by(Lanes::<S>::COUNT) {
                    self.sub_block(simd, lane, first, tried, &inner);
                }
            }
        }
    }
}

impl<N: Nearest, const SUB: usize> FirstPass<'_, N, SUB> {
    #[inline(always)]
    fn sub_block<S: Simd>(
        &mut self,
        simd: S,
        lane: usize,
        first: usize,
        candidates: &[[Row; 4]],
        inner: &[[f32; SUB]; SUB],
    ) {
        let zero = Lanes::zero(simd);
        let mut problem = SubProblem {
            targets: [zero; SUB],
            wanted: [zero; SUB],
            weights: [zero; SUB],
            inner,
            nearest: self.nearest,
        };
        for j in 0..SUB {
            problem.targets[j] =
                Lanes::read(simd, &self.targets[first + j - self.chunk.start][lane..]);
            problem.wanted[j] = Lanes::read(simd, &self.half.wanted[first + j][lane..]);
            problem.weights[j] = Lanes::splat(simd, self.factor.pivots[first + j]);
        }
        let best = problem.best(simd, lane, candidates);
        let (errors, values) = problem.round(&best);
        for j in 0..SUB {
            write(&mut self.half.errors[first + j][lane..], errors[j]);
            write(&mut self.half.values[first + j][lane..], values[j]);
        }
        best.write(&mut self.half.scales[first / SUB], lane);
        let (matrix, errors) = (&self.factor.feedback, &self.half.errors);
        let (done, end) = (first..first + SUB, self.chunk.end);
        spread(simd, lane, matrix, errors, done, end, self.targets);
    }
}

/// `inner[j][i] = matrix[first + i][first + j]`.
#[inline(always)]
pub(super) fn gather<const SUB: usize>(
    matrix: &Strips,
    first: usize,
    inner: &mut [[f32; SUB]; SUB],
) {
    for (j, row) in inner.iter_mut().enumerate() {
        for (i, value) in row.iter_mut().enumerate() {
            *value = matrix.at(first + i, first + j);
        }
    }
}

/// Adds what rows `done` of `changes` do to the columns after them: `targets[j] += sum over i of changes[i] matrix[i][j]`.
#[inline(always)]
pub(super) fn spread<S: Simd>(
    simd: S,
    lane: usize,
    matrix: &Strips,
    changes: &[Row],
    done: Range<usize>,
    end: usize,
    targets: &mut [Row],
) {
    // Targets are those of the columns that end with `end`.
    let start = end - targets.len();
    for first in (done.end..end).step_by(STRIP) {
        let mut sums = [Lanes::zero(simd); STRIP];
        let strip = matrix.part(first / STRIP, done.clone());
        for (row, change) in strip
            .as_chunks::<STRIP>()
            .0
            .iter()
            .zip(&changes[done.clone()])
        {
            let change = Lanes::read(simd, &change[lane..]);
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum = change.mul_add(Lanes::splat(simd, *value), *sum);
            }
        }
        for (j, sum) in (first..end).zip(sums) {
            let target = &mut targets[j - start][lane..];
            let moved = Lanes::read(simd, target) + sum;
            write(target, moved);
        }
    }
}

/// A sub-block ready to be rounded.
struct SubProblem<'a, S: Simd, N, const SUB: usize> {
    targets: [Lanes<S>; SUB],
    wanted: [Lanes<S>; SUB],
    weights: [Lanes<S>; SUB],
    /// Feedback inside the sub-block, see [`gather`].
    inner: &'a [[f32; SUB]; SUB],
    nearest: N,
}

impl<S: Simd, N: Nearest, const SUB: usize> SubProblem<'_, S, N, SUB> {
    /// The candidate of least loss, for each lane.
    #[inline(always)]
    fn best(&self, simd: S, lane: usize, candidates: &[[Row; 4]]) -> Scales<S> {
        let mut best = Scales::read(simd, &candidates[0], lane);
        let mut least = best.d.like(f32::INFINITY);
        for group in candidates.as_chunks::<GROUP>().0 {
            let group = group.each_ref().map(|rows| Scales::read(simd, rows, lane));
            let losses = self.simulate(&group);
            for (scales, loss) in group.iter().zip(losses) {
                let better = loss.lt(least);
                least = better.select(loss, least);
                best = best.or_where(better, scales);
            }
        }
        best
    }

    /// What the sub-block loses with each candidate.
    #[inline(always)]
    fn simulate(&self, group: &[Scales<S>; GROUP]) -> [Lanes<S>; GROUP] {
        let zero = self.targets[0].like(0.0);
        let (mut steps, mut inverses, mut offsets) = ([zero; GROUP], [zero; GROUP], [zero; GROUP]);
        for (c, scales) in group.iter().enumerate() {
            (steps[c], offsets[c]) = (scales.step(), scales.offset());
            inverses[c] = steps[c].recip_or_zero();
        }
        let mut errors = [[zero; GROUP]; SUB];
        let mut losses = [zero; GROUP];
        for j in 0..SUB {
            let mut targets = [self.targets[j]; GROUP];
            let row = &self.inner[j];
            for (errors, feedback) in errors[..j].iter().zip(row) {
                let feedback = zero.like(*feedback);
                for c in 0..GROUP {
                    targets[c] = errors[c].mul_add(feedback, targets[c]);
                }
            }
            for c in 0..GROUP {
                let value = self
                    .nearest
                    .nearest((targets[c] + offsets[c]) * inverses[c]);
                let rounded = steps[c] * value - offsets[c];
                let missed = targets[c] - rounded;
                losses[c] = (missed * missed).mul_add(self.weights[j], losses[c]);
                errors[j][c] = self.wanted[j] - rounded;
            }
        }
        losses
    }

    /// Errors and values with the scales that were chosen.
    #[inline(always)]
    fn round(&self, scales: &Scales<S>) -> ([Lanes<S>; SUB], [Lanes<S>; SUB]) {
        let zero = self.targets[0].like(0.0);
        let (step, offset) = (scales.step(), scales.offset());
        let inverse = step.recip_or_zero();
        let (mut errors, mut values) = ([zero; SUB], [zero; SUB]);
        for j in 0..SUB {
            let mut target = self.targets[j];
            let row = &self.inner[j];
            for (error, feedback) in errors[..j].iter().zip(row) {
                target = error.mul_add(zero.like(*feedback), target);
            }
            values[j] = self.nearest.nearest((target + offset) * inverse);
            errors[j] = self.wanted[j] - (step * values[j] - offset);
        }
        (errors, values)
    }
}
