//! The second moments of a layer's inputs, factored from the last input to the first.
//!
//! Enters: a symmetric matrix M `[n, n]`. Leaves: `M = L^T L` as unit factors and pivots. Computes in f32 with sums in one
//! order, so that the bits do not depend on the machine.

use std::ops::{Mul, Range, SubAssign};

use rayon::prelude::*;

use crate::backend::cpu::gram::{CHUNK_ROWS, Columns, products};
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::multiversion::multiversion;
use crate::backend::cpu::shared_rows::SharedRows;

/// Columns that lie side by side in [`Strips`].
pub const STRIP: usize = 8;
/// Rows that are factored together.
const BLOCK: usize = 64;
/// Rows that take what those below explain together: so many products share what was packed for them.
const OUTER_BLOCK: usize = 256;
/// Columns that a thread solves for, which with a block of rows fill a first-level cache.
const SOLVED_COLUMNS: usize = 128;

/// A square matrix in strips of eight columns, `[strip][row][8]`: what products with panels of rows read in order.
#[derive(Debug, Clone)]
pub struct Strips {
    n: usize,
    values: Vec<f32>,
}

impl Strips {
    /// The matrix whose row `i`, column `j` is `value(i, j)`.
    pub fn new(n: usize, value: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let mut values = vec![0.0; n.div_ceil(STRIP) * n * STRIP];
        let fill = |(strip, out): (usize, &mut [f32])| {
            for (i, out) in out.chunks_exact_mut(STRIP).enumerate() {
                for (j, out) in (strip * STRIP..n).zip(out) {
                    *out = value(i, j);
                }
            }
        };
        values.par_chunks_mut(n * STRIP).enumerate().for_each(fill);
        Self { n, values }
    }

    /// Rows and columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Rows `rows` of strip `strip`.
    #[inline(always)]
    pub fn part(&self, strip: usize, rows: Range<usize>) -> &[f32] {
        let begin = strip * self.n;
        &self.values[(begin + rows.start) * STRIP..(begin + rows.end) * STRIP]
    }

    /// Rows `rows` of columns `columns`, row-major.
    pub fn dense(&self, rows: Range<usize>, columns: Range<usize>) -> Vec<f32> {
        let row = |i| columns.clone().map(move |j| self.at(i, j));
        rows.flat_map(row).collect()
    }

    /// One element.
    #[inline(always)]
    pub fn at(&self, i: usize, j: usize) -> f32 {
        self.values[(j / STRIP * self.n + i) * STRIP + j % STRIP]
    }
}

/// `M = L^T L` with L lower triangular: `T[i][j] = L[j][i] / L[j][j]` for `i < j` is how much of an error in input i input
/// j repairs, and `D[j] = L[j][j]^2` what of input j no later one can.
///
/// Source: GPTQ, arXiv:2210.17323, Algorithm 1, where the same factors come from the Cholesky decomposition of the inverse.
#[derive(Debug, Clone)]
pub struct Factor {
    /// T, zero for `i >= j`.
    pub feedback: Strips,
    /// D.
    pub pivots: Vec<f32>,
}

/// Factors a symmetric matrix, of which the part with column <= row is read.
///
/// Gives `None` where it is not positive definite to the precision of f32, or holds values that are no numbers.
pub fn factor(isa: Isa, n: usize, matrix: &[f32]) -> Option<Factor> {
    assert_eq!(matrix.len(), n * n);
    let mut l = vec![0.0f32; n * n];
    for begin in (0..n).step_by(OUTER_BLOCK).rev() {
        let end = n.min(begin + OUTER_BLOCK);
        let (above, below) = l.split_at_mut(end * n);
        let rows = &mut above[begin * n..];
        let copied = rows.par_chunks_exact_mut(n).enumerate();
        copied.for_each(|(row, out)| {
            out[..end].copy_from_slice(&matrix[(begin + row) * n..][..end]);
        });
        symmetrize(rows, n, begin..end, matrix);
        subtract(isa, below, n, begin..end, rows);
        factor_rows(isa, rows, n, begin..end)?;
    }
    Some(unit_factor(n, &l))
}

/// Turns rows of what is left of M into rows of L, from the last to the first.
fn factor_rows(isa: Isa, rows: &mut [f32], n: usize, block: Range<usize>) -> Option<()> {
    for begin in block.clone().step_by(BLOCK).rev() {
        let end = block.end.min(begin + BLOCK);
        let (above, below) = rows.split_at_mut((end - block.start) * n);
        let rows = &mut above[(begin - block.start) * n..];
        subtract(isa, below, n, begin..end, rows);
        let corner = factor_corner(isa, rows, n, begin..end)?;
        solve(isa, rows, n, begin..end, &corner);
    }
    Some(())
}

/// Takes from the rows of a block what those below explain, up to the block's last column.
fn subtract(isa: Isa, below: &[f32], n: usize, block: Range<usize>, rows: &mut [f32]) {
    let count = below.len() / n;
    for first in (0..count).step_by(CHUNK_ROWS) {
        let chunk = first..(first + CHUNK_ROWS).min(count);
        let columns = |range| Columns {
            values: below,
            stride: n,
            range,
        };
        let (all, own) = (columns(0..block.end), columns(block.clone()));
        let take = |out: &mut f32, sum: f32| *out -= sum;
        products(isa, chunk, &all, &own, false, rows, n, take);
    }
}

