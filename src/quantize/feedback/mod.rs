//! Rounding with error feedback onto the grids of ggml's types: GPTQ, with scales chosen on the way.
//!
//! Enters: rows of a weight, second moments of its inputs. Leaves: packed rows and what they lose. Knows no model and no
//! calibration. Rows that are rounded together are independent of each other, so threads change nothing.
//!
//! Source: GPTQ, arXiv:2210.17323. We depart from it: one factorization without an inverse ([`cholesky`]); scales are
//! chosen when their sub-block is reached, by simulated feedback (`sweep`); passes of coordinate descent follow over
//! scales and codes (`descent`). Where gradients at the outputs are known, rows repair each other too (`outputs`).

pub mod cholesky;
mod compiled;
mod correction;
mod descent;
mod description;
mod grid;
mod held;
mod integer_grid;
mod moments;
mod outputs;
mod remote;
mod remote_rounding;
mod scales;
mod sweep;
#[cfg(test)]
mod tests;
mod triangular;

use std::ops::{AddAssign, Range};

use super::integer::IntegerGrid;
pub use super::integer::ScaleFloat;
pub use super::super_block::Sweep;
pub use super::symmetric::CodeValues;
use crate::backend::cpu::kernels::{self, FLOAT_ROWS, Isa, MAX_TOKENS};
use crate::error::Result;
use crate::formats::GgmlType;
use crate::formats::packed::Width;
use crate::parallel;
use cholesky::{STRIP, Strips};
use compiled::{Compiled, CompiledGrid};
pub use correction::Correction;
pub use description::{GridDescription, Search};
pub use grid::Lattice;
use grid::RoundedRow;
pub use held::{HeldRows, RoundingRows, RowProducts, RowsRounded, SUMMED_COLUMNS};
pub use moments::{Damping, InputMoments};
pub use outputs::OutputFactor;
use sweep::{Half, ROWS, Row};

/// Columns that are rounded between two products with everything before them: a multiple of every block.
const CHUNK: usize = 256;

/// Errors that are multiplied before the sum of the products is added to others: as many as devices' kernels take, so that
/// codes are the same there.
const SUMMED: usize = 256;

/// What rounding cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rounded {
    /// `tr(E M E^T)`, M the second moments with their damping, E wanted less rounded; what rows repair for each other is
    /// part of what was wanted.
    pub loss: f64,
    /// Scales too large for F16.
    pub overflow: u64,
}

impl AddAssign for Rounded {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.overflow += other.overflow;
    }
}

/// The grid of a type, where it has one.
fn grid_of(ty: GgmlType) -> Option<&'static dyn CompiledGrid> {
    Some(match ty {
        GgmlType::Q4_0 => &Compiled::<_, 32>(grid::Q4_0),
        GgmlType::Q4_1 => &Compiled::<_, 32>(grid::Q4_1),
        GgmlType::Q5_0 => &Compiled::<_, 32>(grid::Q5_0),
        GgmlType::Q5_1 => &Compiled::<_, 32>(grid::Q5_1),
        GgmlType::Q8_0 => &Compiled::<_, 32>(grid::Q8_0),
        GgmlType::IQ4_NL => &Compiled::<_, 32>(grid::IQ4_NL),
        GgmlType::MXFP4 => &Compiled::<_, 32>(grid::MXFP4),
        GgmlType::Q2_K => &Compiled::<_, 16>(grid::Q2_K),
        GgmlType::Q3_K => &Compiled::<_, 16>(grid::Q3_K),
        GgmlType::Q4_K => &Compiled::<_, 32>(grid::Q4_K),
        GgmlType::Q5_K => &Compiled::<_, 32>(grid::Q5_K),
        GgmlType::Q6_K => &Compiled::<_, 16>(grid::Q6_K),
        GgmlType::IQ4_XS => &Compiled::<_, 32>(grid::IQ4_XS),
        _ => return None,
    })
}

