//! A grid as the walk over rows sees it: whole chunks of sixteen rows at a time.
//!
//! The walk asks through a table and so is compiled once; what it asks for is compiled for each grid and each CPU.

use std::ops::Range;

use pulp::Arch;

use super::super::ScaleOverflow;
use super::cholesky::{Factor, Strips};
use super::descent::Pass;
use super::description::GridDescription;
use super::grid::{FeedbackGrid, RoundedRow};
use super::sweep::{FirstPass, Half, Row};

/// What rounding does to a chunk of columns of sixteen rows.
pub trait GridSteps: Sync + Send {
    /// Columns that share scales.
    fn sub(&self) -> usize;

    /// All that another machine has to know.
    fn description(&self) -> GridDescription;

    /// See [`FeedbackGrid::preset`].
    fn preset(&self, half: &mut Half, pivots: &[f32]);

    /// The first pass over `chunk`, all that came before it done: `targets` as in [`FirstPass`].
    fn first_pass(
        &self,
        half: &mut Half,
        chunk: Range<usize>,
        targets: &mut [Row],
        factor: &Factor,
    );

    /// Moves scales and codes of `chunk`: `gradient` and `changes` as in [`Pass`].
    fn descend(
        &self,
        half: &mut Half,
        chunk: Range<usize>,
        gradient: &mut [Row],
        changes: &mut [Row],
        moments: &Strips,
    );

    /// Bytes of a packed row.
    fn row_bytes(&self, columns: usize) -> usize;

    /// Packs one row.
    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow;
}

/// A grid whose sub-blocks have `SUB` columns, known where it is compiled.
pub struct Steps<G, const SUB: usize>(pub G);

impl<G: FeedbackGrid, const SUB: usize> GridSteps for Steps<G, SUB> {
    fn sub(&self) -> usize {
        SUB
    }

    fn description(&self) -> GridDescription {
        self.0.description()
    }

    fn preset(&self, half: &mut Half, pivots: &[f32]) {
        self.0.preset(half, pivots);
    }

    fn first_pass(
        &self,
        half: &mut Half,
        chunk: Range<usize>,
        targets: &mut [Row],
        factor: &Factor,
    ) {
        Arch::new().dispatch(FirstPass::<G, SUB> {
            half,
            chunk,
            targets,
            factor,
            grid: &self.0,
        });
    }

    fn descend(
        &self,
        half: &mut Half,
        chunk: Range<usize>,
        gradient: &mut [Row],
        changes: &mut [Row],
        moments: &Strips,
    ) {
        Arch::new().dispatch(Pass::<G, SUB> {
            half,
            chunk,
            gradient,
            changes,
            moments,
            grid: &self.0,
        });
    }

    fn row_bytes(&self, columns: usize) -> usize {
        self.0.row_bytes(columns)
    }

    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
        self.0.pack_row(row, out)
    }
}
