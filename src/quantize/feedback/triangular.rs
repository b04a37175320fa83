//! Solving with factored second moments: `M X = A` for many right-hand sides at once.
//!
//! Enters: `M = T D T^T`, A as `[n, count]`, a column per right-hand side. Leaves: X in its place. Solved rows are multiplied
//! in f32, and summed in f32 over short chunks alone: the inverse makes much of small errors. Sums run in one order,
//! whatever the number of columns.

use std::ops::Range;

use rayon::prelude::*;

use super::cholesky::{Factor, subtract_scaled};
use crate::backend::cpu::gram::{Columns, products};
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::shared_rows::SharedRows;

/// Rows that take what others explain together.
const BLOCK: usize = 128;
/// Rows that are summed in f32.
const CHUNK: usize = 128;
/// Columns that a thread solves a block for.
const SOLVED_COLUMNS: usize = 64;

/// Replaces `x [n, count]` by `M^-1 x`.
pub fn solve(isa: Isa, factor: &Factor, x: &mut [f64]) {
    let n = factor.pivots.len();
    let count = x.len() / n;
    if count == 0 {
        return;
    }
    let mut solved = vec![0.0f32; x.len()];
    // T z = a, from the last row to the first.
    for block in blocks(n).rev() {
        let rows = &mut x[block.start * count..block.end * count];
        let below = &solved[block.end * count..];
        let coefficient = |j: usize, k: usize| factor.feedback.at(j, k);
        subtract(isa, (below, block.end), (rows, &block), count, coefficient);
        let needs = |j: usize| j + 1..block.end;
        let order = block.clone().rev();
        within(isa, rows, &block, count, order, needs, coefficient);
        keep(rows, &mut solved[block.start * count..]);
    }
    let rows = x.par_chunks_exact_mut(count).zip(&factor.pivots);
    rows.for_each(|(row, pivot)| {
        row.iter_mut().for_each(|value| *value /= f64::from(*pivot));
    });
    // T^T y = z, from the first to the last.
    for block in blocks(n) {
        let rows = &mut x[block.start * count..block.end * count];
        let before = &solved[..block.start * count];
        let coefficient = |j: usize, k: usize| factor.feedback.at(k, j);
        subtract(isa, (before, 0), (rows, &block), count, coefficient);
        let needs = |j: usize| block.start..j;
        let order = block.clone();
        within(isa, rows, &block, count, order, needs, coefficient);
        keep(rows, &mut solved[block.start * count..]);
    }
}

/// Solved rows, for products.
fn keep(rows: &[f64], solved: &mut [f32]) {
    let pairs = solved.iter_mut().zip(rows);
    pairs.for_each(|(solved, x)| *solved = *x as f32);
}

fn blocks(n: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let begins = (0..n).step_by(BLOCK);
    begins.map(move |begin| begin..n.min(begin + BLOCK))
}

/// Takes from the rows of a block what solved rows explain, which begin with row `first`.
fn subtract(
    isa: Isa,
    (solved, first): (&[f32], usize),
    (rows, block): (&mut [f64], &Range<usize>),
    count: usize,
    coefficient: impl Fn(usize, usize) -> f32 + Sync,
) {
    let height = solved.len() / count;
    let mut coefficients = vec![0.0; height * block.len()];
    let lines = coefficients.par_chunks_exact_mut(block.len()).enumerate();
    lines.for_each(|(k, line)| {
        let line = line.iter_mut().zip(block.clone());
        line.for_each(|(value, j)| *value = coefficient(j, first + k));
    });
    let columns = |values, stride| Columns {
        values,
        stride,
        range: 0..stride,
    };
    let (solved, coefficients) = (columns(solved, count), columns(&coefficients, block.len()));
    let take = |out: &mut f64, sum: f32| *out -= f64::from(sum);
    for begin in (0..height).step_by(CHUNK) {
        let chunk = begin..height.min(begin + CHUNK);
        products(isa, chunk, &solved, &coefficients, false, rows, count, take);
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
    let parts: Vec<usize> = (0..count).step_by(SOLVED_COLUMNS).collect();
    parts.into_par_iter().for_each(|first| {
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