/// The steps of a grid that has feedback.
fn integer_grid_of(grid: IntegerGrid) -> Box<dyn CompiledGrid> {
    use integer_grid::{Groups, ROWS_SUB, Rows};
    match (grid.width, grid.group_size) {
        (Width::Eight, _) => Box::new(Compiled::<_, ROWS_SUB>(Rows(grid))),
        (Width::Four, Some(32)) => Box::new(Compiled::<_, 32>(Groups::<32>(grid))),
        (Width::Four, Some(64)) => Box::new(Compiled::<_, 64>(Groups::<64>(grid))),
        _ => Box::new(Compiled::<_, 128>(Groups::<128>(grid))),
    }
}

/// Whether a type can be rounded to with feedback.
pub fn can_feed_back(ty: GgmlType) -> bool {
    grid_of(ty).is_some()
}

/// Rounds whole rows.
///
/// `rows`: `[n, in_features]`, row-major: what the rounded weights should be; `how`: what repairs what, and how often
/// scales and codes are gone over again; `out`: exactly the bytes of n rows.
///
/// # Panics
/// The lengths do not belong together, rows are not whole blocks, or the type has no feedback (see [`can_feed_back`]).
pub fn quantize_rows(
    isa: Isa,
    ty: GgmlType,
    rows: &[f32],
    how: Feedback,
    out: &mut [u8],
) -> Rounded {
    Job::here(isa, how).rows(ty, rows, out).expect(HERE)
}

/// The same, with products on another machine. Where rows repair each other they stay here.
///
/// # Errors
/// The machine fails.
///
/// # Panics
/// As [`quantize_rows`].
pub fn quantize_rows_on(
    machine: &dyn RowProducts,
    ty: GgmlType,
    rows: &[f32],
    how: Feedback,
    out: &mut [u8],
) -> Result<Rounded> {
    Job::on(machine, how).rows(ty, rows, out)
}

/// Whether rows of so many columns can be rounded to an integer grid with feedback.
pub fn can_feed_back_integers(grid: &IntegerGrid, columns: usize) -> bool {
    let size = grid.group_columns(columns);
    let is_known = match grid.width {
        Width::Four => matches!(grid.group_size, Some(32 | 64 | 128)),
        Width::Eight => !grid.has_zero_point && size.is_multiple_of(integer_grid::ROWS_SUB),
    };
    is_known && grid.fits(columns)
}

/// Rounds whole rows to an integer grid; see [`quantize_rows`]. `out` takes integer rows.
///
/// # Panics
/// The lengths do not belong together, or the grid has no feedback (see [`can_feed_back_integers`]).
pub fn quantize_integers(
    isa: Isa,
    grid: IntegerGrid,
    rows: &[f32],
    how: Feedback,
    out: &mut [u8],
) -> Rounded {
    Job::here(isa, how).integers(grid, rows, out).expect(HERE)
}

/// The same, with products on another machine.
///
/// # Errors
/// The machine fails.
///
/// # Panics
/// As [`quantize_integers`].
pub fn quantize_integers_on(
    machine: &dyn RowProducts,
    grid: IntegerGrid,
    rows: &[f32],
    how: Feedback,
    out: &mut [u8],
) -> Result<Rounded> {
    Job::on(machine, how).integers(grid, rows, out)
}

/// [`loss`], with products on another machine.
///
/// # Errors
/// The machine fails.
pub fn loss_on(machine: &dyn RowProducts, errors: &[f32], moments: &InputMoments) -> Result<f64> {
    let found = remote::loss(machine, errors, &moments.matrix)?;
    Ok(found.unwrap_or_else(|| loss(Isa::detect(), errors, moments)))
}

/// `tr(E M E^T)` for errors of whole rows, `[n, in_features]`.
pub fn loss(isa: Isa, errors: &[f32], moments: &InputMoments) -> f64 {
    let columns = moments.in_features();
    let losses = parallel::map(errors.chunks(FLOAT_ROWS * columns), |rows| {
        let rows: Vec<&[f32]> = rows.chunks(columns).collect();
        let halves = halves_of(&rows).map(|rows| Half::of_errors(rows, columns));
        loss_of(isa, &halves, &moments.matrix)
    });
    losses.iter().sum()
}

