//! Rows that another machine holds and multiplies with matrices: nearly all of the work of rounding with feedback.
//!
//! What is held: errors of weights while they are rounded, rows of a factor while it is computed, right-hand sides that
//! were solved. Knows neither of them. A machine may also round rows by itself, scales and codes included.

use std::ops::Range;

use super::description::GridDescription;
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

    /// Rows of so many columns that the machine rounds to a grid by itself, `rows` of them or as many as there is room for;
    /// nothing where it cannot, and this computer chooses scales and codes.
    ///
    /// # Errors
    /// The machine fails.
    fn rounding(
        &self,
        grid: &GridDescription,
        rows: usize,
        columns: usize,
    ) -> Result<Option<Box<dyn RoundingRows + '_>>> {
        let _ = (grid, rows, columns);
        Ok(None)
    }
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

/// Rows that a machine rounds by itself, chunk of columns after chunk. All arrays are `[column, row]`.
pub trait RoundingRows {
    /// Rows that it takes at a time.
    fn capacity(&self) -> usize;

    /// From here on these rows, whose scales are `scales [sub-block][d, dmin, scale, min][row]` where they are chosen
    /// beforehand.
    ///
    /// # Errors
    /// The machine fails.
    fn begin(&mut self, wanted: &[f32], scales: Option<&[f32]>) -> Result<()>;

    /// Rounds a chunk, all before it rounded: `factor [chunk.end, chunk]` are the factor's rows up to the chunk's end, `pivots`
    /// what an error in each of the chunk's columns counts.
    ///
    /// # Errors
    /// The machine fails.
    fn sweep(&mut self, chunk: Range<usize>, factor: &[f32], pivots: &[f32]) -> Result<()>;

    /// Moves scales and codes of a chunk, all columns rounded; `moments` gives `[columns, chunk]`, the same whenever it is
    /// asked.
    ///
    /// # Errors
    /// The machine fails.
    fn descend(&mut self, chunk: Range<usize>, moments: &dyn Fn() -> Vec<f32>) -> Result<()>;

    /// What a chunk adds to the loss `tr(E M E^T)`, summed by the machine.
    ///
    /// # Errors
    /// The machine fails.
    fn add_loss(&mut self, chunk: Range<usize>, moments: &dyn Fn() -> Vec<f32>) -> Result<()>;

    /// What became of the rows.
    ///
    /// # Errors
    /// The machine fails.
    fn finish(&mut self) -> Result<RowsRounded>;
}

/// Rows that a machine rounded.
#[derive(Debug, Clone, PartialEq)]
pub struct RowsRounded {
    /// Values of codes, `[column, row]`.
    pub values: Vec<f32>,
    /// `[sub-block][d, dmin, scale, min][row]`.
    pub scales: Vec<f32>,
    /// Sum over all rows.
    pub loss: f64,
}
