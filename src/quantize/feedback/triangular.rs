//! Solving with factored second moments: `M X = A` for many right-hand sides at once.
//!
//! Enters: `M = T D T^T`, A as `[n, count]`, a column per right-hand side. Leaves: X in its place. Solved rows are multiplied
//! in f32, and summed in f32 over short chunks alone: the inverse makes much of small errors. Sums run in one order,
//! whatever the number of columns.

use std::ops::Range;

use super::HERE;
use super::cholesky::{Factor, subtract_scaled};
use super::held::{HeldRows, RowProducts};
use crate::backend::cpu::gram::{Columns, products};
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::shared_rows::SharedRows;
use crate::error::Result;
use crate::parallel;

/// Rows that take what others explain together.
const BLOCK: usize = 128;
/// Rows that are summed in f32.
const CHUNK: usize = 128;
/// Columns that a thread solves a block for.
const SOLVED_COLUMNS: usize = 64;
/// Rows whose coefficients a thread gathers at a time.
const COEFFICIENT_ROWS: usize = 32;
/// Sums that a thread takes at a time.
const SUBTRACTED: usize = 1 << 14;

/// Replaces `x [n, count]` by `M^-1 x`.
pub fn solve(isa: Isa, factor: &Factor, x: &mut [f64]) {
    let count = x.len() / factor.pivots.len();
    let values = vec![0.0; x.len()];
    solve_with(isa, factor, x, &mut Here { isa, values, count }).expect(HERE);
}

/// The same, with products on another machine.
///
/// # Errors
/// The machine fails.
pub fn solve_on(machine: &dyn RowProducts, factor: &Factor, x: &mut [f64]) -> Result<()> {
    let n = factor.pivots.len();
    let isa = Isa::detect();
    match machine.hold(x.len() / n, n)? {
        Some(held) => solve_with(isa, factor, x, &mut There(held)),
        None => {
            solve(isa, factor, x);
            Ok(())
        }
    }
}

fn solve_with(
    isa: Isa,
    factor: &Factor,
    x: &mut [f64],
    solved: &mut impl SolvedRows,
) -> Result<()> {
    let n = factor.pivots.len();
    let count = x.len() / n;
    // T z = a, from the last row to the first.
    for block in blocks(n).rev() {
        let rows = &mut x[block.start * count..block.end * count];
        let coefficient = |j: usize, k: usize| factor.feedback.at(j, k);
        subtract(solved, block.end..n, rows, &block, coefficient)?;
        let needs = |j: usize| j + 1..block.end;
        let order = block.clone().rev();
        within(isa, rows, &block, count, order, needs, coefficient);
        solved.keep(block.start, rows)?;
    }
    let rows = x.chunks_exact_mut(count).zip(&factor.pivots);
    parallel::for_each(rows, |(row, pivot)| {
        row.iter_mut().for_each(|value| *value /= f64::from(*pivot));
    });
    // T^T y = z, from the first to the last.
    for block in blocks(n) {
        let rows = &mut x[block.start * count..block.end * count];
        let coefficient = |j: usize, k: usize| factor.feedback.at(k, j);
        subtract(solved, 0..block.start, rows, &block, coefficient)?;
        let needs = |j: usize| block.start..j;
        let order = block.clone();
        within(isa, rows, &block, count, order, needs, coefficient);
        solved.keep(block.start, rows)?;
    }
    Ok(())
}

fn blocks(n: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let begins = (0..n).step_by(BLOCK);
    begins.map(move |begin| begin..n.min(begin + BLOCK))
}

/// Takes from the rows of a block what solved rows explain.
fn subtract(
    solved: &mut impl SolvedRows,
    explaining: Range<usize>,
    rows: &mut [f64],
    block: &Range<usize>,
    coefficient: impl Fn(usize, usize) -> f32 + Sync,
) -> Result<()> {
    if explaining.is_empty() {
        return Ok(());
    }
    let mut coefficients = vec![0.0; explaining.len() * block.len()];
    let parts = coefficients.chunks_mut(COEFFICIENT_ROWS * block.len());
    let parts = parts.zip(explaining.clone().step_by(COEFFICIENT_ROWS));
    parallel::for_each(parts, |(lines, first)| {
        for (k, line) in (first..).zip(lines.chunks_exact_mut(block.len())) {
            let line = line.iter_mut().zip(block.clone());
            line.for_each(|(value, j)| *value = coefficient(j, k));
        }
    });
    solved.subtract(explaining, &coefficients, block.len(), rows)
}

/// Solved rows, for products.
trait SolvedRows {
    /// Takes `sum over k of coefficients[k][j] solved[k]` from row j: `coefficients [explaining, width]`, `rows [width, count]`.
    fn subtract(
        &mut self,
        explaining: Range<usize>,
        coefficients: &[f32],
        width: usize,
        rows: &mut [f64],
    ) -> Result<()>;

    /// Rows from `first` on are these.
    fn keep(&mut self, first: usize, rows: &[f64]) -> Result<()>;
}