/// What errors are repaired by.
#[derive(Debug, Clone, Copy)]
pub struct Feedback<'a> {
    /// Of the inputs.
    pub moments: &'a InputMoments,
    /// Of the outputs, of consecutive rows; empty where nothing is known of them.
    pub outputs: &'a [OutputFactor],
    /// Passes after the first.
    pub passes: usize,
}

impl<'a> Feedback<'a> {
    /// Rows apart.
    pub fn of_inputs(moments: &'a InputMoments, passes: usize) -> Self {
        Self {
            moments,
            outputs: &[],
            passes,
        }
    }
}

#[derive(Clone, Copy)]
struct Job<'a> {
    isa: Isa,
    how: Feedback<'a>,
    /// Who multiplies errors, if not this computer.
    machine: Option<&'a dyn RowProducts>,
}

/// Why rounding on this computer's threads gives a result.
const HERE: &str = "only other machines fail";

/// The sum, the same whoever was first.
fn in_order(rounded: Vec<Rounded>) -> Rounded {
    let mut sum = Rounded::default();
    rounded.into_iter().for_each(|part| sum += part);
    sum
}

/// The first sixteen rows and the rest.
fn halves_of<'r, 'a>(rows: &'r [&'a [f32]]) -> [&'r [&'a [f32]]; 2] {
    let (first, second) = rows.split_at(rows.len().min(ROWS));
    [first, second]
}

impl<'a> Job<'a> {
    fn here(isa: Isa, how: Feedback<'a>) -> Self {
        Self {
            isa,
            how,
            machine: None,
        }
    }

    fn on(machine: &'a dyn RowProducts, how: Feedback<'a>) -> Self {
        Self {
            isa: Isa::detect(),
            how,
            machine: Some(machine),
        }
    }

    fn rows(self, ty: GgmlType, rows: &[f32], out: &mut [u8]) -> Result<Rounded> {
        let columns = self.how.moments.in_features();
        assert!(columns.is_multiple_of(ty.block_elements()) && rows.len().is_multiple_of(columns));
        assert_eq!(ty.bytes_for(rows.len() as u64), Some(out.len() as u64));
        let Some(grid) = grid_of(ty) else {
            panic!("{ty} has no feedback")
        };
        self.run(grid, rows, out)
    }

    fn integers(self, grid: IntegerGrid, rows: &[f32], out: &mut [u8]) -> Result<Rounded> {
        let columns = self.how.moments.in_features();
        assert!(can_feed_back_integers(&grid, columns) && rows.len().is_multiple_of(columns));
        assert_eq!(out.len(), rows.len() / columns * grid.row_bytes(columns));
        self.run(integer_grid_of(grid).as_ref(), rows, out)
    }

    fn run(&self, grid: &dyn CompiledGrid, rows: &[f32], out: &mut [u8]) -> Result<Rounded> {
        let columns = self.how.moments.in_features();
        if self.how.outputs.is_empty() {
            return match self.machine {
                Some(machine) => self.panels_on(machine, grid, rows, out),
                None => Ok(self.panels(grid, rows, out, None)),
            };
        }
        let row_bytes = grid.row_bytes(columns);
        let (mut rows, mut out, mut parts) = (rows, out, Vec::new());
        for outputs in self.how.outputs {
            let (part, rest) = rows.split_at(outputs.rows() * columns);
            let (part_out, rest_out) = out.split_at_mut(outputs.rows() * row_bytes);
            parts.push((outputs, part, part_out));
            (rows, out) = (rest, rest_out);
        }
        assert!(rows.is_empty(), "factors of all rows");
        let rounded = parallel::map(parts, |(outputs, rows, out)| {
            self.row_after_row(grid, rows, outputs, out)
        });
        Ok(in_order(rounded))
    }

