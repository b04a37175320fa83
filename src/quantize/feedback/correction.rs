//! Targets that make up for what the rounded network feeds a layer instead of its original inputs.
//!
//! Enters: weights W, moments `M = E[u^T u]` of present inputs u, their cross moments `C = E[v^T u]` with original inputs
//! v. Leaves: `W + share W (C - M) (M + damping)^-1`: with share 1 the weights that, unrounded, come closest to the original
//! outputs on present inputs.
//!
//! Source: GPTAQ (ICML 2025), which applies a share of it column by column; here it is solved for at once. Writers that
//! also make up for what the residual stream lacks where it enters their block were tried and gained nothing.

use rayon::prelude::*;

use super::InputMoments;
use super::cholesky::Factor;
use crate::backend::cpu::gram::{CHUNK_ROWS, Columns, products};
use crate::backend::cpu::kernels::Isa;
use crate::calibrate::second_moments::{CrossMoments, SecondMoments};

/// What is known of a layer's inputs in both networks.
#[derive(Debug, Clone, Copy)]
pub struct Correction<'a> {
    /// C.
    pub cross: &'a CrossMoments,
    /// M.
    pub seen: &'a SecondMoments,
    /// How much of the correction is applied (beta).
    pub share: f64,
}

impl Correction<'_> {
    /// The corrected rows, `[n, in_features]`; `moments` are those of [`Self::seen`], made ready for rounding.
    pub fn apply(&self, isa: Isa, rows: &[f32], moments: &InputMoments) -> Vec<f32> {
        let n = moments.in_features();
        let differences = differences(self.cross, self.seen, moments.unit);
        let mut pulls = pulls(isa, rows, &differences, n);
        pulls
            .par_chunks_mut(n)
            .for_each(|row| solve(row, &moments.factor));
        let share = self.share as f32;
        pulls
            .iter_mut()
            .zip(rows)
            .for_each(|(pull, value)| *pull = value + share * *pull);
        pulls
    }
}

/// `C - M` in units of M's mean diagonal, `[n, n]`.
fn differences(cross: &CrossMoments, seen: &SecondMoments, unit: f64) -> Vec<f32> {
    let n = seen.n;
    let (per_pair, per_token) = (1.0 / cross.tokens as f64, 1.0 / seen.weight);
    let difference = |at: usize| {
        let (i, j) = (at / n, at % n);
        let moment = seen.sums[i.min(j) * n + i.max(j)] * per_token;
        ((cross.sums[at] * per_pair - moment) / unit) as f32
    };
    (0..n * n).map(difference).collect()
}

/// `W (C - M)`.
fn pulls(isa: Isa, rows: &[f32], differences: &[f32], n: usize) -> Vec<f32> {
    let count = rows.len() / n;
    let mut transposed = vec![0.0; rows.len()];
    for (i, row) in rows.chunks_exact(n).enumerate() {
        row.iter()
            .enumerate()
            .for_each(|(k, value)| transposed[k * count + i] = *value);
    }
    let mut out = vec![0.0; rows.len()];
    let weights = Columns {
        values: &transposed,
        stride: count,
        range: 0..count,
    };
    let differences = Columns {
        values: differences,
        stride: n,
        range: 0..n,
    };
    for first in (0..n).step_by(CHUNK_ROWS) {
        let chunk = first..(first + CHUNK_ROWS).min(n);
        products(
            isa,
            chunk,
            &differences,
            &weights,
            false,
            &mut out,
            n,
            |out, sum| *out += sum,
        );
    }
    out
}

/// Replaces a row a by `a M^-1`, with `M = T D T^T`.
fn solve(row: &mut [f32], factor: &Factor) {
    let n = row.len();
    for j in (0..n).rev() {
        let later = (j + 1..n).map(|i| f64::from(row[i]) * f64::from(factor.feedback.at(j, i)));
        row[j] = (f64::from(row[j]) - later.sum::<f64>()) as f32;
    }
    row.iter_mut()
        .zip(&factor.pivots)
        .for_each(|(value, pivot)| *value /= pivot);
    for j in 0..n {
        let earlier = (0..j).map(|i| f64::from(row[i]) * f64::from(factor.feedback.at(i, j)));
        row[j] = (f64::from(row[j]) - earlier.sum::<f64>()) as f32;
    }
}