/// On this computer: `[n, count]`.
struct Here {
    isa: Isa,
    values: Vec<f32>,
    count: usize,
}

impl SolvedRows for Here {
    fn subtract(
        &mut self,
        explaining: Range<usize>,
        coefficients: &[f32],
        width: usize,
        rows: &mut [f64],
    ) -> Result<()> {
        let columns = |values, stride| Columns {
            values,
            stride,
            range: 0..stride,
        };
        let solved = &self.values[explaining.start * self.count..explaining.end * self.count];
        let (solved, coefficients) = (columns(solved, self.count), columns(coefficients, width));
        let take = |out: &mut f64, sum: f32| *out -= f64::from(sum);
        for begin in (0..explaining.len()).step_by(CHUNK) {
            let chunk = begin..explaining.len().min(begin + CHUNK);
            products(
                self.isa,
                chunk,
                &solved,
                &coefficients,
                false,
                rows,
                self.count,
                take,
            );
        }
        Ok(())
    }

    fn keep(&mut self, first: usize, rows: &[f64]) -> Result<()> {
        let pairs = self.values[first * self.count..].iter_mut().zip(rows);
        pairs.for_each(|(solved, x)| *solved = *x as f32);
        Ok(())
    }
}

/// On another machine, which holds a row per right-hand side.
struct There<'m>(Box<dyn HeldRows + 'm>);

impl SolvedRows for There<'_> {
    fn subtract(
        &mut self,
        explaining: Range<usize>,
        coefficients: &[f32],
        width: usize,
        rows: &mut [f64],
    ) -> Result<()> {
        let sums = self.0.times_exactly(explaining, coefficients, width)?;
        let parts = rows.chunks_mut(SUBTRACTED).zip(sums.chunks(SUBTRACTED));
        parallel::for_each(parts, |(rows, sums)| {
            let pairs = rows.iter_mut().zip(sums);
            pairs.for_each(|(x, sum)| *x -= sum);
        });
        Ok(())
    }

    fn keep(&mut self, first: usize, rows: &[f64]) -> Result<()> {
        let rows: Vec<f32> = rows.iter().map(|x| *x as f32).collect();
        self.0.set(first, &rows)
    }
}

/// Solves within a block, row after row: `needs` says which rows of the block each depends on.
fn within(
    isa: Isa,
    rows: &mut [f64],
    block: &Range<usize>,
    count: usize,
    order: impl Iterator<Item = usize> + Clone + Sync,
    needs: impl Fn(usize) -> Range<usize> + Sync,
    coefficient: impl Fn(usize, usize) -> f32 + Sync,
) {
    let shared = SharedRows::new(rows, count);
    parallel::for_each((0..count).step_by(SOLVED_COLUMNS), |first| {
        let width = SOLVED_COLUMNS.min(count - first);
        // SAFETY: these columns belong to this part, and so to this thread, alone; rows are taken once each.
        let part = |j: usize| unsafe { shared.part(j - block.start, first, width) };
        for j in order.clone() {
            let row = part(j);
            for k in needs(j) {
                subtract_scaled(isa, row, f64::from(coefficient(j, k)), part(k));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::cholesky::factor;
    use super::super::cholesky::tests::moments;
    use super::*;

    #[test]
    fn solutions_times_the_matrix_are_the_right_hand_sides() {
        for (n, count) in [(1, 1), (7, 3), (130, 40), (300, 133)] {
            let m = moments(n);
            let factor = factor(Isa::detect(), n, |i, j| m[i * n + j]).unwrap();
            let wanted: Vec<f64> = (0..n * count)
                .map(|at| ((at * 37 % 101) as f64 - 50.0) / 50.0)
                .collect();
            let mut x = wanted.clone();
            solve(Isa::detect(), &factor, &mut x);
            for (j, column) in (0..n).flat_map(|j| (0..count).map(move |column| (j, column))) {
                let product = |k: usize| {
                    let lower = m[j.max(k) * n + j.min(k)];
                    f64::from(lower) * x[k * count + column]
                };
                let found: f64 = (0..n).map(product).sum();
                let wanted = wanted[j * count + column];
                assert!((found - wanted).abs() < 3e-5, "{n} {j}: {found} {wanted}");
            }
        }
    }

    #[test]
    fn a_column_does_not_depend_on_those_beside_it() {
        let n = 200;
        let m = moments(n);
        let factor = factor(Isa::detect(), n, |i, j| m[i * n + j]).unwrap();
        let value = |j: usize, column: usize| ((j * 31 + column * 17) % 23) as f64 - 11.0;
        let solved = |columns: Range<usize>| {
            let columns = || columns.clone();
            let mut x: Vec<f64> = (0..n)
                .flat_map(|j| columns().map(move |column| value(j, column)))
                .collect();
            solve(Isa::detect(), &factor, &mut x);
            x
        };
        let (all, some) = (solved(0..50), solved(20..23));
        for (all, some) in all.chunks_exact(50).zip(some.chunks_exact(3)) {
            assert_eq!(&all[20..23], some);
        }
    }
}