    /// Rows that are rounded without regard to each other. Their errors against `rows` go to `errors`.
    fn panels(
        &self,
        grid: &dyn CompiledGrid,
        rows: &[f32],
        out: &mut [u8],
        errors: Option<&mut [f32]>,
    ) -> Rounded {
        let columns = self.how.moments.in_features();
        let row_bytes = grid.row_bytes(columns);
        let errors: Vec<Option<&mut [f32]>> = match errors {
            Some(errors) => errors.chunks_mut(FLOAT_ROWS * columns).map(Some).collect(),
            None => {
                let panels = rows.len().div_ceil(FLOAT_ROWS * columns);
                (0..panels).map(|_| None).collect()
            }
        };
        let panels = rows
            .chunks(FLOAT_ROWS * columns)
            .zip(out.chunks_mut(FLOAT_ROWS * row_bytes))
            .zip(errors);
        let rounded = parallel::map(panels, |((rows, out), errors)| {
            self.panel(grid, rows, out, errors)
        });
        in_order(rounded)
    }

    /// Blocks of rows, each with the repairs of those before it.
    fn row_after_row(
        &self,
        grid: &dyn CompiledGrid,
        rows: &[f32],
        outputs: &OutputFactor,
        out: &mut [u8],
    ) -> Rounded {
        let columns = self.how.moments.in_features();
        let row_bytes = grid.row_bytes(columns);
        let (mut all_errors, mut done) = (vec![0.0; rows.len()], 0);
        let mut sum = Rounded::default();
        for block in outputs.blocks() {
            let (before, errors) = all_errors.split_at_mut(done * columns);
            let errors = &mut errors[..block.len() * columns];
            let repairs = outputs.repairs(self.isa, done, block.len(), before, columns);
            let mut targets = repairs.clone();
            for (target, row) in targets.chunks_exact_mut(columns).zip(block) {
                let wanted = &rows[row * columns..][..columns];
                target
                    .iter_mut()
                    .zip(wanted)
                    .for_each(|(target, wanted)| *target += wanted);
            }
            let mut packed = vec![0; block.len() * row_bytes];
            sum += self.panels(grid, &targets, &mut packed, Some(errors));
            // From errors against targets to errors against what was wanted.
            errors
                .iter_mut()
                .zip(&repairs)
                .for_each(|(error, repair)| *error -= repair);
            for (packed, row) in packed.chunks_exact(row_bytes).zip(block) {
                out[row * row_bytes..][..row_bytes].copy_from_slice(packed);
            }
            done += block.len();
        }
        sum
    }

    fn panel(
        &self,
        grid: &dyn CompiledGrid,
        rows: &[f32],
        out: &mut [u8],
        errors: Option<&mut [f32]>,
    ) -> Rounded {
        let columns = self.how.moments.in_features();
        let rows: Vec<&[f32]> = rows.chunks_exact(columns).collect();
        let mut halves = halves_of(&rows).map(|rows| Half::new(rows, columns, grid.sub()));
        for half in &mut halves {
            grid.preset(half, &self.how.moments.factor.pivots);
        }
        let InputMoments { matrix, factor, .. } = self.how.moments;
        for chunk in chunks(columns) {
            let before = 0..chunk.start;
            let repairs = products(self.isa, &halves, &factor.feedback, before, chunk.clone());
            self.first_pass(grid, &mut halves, chunk, repairs);
        }
        let mut changes = vec![[0.0; ROWS]; columns];
        for _ in 0..self.how.passes {
            for chunk in chunks(columns) {
                let gradients = products(self.isa, &halves, matrix, 0..columns, chunk.clone());
                self.descend(grid, &mut halves, chunk, gradients, &mut changes);
            }
        }
        let loss = loss_of(self.isa, &halves, matrix);
        for (row, errors) in errors
            .into_iter()
            .flat_map(|e| e.chunks_exact_mut(columns))
            .enumerate()
        {
            let (half, lane) = (&halves[row / ROWS], row % ROWS);
            errors
                .iter_mut()
                .zip(&half.errors)
                .for_each(|(error, lanes)| *error = lanes[lane]);
        }
        let overflow = pack_panel(grid, &halves, columns, out);
        Rounded { loss, overflow }
    }

