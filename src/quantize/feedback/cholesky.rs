//! The second moments of a layer's inputs, factored from the last input to the first.
//!
//! Enters: a symmetric matrix M `[n, n]`. Leaves: `M = L^T L` as unit factors and pivots. Computes in f32 with sums in one
//! order, so that the bits do not depend on the machine.

use rayon::prelude::*;

use crate::backend::cpu::gram::{CHUNK_ROWS, Columns, products};
use crate::backend::cpu::kernels::Isa;

/// Columns that lie side by side in [`Strips`].
pub const STRIP: usize = 8;
/// Rows that are factored together.
const BLOCK: usize = 64;

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
    pub fn part(&self, strip: usize, rows: std::ops::Range<usize>) -> &[f32] {
        let begin = strip * self.n;
        &self.values[(begin + rows.start) * STRIP..(begin + rows.end) * STRIP]
    }

    /// Rows `rows` of columns `columns`, row-major.
    pub fn dense(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>) -> Vec<f32> {
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
    let mut end = n;
    while end > 0 {
        let begin = (end - 1) / BLOCK * BLOCK;
        let (above, below) = l.split_at_mut(end * n);
        let rows = &mut above[begin * n..];
        for (row, i) in rows.chunks_exact_mut(n).zip(begin..) {
            row[..end].copy_from_slice(&matrix[i * n..][..end]);
        }
        symmetrize(rows, n, begin..end, matrix);
        for first in (0..n - end).step_by(CHUNK_ROWS) {
            let chunk = first..(first + CHUNK_ROWS).min(n - end);
            let columns = |range| Columns {
                values: below,
                stride: n,
                range,
            };
            let subtract = |out: &mut f32, sum: f32| *out -= sum;
            products(
                isa,
                chunk,
                &columns(0..end),
                &columns(begin..end),
                false,
                rows,
                n,
                subtract,
            );
        }
        let corner = factor_corner(rows, n, begin..end)?;
        solve(rows, n, begin..end, &corner);
        end = begin;
    }
    Some(unit_factor(n, &l))
}

/// Fills the part of a diagonal block above the diagonal.
fn symmetrize(rows: &mut [f32], n: usize, block: std::ops::Range<usize>, matrix: &[f32]) {
    for (row, i) in rows.chunks_exact_mut(n).zip(block.clone()) {
        for j in i + 1..block.end {
            row[j] = matrix[j * n + i];
        }
    }
}

/// The factor of the diagonal block, `[size, size]` f64, lower triangular.
fn factor_corner(rows: &[f32], n: usize, block: std::ops::Range<usize>) -> Option<Vec<f64>> {
    let size = block.len();
    let mut l = vec![0.0f64; size * size];
    for i in (0..size).rev() {
        for j in (0..=i).rev() {
            let mut sum = f64::from(rows[j * n + block.start + i]);
            for k in i + 1..size {
                sum -= l[k * size + i] * l[k * size + j];
            }
            if i == j {
                // A pivot below the rounding errors of its own sum is noise.
                let floor =
                    f64::from(f32::EPSILON) * f64::from(rows[i * n + block.start + i].abs());
                if !(sum > floor && sum.is_finite()) {
                    return None;
                }
                l[i * size + i] = sum.sqrt();
            } else {
                l[i * size + j] = sum / l[i * size + i];
            }
        }
    }
    Some(l)
}

/// Turns rows of what is left of M into rows of L.
fn solve(rows: &mut [f32], n: usize, block: std::ops::Range<usize>, corner: &[f64]) {
    let size = block.len();
    for i in (0..size).rev() {
        let (head, tail) = rows.split_at_mut((i + 1) * n);
        let row = &mut head[i * n..];
        for (k, later) in (i + 1..size).zip(tail.chunks_exact(n)) {
            let factor = corner[k * size + i] as f32;
            let columns = row[..block.start].iter_mut().zip(later);
            columns.for_each(|(x, later)| *x -= factor * later);
        }
        let inverse = (1.0 / corner[i * size + i]) as f32;
        row[..block.start].iter_mut().for_each(|x| *x *= inverse);
        for (j, x) in row[block.clone()].iter_mut().enumerate() {
            *x = corner[i * size + j] as f32;
        }
    }
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
mod tests {
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
