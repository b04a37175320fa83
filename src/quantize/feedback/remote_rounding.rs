//! The same rounding where another machine chooses scales and codes too: this computer sends parts of the second moments and
//! of their factor, and packs what comes back.

use std::ops::Range;

use super::compiled::CompiledGrid;
use super::description::Search;
use super::held::{RoundingRows, RowProducts, RowsRounded};
use super::sweep::{Half, ROWS, Row};
use super::{CHUNK, Job, Rounded, chunks, halves_of, pack_panel};
use crate::backend::cpu::kernels::FLOAT_ROWS;
use crate::error::Result;
use crate::parallel;

impl Job<'_> {
    /// Rows that are rounded without regard to each other; nothing where the machine does not round by itself.
    pub(super) fn rounded_by(
        &self,
        machine: &dyn RowProducts,
        grid: &dyn CompiledGrid,
        rows: &[f32],
        out: &mut [u8],
    ) -> Result<Option<Rounded>> {
        let columns = self.how.moments.in_features();
        let count = rows.len() / columns;
        let description = grid.description();
        let Some(mut remote) = machine.rounding(&description, count, columns)? else {
            return Ok(None);
        };
        let at_once = remote.capacity().max(1);
        let tiles = rows
            .chunks(at_once * columns)
            .zip(out.chunks_mut(at_once * grid.row_bytes(columns)));
        let mut rounded = Rounded::default();
        for (rows, out) in tiles {
            let presets =
                matches!(description.search, Search::Preset).then(|| self.presets(grid, rows));
            remote.begin(&by_column(rows, columns), presets.as_deref())?;
            let found = self.steps(remote.as_mut())?;
            let overflow = pack(grid, rows, columns, &found, out);
            rounded += Rounded {
                loss: found.loss,
                overflow,
            };
        }
        Ok(Some(rounded))
    }

    /// The first pass, those after it, and what is lost.
    fn steps(&self, remote: &mut dyn RoundingRows) -> Result<RowsRounded> {
        let (matrix, factor) = (&self.how.moments.matrix, &self.how.moments.factor);
        let columns = matrix.n();
        for chunk in chunks(columns) {
            let part = factor.feedback.dense(0..chunk.end, chunk.clone());
            remote.sweep(chunk.clone(), &part, &factor.pivots[chunk])?;
        }
        let part = |chunk: &Range<usize>| matrix.dense(0..columns, chunk.clone());
        for _ in 0..self.how.passes {
            for chunk in chunks(columns) {
                remote.descend(chunk.clone(), &|| part(&chunk))?;
            }
        }
        for chunk in chunks(columns) {
            remote.add_loss(chunk.clone(), &|| part(&chunk))?;
        }
        remote.finish()
    }

    /// Scales that are chosen beforehand, `[sub-block][d, dmin, scale, min][row]`.
    fn presets(&self, grid: &dyn CompiledGrid, rows: &[f32]) -> Vec<f32> {
        let columns = self.how.moments.in_features();
        let panels = parallel::map(rows.chunks(ROWS * columns), |rows| {
            let rows: Vec<&[f32]> = rows.chunks_exact(columns).collect();
            let mut half = Half::new(&rows, columns, grid.sub());
            grid.preset(&mut half, &self.how.moments.factor.pivots);
            half
        });
        let count = rows.len() / columns;
        let mut scales = Vec::with_capacity(columns / grid.sub() * 4 * count);
        for part in 0..columns / grid.sub() * 4 {
            let lanes = panels
                .iter()
                .flat_map(|half| half.scales[part / 4][part % 4]);
            scales.extend(lanes.take(count));
        }
        scales
    }
}

/// `[row, column]` as `[column, row]`.
fn by_column(rows: &[f32], columns: usize) -> Vec<f32> {
    let count = rows.len() / columns;
    let mut turned = vec![0.0; rows.len()];
    let chunks = turned.chunks_mut(CHUNK * count);
    parallel::for_each(chunks.enumerate(), |(chunk, turned)| {
        let first = chunk * CHUNK;
        let width = turned.len() / count;
        for (row, values) in rows.chunks_exact(columns).enumerate() {
            for (column, value) in values[first..first + width].iter().enumerate() {
                turned[column * count + row] = *value;
            }
        }
    });
    turned
}

/// Packs rows whose codes and scales were found; says how many scales are too large.
fn pack(
    grid: &dyn CompiledGrid,
    rows: &[f32],
    columns: usize,
    found: &RowsRounded,
    out: &mut [u8],
) -> u64 {
    let count = rows.len() / columns;
    let panels = rows
        .chunks(FLOAT_ROWS * columns)
        .zip(out.chunks_mut(FLOAT_ROWS * grid.row_bytes(columns)));
    let overflow = parallel::map(panels.enumerate(), |(panel, (rows, out))| {
        let rows: Vec<&[f32]> = rows.chunks_exact(columns).collect();
        let mut halves = halves_of(&rows).map(|rows| Half::new(rows, columns, grid.sub()));
        for (index, half) in halves.iter_mut().enumerate() {
            let first = (panel * FLOAT_ROWS + index * ROWS).min(count);
            let lanes = first..(first + ROWS).min(count);
            read(&mut half.values, &found.values, count, lanes.clone());
            let scales = half.scales.as_flattened_mut();
            read(scales, &found.scales, count, lanes);
        }
        pack_panel(grid, &halves, columns, out)
    });
    overflow.iter().sum()
}

/// Lanes `lanes` of `from [_, count]`.
fn read(into: &mut [Row], from: &[f32], count: usize, lanes: Range<usize>) {
    for (row, values) in into.iter_mut().zip(from.chunks_exact(count)) {
        row[..lanes.len()].copy_from_slice(&values[lanes.clone()]);
    }
}
