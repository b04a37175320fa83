//! Rows that another machine holds and multiplies with matrices: nearly all of the work of rounding with feedback.
//!
//! What is held: errors of weights while they are rounded, rows of a factor while it is computed, right-hand sides that
//! were solved. Knows neither of them.

use std::ops::Range;

use crate::error::Result;

/// Columns that are summed in f32 where sums are exact.
pub const SUMMED_COLUMNS: usize = 512;

/// A machine that multiplies rows that it holds.
pub trait RowProducts: Sync {
    /// Rows of so many columns, all zero; nothing where there is no room for them, and this computer multiplies.
    ///
    /// # Errors
    /// The machine fails.
    fn hold(&self, rows: usize, columns: usize) -> Result<Option<Box<dyn HeldRows + '_>>>;
}

/// Rows on a machine.
pub trait HeldRows {
    /// Columns from `first` on are these now, `[column, row]`.
    ///
    /// # Errors
    /// The machine fails.
    fn set(&mut self, first: usize, columns: &[f32]) -> Result<()>;

    /// `sum over k of held[row][k] part[k][j]` for the columns k of `inputs`: `part [inputs, width]` gives `[width, row]`.
    ///
    /// # Errors
    /// The machine fails.
    fn times(&mut self, inputs: Range<usize>, part: &[f32], width: usize) -> Result<Vec<f32>>;

    /// The same, where sums of more than [`SUMMED_COLUMNS`] columns lose nothing more.
    ///
    /// # Errors
    /// The machine fails.
    fn times_exactly(
        &mut self,
        inputs: Range<usize>,
        part: &[f32],
        width: usize,
    ) -> Result<Vec<f64>> {
        let mut sums = Vec::new();
        let parts = part.chunks(SUMMED_COLUMNS * width);
        for (part, first) in parts.zip(inputs.clone().step_by(SUMMED_COLUMNS)) {
            let found = self.times(first..first + part.len() / width, part, width)?;
            sums.resize(found.len(), 0.0);
            let pairs = sums.iter_mut().zip(found);
            pairs.for_each(|(sum, found)| *sum += f64::from(found));
        }
        Ok(sums)
    }
}
