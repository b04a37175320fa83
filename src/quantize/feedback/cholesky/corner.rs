//! The diagonal block of a factorization, small enough for f64, and what it does to the rest of its rows.

use std::ops::Range;

use super::panels::{Coefficients, Panel};
use super::{BLOCK, STRIP, subtract_scaled};
use crate::backend::cpu::kernels::{FLOAT_ROWS, Isa};

/// A factored diagonal block.
pub struct Corner {
    /// Of each sub-block, from the first: what later rows of the corner take from its rows, and the inverse of its own.
    steps: Vec<[Coefficients; 2]>,
}

impl Corner {
    /// Factors what is left of the diagonal block `block`, which `panels` hold, and writes it there.
    ///
    /// Gives `None` where it is not positive definite.
    pub fn factor(isa: Isa, panels: &mut [Panel], block: Range<usize>) -> Option<Self> {
        let size = block.len();
        let mut l = vec![0.0; size * size];
        for (i, row) in l.chunks_exact_mut(size).enumerate() {
            for (j, value) in row[..=i].iter_mut().enumerate() {
                let panel = &panels[j / FLOAT_ROWS];
                *value = f64::from(panel.at(block.start + i, j % FLOAT_ROWS));
            }
        }
        factor_in_place(isa, &mut l, size)?;
        for (i, row) in l.chunks_exact(size).enumerate() {
            for (j, value) in row[..=i].iter().enumerate() {
                let panel = &mut panels[j / FLOAT_ROWS];
                panel.set(block.start + i, j % FLOAT_ROWS, *value as f32);
            }
        }
        let firsts = block.clone().step_by(BLOCK);
        let steps = firsts.map(|first| {
            let own = first..block.end.min(first + BLOCK);
            let inside = own.start - block.start..own.end - block.start;
            let inverse = inverse(isa, &l, size, inside);
            [
                coefficients((&l, size, block.start), &own, own.end..block.end),
                coefficients((&inverse, own.len(), first), &own, own.clone()),
            ]
        });
        Some(Self {
            steps: steps.collect(),
        })
    }

    /// Turns a panel's rows of what is left of M into rows of L.
    pub fn solve(&self, isa: Isa, panel: &mut Panel) {
        for [later, inverse] in self.steps.iter().rev() {
            panel.subtract(isa, later);
            panel.multiply(isa, inverse);
        }
    }
}

/// Of a dense matrix with rows of `width` values, whose first row and column are number `first`.
fn coefficients(
    (matrix, width, first): (&[f64], usize, usize),
    columns: &Range<usize>,
    rows: Range<usize>,
) -> Coefficients {
    Coefficients::new(columns.clone(), rows, |k, j| {
        let row = &matrix[(k - first) * width..][j - first..columns.end - first];
        let mut eight = [0.0; STRIP];
        let values = eight.iter_mut().zip(row);
        values.for_each(|(out, value)| *out = *value as f32);
        eight
    })
}

/// `M = L^T L` for a lower triangle `[size, size]`, from the last row to the first.
fn factor_in_place(isa: Isa, l: &mut [f64], size: usize) -> Option<()> {
    let diagonal: Vec<f64> = (0..size).map(|i| l[i * size + i]).collect();
    for (i, left) in diagonal.iter().enumerate().rev() {
        let (above, row) = l.split_at_mut(i * size);
        let row = &mut row[..=i];
        // A pivot below the rounding errors of its own sum is noise.
        let floor = f64::from(f32::EPSILON) * left.abs();
        if !(row[i] > floor && row[i].is_finite()) {
            return None;
        }
        let pivot = row[i].sqrt();
        row[..i].iter_mut().for_each(|x| *x /= pivot);
        row[i] = pivot;
        for (j, above) in above.chunks_exact_mut(size).enumerate() {
            subtract_scaled(isa, &mut above[..=j], row[j], &row[..=j]);
        }
    }
    Some(())
}

/// The inverse of a diagonal block of a lower triangle `[size, size]`, itself one: dense.
fn inverse(isa: Isa, l: &[f64], size: usize, block: Range<usize>) -> Vec<f64> {
    let width = block.len();
    let mut inverse = vec![0.0; width * width];
    for i in 0..width {
        let (done, row) = inverse.split_at_mut(i * width);
        let row = &mut row[..=i];
        let l = &l[(block.start + i) * size + block.start..][..=i];
        row[i] = 1.0;
        for (k, done) in done.chunks_exact(width).enumerate() {
            subtract_scaled(isa, &mut row[..=k], l[k], &done[..=k]);
        }
        row.iter_mut().for_each(|x| *x /= l[i]);
    }
    inverse
}
