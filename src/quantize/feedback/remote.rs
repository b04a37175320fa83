//! The same rounding where another machine multiplies errors with second moments and their factor: nearly all of the work.
//!
//! Enters and leaves: as in the module above. All rows go chunk by chunk together, so that products are large; where the
//! machine does not round by itself, scales and codes are chosen on this computer's threads as ever.

use std::ops::Range;

use super::cholesky::Strips;
use super::compiled::CompiledGrid;
use super::held::{HeldRows, RowProducts};
use super::sweep::{Half, ROWS, Row};
use super::{Job, Rounded, chunks, halves_of, loss_in, pack_panel};
use crate::backend::cpu::kernels::FLOAT_ROWS;
use crate::error::Result;
use crate::parallel;

/// Rows that are rounded together, and their errors on the machine.
struct Panels<'m> {
    halves: Vec<[Half; 2]>,
    errors: Box<dyn HeldRows + 'm>,
}

impl<'m> Panels<'m> {
    fn new(
        machine: &'m dyn RowProducts,
        rows: &[f32],
        columns: usize,
        half: impl Fn(&[&[f32]]) -> Half + Sync,
    ) -> Result<Option<Self>> {
        let panels = rows.len().div_ceil(FLOAT_ROWS * columns);
        let Some(errors) = machine.hold(panels * FLOAT_ROWS, columns)? else {
            return Ok(None);
        };
        let halves = parallel::map(rows.chunks(FLOAT_ROWS * columns), |rows| {
            let rows: Vec<&[f32]> = rows.chunks_exact(columns).collect();
            halves_of(&rows).map(&half)
        });
        Ok(Some(Self { halves, errors }))
    }

    /// Products of errors in `inputs` with columns `chunk` of a matrix, by panel.
    fn products(
        &mut self,
        matrix: &Strips,
        inputs: Range<usize>,
        chunk: &Range<usize>,
    ) -> Result<Vec<[Vec<Row>; 2]>> {
        let part = matrix.dense(inputs.clone(), chunk.clone());
        let found = match inputs.is_empty() {
            true => vec![0.0; chunk.len() * self.halves.len() * FLOAT_ROWS],
            false => self.errors.times(inputs, &part, chunk.len())?,
        };
        let rows = self.halves.len() * FLOAT_ROWS;
        let half = |panel: usize, half: usize| {
            let first = panel * FLOAT_ROWS + half * ROWS;
            let columns = found.chunks_exact(rows);
            columns
                .map(|column| *column[first..].first_chunk().expect("panels are whole"))
                .collect()
        };
        let panel = |panel: usize| [0, 1].map(|h| half(panel, h));
        Ok(parallel::map(0..self.halves.len(), panel))
    }

    /// Tells the machine what errors of a chunk are now.
    fn send(&mut self, chunk: Range<usize>) -> Result<()> {
        let halves = &self.halves;
        let column = |column: usize| {
            halves
                .iter()
                .flatten()
                .flat_map(move |half| half.errors[column])
        };
        let errors: Vec<f32> = chunk.clone().flat_map(column).collect();
        self.errors.set(chunk.start, &errors)
    }

    /// `tr(E M E^T)` of what was sent.
    fn loss(&mut self, matrix: &Strips) -> Result<f64> {
        let mut loss = 0.0;
        for chunk in chunks(matrix.n()) {
            let gradients = self.products(matrix, 0..matrix.n(), &chunk)?;
            let panels = self.halves.iter().zip(&gradients);
            loss += panels
                .map(|(halves, gradients)| loss_in(halves, chunk.clone(), gradients))
                .sum::<f64>();
        }
        Ok(loss)
    }
}

impl Job<'_> {
    /// Rows that are rounded without regard to each other.
    pub(super) fn panels_on(
        &self,
        machine: &dyn RowProducts,
        grid: &dyn CompiledGrid,
        rows: &[f32],
        out: &mut [u8],
    ) -> Result<Rounded> {
        let columns = self.how.moments.in_features();
        let (matrix, factor) = (&self.how.moments.matrix, &self.how.moments.factor);
        if let Some(rounded) = self.rounded_by(machine, grid, rows, out)? {
            return Ok(rounded);
        }
        let panels = Panels::new(machine, rows, columns, |rows| {
            let mut half = Half::new(rows, columns, grid.sub());
            grid.preset(&mut half, &factor.pivots);
            half
        })?;
        let Some(mut panels) = panels else {
            return Ok(self.panels(grid, rows, out, None));
        };
        for chunk in chunks(columns) {
            let repairs = panels.products(&factor.feedback, 0..chunk.start, &chunk)?;
            let work = panels.halves.iter_mut().zip(repairs);
            parallel::for_each(work, |(halves, repairs)| {
                self.first_pass(grid, halves, chunk.clone(), repairs);
            });
            panels.send(chunk)?;
        }
        for _ in 0..self.how.passes {
            for chunk in chunks(columns) {
                let gradients = panels.products(matrix, 0..columns, &chunk)?;
                let work = panels.halves.iter_mut().zip(gradients);
                parallel::for_each(work, |(halves, gradients)| {
                    let mut changes = vec![[0.0; ROWS]; columns];
                    self.descend(grid, halves, chunk.clone(), gradients, &mut changes);
                });
                panels.send(chunk)?;
            }
        }
        let loss = panels.loss(matrix)?;
        let row_bytes = grid.row_bytes(columns);
        let packed = panels
            .halves
            .iter()
            .zip(out.chunks_mut(FLOAT_ROWS * row_bytes));
        let overflow = parallel::map(packed, |(halves, out)| {
            pack_panel(grid, halves, columns, out)
        });
        Ok(Rounded {
            loss,
            overflow: overflow.iter().sum(),
        })
    }
}

/// `tr(E M E^T)` for errors of whole rows, `[n, in_features]`; nothing where the machine has no room.
pub(super) fn loss(
    machine: &dyn RowProducts,
    errors: &[f32],
    matrix: &Strips,
) -> Result<Option<f64>> {
    let columns = matrix.n();
    let of_errors = |rows: &[&[f32]]| Half::of_errors(rows, columns);
    let Some(mut panels) = Panels::new(machine, errors, columns, of_errors)? else {
        return Ok(None);
    };
    for chunk in chunks(columns) {
        panels.send(chunk)?;
    }
    panels.loss(matrix).map(Some)
}