/// Fills the part of a diagonal block above the diagonal.
fn symmetrize(rows: &mut [f32], n: usize, block: Range<usize>, matrix: &[f32]) {
    for (row, i) in rows.chunks_exact_mut(n).zip(block.clone()) {
        for j in i + 1..block.end {
            row[j] = matrix[j * n + i];
        }
    }
}

/// The factor of the diagonal block, `[size, size]` f64, lower triangular.
fn factor_corner(isa: Isa, rows: &[f32], n: usize, block: Range<usize>) -> Option<Vec<f64>> {
    let size = block.len();
    let mut l = vec![0.0f64; size * size];
    for i in (0..size).rev() {
        let left = |j: usize| f64::from(rows[j * n + block.start + i]);
        let mut sums: Vec<f64> = (0..=i).map(left).collect();
        for k in i + 1..size {
            let later = &l[k * size..][..size];
            subtract_scaled(isa, &mut sums, later[i], later);
        }
        // A pivot below the rounding errors of its own sum is noise.
        let floor = f64::from(f32::EPSILON) * left(i).abs();
        if !(sums[i] > floor && sums[i].is_finite()) {
            return None;
        }
        let pivot = sums[i].sqrt();
        for (x, sum) in l[i * size..][..i].iter_mut().zip(&sums) {
            *x = sum / pivot;
        }
        l[i * size + i] = pivot;
    }
    Some(l)
}

/// Turns rows of what is left of M into rows of L.
fn solve(isa: Isa, rows: &mut [f32], n: usize, block: Range<usize>, corner: &[f64]) {
    let size = block.len();
    let shared = SharedRows::new(rows, n);
    let parts = (0..block.start).step_by(SOLVED_COLUMNS).collect::<Vec<_>>();
    parts.into_par_iter().for_each(|first| {
        let count = SOLVED_COLUMNS.min(block.start - first);
        // SAFETY: these columns belong to this part, and so to this thread, alone; rows are taken once each.
        let part = |row| unsafe { shared.part(row, first, count) };
        for i in (0..size).rev() {
            let row = part(i);
            for k in i + 1..size {
                subtract_row(isa, row, corner[k * size + i] as f32, part(k));
            }
            let inverse = (1.0 / corner[i * size + i]) as f32;
            row.iter_mut().for_each(|x| *x *= inverse);
        }
    });
    for (row, corner) in rows.chunks_exact_mut(n).zip(corner.chunks_exact(size)) {
        let pairs = row[block.clone()].iter_mut().zip(corner);
        pairs.for_each(|(x, corner)| *x = *corner as f32);
    }
}

multiversion! {
    fn subtract_row(row: &mut [f32], factor: f32, later: &[f32]) = subtract_product;
}

multiversion! {
    /// `row -= factor * later`
    pub(super) fn subtract_scaled(row: &mut [f64], factor: f64, later: &[f64]) = subtract_product;
}

#[inline(always)]
fn subtract_product<T: Copy + Mul<Output = T> + SubAssign>(row: &mut [T], factor: T, later: &[T]) {
    let pairs = row.iter_mut().zip(later);
    pairs.for_each(|(x, later)| *x -= factor * *later);
}

fn unit_factor(n: usize, l: &[f32]) -> Factor {
    let diagonal: Vec<f32> = (0..n).map(|j| l[j * n + j]).collect();
    Factor {
        feedback: Strips::new(n, |i, j| {
            if i < j {
                l[j * n + i] / diagonal[j]
            } else {
                0.0
            }
        }),
        pivots: diagonal.iter().map(|x| x * x).collect(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A positive definite matrix with a wide spectrum.
    pub fn moments(n: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1 << 24) as f64 - 0.5
        };
        let rows = 2 * n;
        let x: Vec<f64> = (0..rows * n)
            .map(|i| uniform() * (1.0 + 3.0 / (1 + i % n) as f64))
            .collect();
        let mut m = vec![0.0; n * n];
        for (i, row) in m.chunks_exact_mut(n).enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                let sum: f64 = (0..rows).map(|k| x[k * n + i] * x[k * n + j]).sum();
                *value = (sum / rows as f64 + if i == j { 0.01 } else { 0.0 }) as f32;
            }
        }
        m
    }

    #[test]
    fn the_factors_multiply_to_the_matrix() {
        for n in [1, 7, 64, 65, 200] {
            let m = moments(n);
            let factor = factor(Isa::detect(), n, &m).unwrap();
            let l = |j: usize, i: usize| match i == j {
                true => f64::from(factor.pivots[j]).sqrt(),
                false => f64::from(factor.feedback.at(i, j)) * f64::from(factor.pivots[j]).sqrt(),
            };
            for i in 0..n {
                for j in 0..=i {
                    let sum: f64 = (i..n).map(|k| l(k, i) * l(k, j)).sum();
                    assert!((sum - f64::from(m[i * n + j])).abs() < 2e-5, "{n}: {i} {j}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        let mut m = moments(40);
        m[17 * 40 + 17] = -1.0;
        assert!(factor(Isa::detect(), 40, &m).is_none());
        m[17 * 40 + 17] = f32::NAN;
        assert!(factor(Isa::detect(), 40, &m).is_none());
    }
}
