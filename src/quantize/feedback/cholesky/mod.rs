//! The second moments of a layer's inputs, factored from the last input to the first.
//!
//! Enters: a symmetric matrix M `[n, n]`. Leaves: `M = L^T L` as unit factors and pivots. Computes in f32 with sums in one
//! order, so that the bits do not depend on the machine.

mod corner;
mod panels;
mod strips;

use std::ops::Range;

use super::held::RowProducts;
use crate::backend::cpu::kernels::{FLOAT_ROWS, Isa, LANES};
use crate::backend::cpu::multiversion::multiversion;
use crate::error::Result;
use crate::parallel;
use corner::Corner;
use panels::{Coefficients, Panel, panels};
pub use strips::{STRIP, Strips};

/// Rows of a diagonal block that are solved for by its inverse.
const BLOCK: usize = 64;
/// Rows that take what those below explain together.
const OUTER_BLOCK: usize = 128;
/// Rows that are factored here where another machine multiplies: whole outer blocks.
const ROWS_HERE: usize = 256;
/// Rows of L that a thread copies at a time.
const DENSE_ROWS: usize = 32;

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

/// Factors the symmetric matrix whose row `i`, column `j` is `upper(i, j)` for `i <= j`.
///
/// Gives `None` where it is not positive definite to the precision of f32, or holds values that are no numbers.
pub fn factor(isa: Isa, n: usize, upper: impl Fn(usize, usize) -> f32 + Sync) -> Option<Factor> {
    let mut panels = panels(n, upper);
    factor_rows(isa, &mut panels, 0..n)?;
    Some(unit_factor(n, &panels))
}

/// The same, with products on another machine.
///
/// # Errors
/// The machine fails.
pub fn factor_on(
    machine: &dyn RowProducts,
    n: usize,
    upper: impl Fn(usize, usize) -> f32 + Sync,
) -> Result<Option<Factor>> {
    let isa = Isa::detect();
    let Some(mut done) = machine.hold(n, n)? else {
        return Ok(factor(isa, n, upper));
    };
    let mut panels = panels(n, upper);
    for begin in (0..n).step_by(ROWS_HERE).rev() {
        let rows = begin..n.min(begin + ROWS_HERE);
        if rows.end < n {
            let part = dense(&panels, rows.end..n, rows.clone());
            let sums = done.times_exactly(rows.end..n, &part, rows.len())?;
            let subtract = |panel: &mut Panel| panel.subtract_sums(&rows, &sums, n);
            parallel::for_each(&mut panels, subtract);
        }
        if factor_rows(isa, &mut panels, rows.clone()).is_none() {
            return Ok(None);
        }
        // Nothing comes before the first rows.
        if begin > 0 {
            done.set(begin, &dense(&panels, rows, 0..n))?;
        }
    }
    Ok(Some(unit_factor(n, &panels)))
}

/// Factors rows from which everything behind them is taken already.
fn factor_rows(isa: Isa, panels: &mut [Panel], rows: Range<usize>) -> Option<()> {
    for begin in rows.clone().step_by(OUTER_BLOCK).rev() {
        let block = begin..rows.end.min(begin + OUTER_BLOCK);
        let behind = Coefficients::behind(panels, block.end..rows.end, block.clone());
        let (left, own) = panels.split_at_mut(begin / FLOAT_ROWS);
        let own = &mut own[..block.len().div_ceil(FLOAT_ROWS)];
        let subtract = |panel: &mut Panel| panel.subtract(isa, &behind);
        parallel::for_each(&mut *own, subtract);
        let corner = || Corner::factor(isa, own, block);
        let (corner, ()) = rayon::join(corner, || parallel::for_each(&mut *left, subtract));
        let corner = corner?;
        parallel::for_each(left, |panel| corner.solve(isa, panel));
    }
    Some(())
}

/// Rows of L in some columns, row-major, zero behind the diagonal.
fn dense(panels: &[Panel], rows: Range<usize>, columns: Range<usize>) -> Vec<f32> {
    let mut values = vec![0.0; rows.len() * columns.len()];
    let parts = values.chunks_mut(DENSE_ROWS * columns.len());
    let parts = parts.zip(rows.step_by(DENSE_ROWS));
    parallel::for_each(parts, |(lines, first)| {
        for (line, row) in lines.chunks_exact_mut(columns.len()).zip(first..) {
            for (value, j) in line.iter_mut().zip(columns.start..columns.end.min(row + 1)) {
                *value = panels[j / FLOAT_ROWS].at(row, j % FLOAT_ROWS);
            }
        }
    });
    values
}

multiversion! {
    /// `row -= factor * later`
    pub(super) fn subtract_scaled(row: &mut [f64], factor: f64, later: &[f64]) = subtract_product;
}

#[inline(always)]
fn subtract_product(row: &mut [f64], factor: f64, later: &[f64]) {
    let pairs = row.iter_mut().zip(later);
    pairs.for_each(|(x, later)| *x -= factor * *later);
}

fn unit_factor(n: usize, panels: &[Panel]) -> Factor {
    let diagonal = |j: usize| panels[j / FLOAT_ROWS].at(j, j % FLOAT_ROWS);
    let diagonal: Vec<f32> = (0..n).map(diagonal).collect();
    let feedback = Strips::of(n, |columns| {
        let mut strip = vec![[0.0; STRIP]; columns.end];
        for (block, rows) in strip.chunks_mut(LANES).enumerate() {
            let panel = &panels[block * LANES / FLOAT_ROWS];
            let mut shares = [[0.0; LANES]; STRIP];
            for (shares, j) in shares.iter_mut().zip(columns.clone()) {
                *shares = panel.lanes(j, block % 2).map(|x| x / diagonal[j]);
            }
            for (lane, row) in rows.iter_mut().enumerate() {
                let later = (block * LANES + lane + 1).saturating_sub(columns.start);
                for at in later..STRIP {
                    row[at] = shares[at][lane];
                }
            }
        }
        strip.into_flattened()
    });
    Factor {
        feedback,
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
            let factor = factor(Isa::detect(), n, |i, j| m[i * n + j]).unwrap();
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
        assert!(factor(Isa::detect(), 40, |i, j| m[i * 40 + j]).is_none());
        m[17 * 40 + 17] = f32::NAN;
        assert!(factor(Isa::detect(), 40, |i, j| m[i * 40 + j]).is_none());
    }
}