    fn first_pass(
        &self,
        grid: &dyn CompiledGrid,
        halves: &mut [Half; 2],
        chunk: Range<usize>,
        repairs: [Vec<Row>; 2],
    ) {
        for (half, mut targets) in halves.iter_mut().zip(repairs) {
            for (target, wanted) in targets.iter_mut().zip(&half.wanted[chunk.clone()]) {
                target
                    .iter_mut()
                    .zip(wanted)
                    .for_each(|(target, wanted)| *target += wanted);
            }
            let factor = &self.how.moments.factor;
            grid.first_pass(half, chunk.clone(), &mut targets, factor);
        }
    }

    fn descend(
        &self,
        grid: &dyn CompiledGrid,
        halves: &mut [Half; 2],
        chunk: Range<usize>,
        gradients: [Vec<Row>; 2],
        changes: &mut [Row],
    ) {
        for (half, mut gradient) in halves.iter_mut().zip(gradients) {
            let moments = &self.how.moments.matrix;
            grid.descend(half, chunk.clone(), &mut gradient, changes, moments);
        }
    }
}

/// Packs the rows of a panel that are there; says how many scales are too large.
fn pack_panel(grid: &dyn CompiledGrid, halves: &[Half; 2], columns: usize, out: &mut [u8]) -> u64 {
    let mut overflow = 0;
    for (row, out) in out.chunks_exact_mut(grid.row_bytes(columns)).enumerate() {
        let (half, lane) = (&halves[row / ROWS], row % ROWS);
        overflow += grid.pack_row(RoundedRow { half, lane }, out).0;
    }
    overflow
}

fn chunks(columns: usize) -> impl Iterator<Item = Range<usize>> {
    (0..columns)
        .step_by(CHUNK)
        .map(move |first| first..(first + CHUNK).min(columns))
}

/// `sum over k in rows of errors[k] matrix[k][j]` for the columns of a chunk, for both halves.
fn products(
    isa: Isa,
    halves: &[Half; 2],
    matrix: &Strips,
    rows: Range<usize>,
    chunk: Range<usize>,
) -> [Vec<Row>; 2] {
    let mut out = [(); 2].map(|()| vec![[0.0; ROWS]; chunk.len()]);
    for first in chunk.clone().step_by(STRIP) {
        for begin in rows.clone().step_by(SUMMED) {
            let part = begin..(begin + SUMMED).min(rows.end);
            let errors = [
                &halves[0].errors[part.clone()],
                &halves[1].errors[part.clone()],
            ];
            let mut sums = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
            kernels::float(
                isa,
                MAX_TOKENS,
                errors,
                matrix.part(first / STRIP, part),
                &mut sums,
            );
            for (j, sums) in (first - chunk.start..chunk.len()).zip(&sums) {
                for (out, sums) in out.iter_mut().zip(sums.as_chunks::<ROWS>().0) {
                    out[j]
                        .iter_mut()
                        .zip(sums)
                        .for_each(|(out, sum)| *out += sum);
                }
            }
        }
    }
    out
}

fn loss_of(isa: Isa, halves: &[Half; 2], matrix: &Strips) -> f64 {
    let mut loss = 0.0;
    for chunk in chunks(matrix.n()) {
        let gradients = products(isa, halves, matrix, 0..matrix.n(), chunk.clone());
        loss += loss_in(halves, chunk, &gradients);
    }
    loss
}

/// What a chunk adds to the loss: errors times `E M`.
fn loss_in(halves: &[Half; 2], chunk: Range<usize>, gradients: &[Vec<Row>; 2]) -> f64 {
    let mut loss = 0.0;
    for (half, gradient) in halves.iter().zip(gradients) {
        for (errors, gradient) in half.errors[chunk.clone()].iter().zip(gradient) {
            let terms = errors.iter().zip(gradient);
            loss += terms
                .map(|(e, g)| f64::from(*e) * f64::from(*g))
                .sum::<f64>();
        }
    }
    loss
}
