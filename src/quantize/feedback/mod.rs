//! Rounding with error feedback onto the grids of ggml's types: GPTQ, with scales chosen on the way.
//!
//! Enters: rows of a weight, second moments of its inputs. Leaves: packed rows and what they lose. Knows no model and no
//! calibration. Rows are independent of each other, so threads change nothing.
//!
//! Source: GPTQ, arXiv:2210.17323. We depart from it: one factorization without an inverse ([`cholesky`]); scales are
//! chosen when their sub-block is reached, by simulated feedback (`sweep`); passes of coordinate descent follow over
//! scales and codes (`descent`).

pub mod cholesky;
mod correction;
mod descent;
mod grid;
mod moments;
mod sweep;
#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::ScaleOverflow;
use super::symmetric::Codebook;
use crate::backend::cpu::gram::CHUNK_ROWS;
use crate::backend::cpu::kernels::{self, FLOAT_ROWS, Isa, MAX_TOKENS};
use crate::formats::GgmlType;
use cholesky::{STRIP, Strips};
pub use correction::Correction;
use descent::Pass;
use grid::FeedbackGrid;
pub use moments::{Damping, InputMoments};
use sweep::{FirstPass, Half, ROWS, Row};

/// Columns that are rounded between two products with everything before them: a multiple of every block.
const CHUNK: usize = 256;

/// What rounding cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rounded {
    /// `tr(E M E^T)`, M the second moments with their damping, E wanted less rounded.
    pub loss: f64,
    /// Scales too large for F16.
    pub overflow: u64,
}

/// Calls `$run::<Grid>` for the grid of `$ty`, or evaluates `$otherwise`.
macro_rules! with_grid {
    ($ty:expr, $run:ident($($argument:expr),*), $otherwise:expr) => {
        match $ty {
            GgmlType::Q4_0 => $run::<grid::Q4_0>($($argument),*),
            GgmlType::Q4_1 => $run::<grid::Q4_1>($($argument),*),
            GgmlType::Q5_0 => $run::<grid::Q5_0>($($argument),*),
            GgmlType::Q5_1 => $run::<grid::Q5_1>($($argument),*),
            GgmlType::Q8_0 => $run::<grid::Q8_0>($($argument),*),
            GgmlType::IQ4_NL => $run::<grid::IQ4_NL>($($argument),*),
            GgmlType::MXFP4 => $run::<grid::MXFP4>($($argument),*),
            GgmlType::Q2_K => $run::<grid::Q2_K>($($argument),*),
            GgmlType::Q3_K => $run::<grid::Q3_K>($($argument),*),
            GgmlType::Q4_K => $run::<grid::Q4_K>($($argument),*),
            GgmlType::Q5_K => $run::<grid::Q5_K>($($argument),*),
            GgmlType::Q6_K => $run::<grid::Q6_K>($($argument),*),
            GgmlType::IQ4_XS => $run::<grid::IQ4_XS>($($argument),*),
            _ => $otherwise,
        }
    };
}

/// Whether a type can be rounded to with feedback.
pub fn can_feed_back(ty: GgmlType) -> bool {
    fn yes<G: FeedbackGrid>() -> bool {
        true
    }
    with_grid!(ty, yes(), false)
}

/// Rounds whole rows.
///
/// `rows`: `[n, in_features]`, row-major: what the rounded weights should be; `passes`: how often scales and codes are
/// gone over again; `out`: exactly the bytes of n rows.
///
/// # Panics
/// The lengths do not belong together, rows are not whole blocks, or the type has no feedback (see [`can_feed_back`]).
pub fn quantize_rows(
    isa: Isa,
    ty: GgmlType,
    rows: &[f32],
    moments: &InputMoments,
    passes: usize,
    out: &mut [u8],
) -> Rounded {
    let columns = moments.in_features();
    assert!(columns.is_multiple_of(ty.block_elements()) && rows.len().is_multiple_of(columns));
    assert_eq!(ty.bytes_for(rows.len() as u64), Some(out.len() as u64));
    let job = Job {
        isa,
        moments,
        passes,
    };
    with_grid!(ty, run(job, rows, out), panic!("{ty} has no feedback"))
}

/// `tr(E M E^T)` for errors of whole rows, `[n, in_features]`.
pub fn loss(isa: Isa, errors: &[f32], moments: &InputMoments) -> f64 {
    let columns = moments.in_features();
    let panels = errors.par_chunks(FLOAT_ROWS * columns);
    let losses: Vec<f64> = panels
        .map(|rows| {
            let rows: Vec<&[f32]> = rows.chunks(columns).collect();
            let halves = halves_of(&rows).map(|rows| Half::of_errors(rows, columns));
            loss_of(isa, &halves, &moments.matrix)
        })
        .collect();
    losses.iter().sum()
}

#[derive(Clone, Copy)]
struct Job<'a> {
    isa: Isa,
    moments: &'a InputMoments,
    passes: usize,
}

fn run<G: FeedbackGrid>(job: Job, rows: &[f32], out: &mut [u8]) -> Rounded {
    let columns = job.moments.in_features();
    let row_bytes = columns / G::BLOCK * size_of::<G::Block>();
    let panels = rows
        .par_chunks(FLOAT_ROWS * columns)
        .zip(out.par_chunks_mut(FLOAT_ROWS * row_bytes));
    let rounded: Vec<Rounded> = panels
        .map(|(rows, out)| job.panel::<G>(rows, out))
        .collect();
    // In the order of rows, whoever was first.
    rounded
        .iter()
        .fold(Rounded::default(), |sum, panel| Rounded {
            loss: sum.loss + panel.loss,
            overflow: sum.overflow + panel.overflow,
        })
}

/// The first sixteen rows and the rest.
fn halves_of<'r, 'a>(rows: &'r [&'a [f32]]) -> [&'r [&'a [f32]]; 2] {
    let (first, second) = rows.split_at(rows.len().min(ROWS));
    [first, second]
}

impl Job<'_> {
    fn panel<G: FeedbackGrid>(&self, rows: &[f32], out: &mut [u8]) -> Rounded {
        let columns = self.moments.in_features();
        let rows: Vec<&[f32]> = rows.chunks_exact(columns).collect();
        let mut halves = halves_of(&rows).map(|rows| Half::new(rows, columns, G::SUB));
        for chunk in chunks(columns) {
            self.first_pass::<G>(&mut halves, chunk);
        }
        let mut changes = vec![[0.0; ROWS]; columns];
        for _ in 0..self.passes {
            for chunk in chunks(columns) {
                self.descend::<G>(&mut halves, chunk, &mut changes);
            }
        }
        let loss = loss_of(self.isa, &halves, &self.moments.matrix);
        let blocks: &mut [G::Block] = bytemuck::cast_slice_mut(out);
        let mut overflow = 0;
        for (row, blocks) in blocks.chunks_exact_mut(columns / G::BLOCK).enumerate() {
            overflow += pack_row::<G>(&halves[row / ROWS], row % ROWS, blocks).0;
        }
        Rounded { loss, overflow }
    }

    fn first_pass<G: FeedbackGrid>(&self, halves: &mut [Half; 2], chunk: Range<usize>) {
        let feedback = &self.moments.factor.feedback;
        let repairs = products(self.isa, halves, feedback, 0..chunk.start, chunk.clone());
        for (half, mut targets) in halves.iter_mut().zip(repairs) {
            for (target, wanted) in targets.iter_mut().zip(&half.wanted[chunk.clone()]) {
                target
                    .iter_mut()
                    .zip(wanted)
                    .for_each(|(target, wanted)| *target += wanted);
            }
            Arch::new().dispatch(FirstPass::<G> {
                half,
                chunk: chunk.clone(),
                targets: &mut targets,
                factor: &self.moments.factor,
                grid: PhantomData,
            });
        }
    }

    fn descend<G: FeedbackGrid>(
        &self,
        halves: &mut [Half; 2],
        chunk: Range<usize>,
        changes: &mut [Row],
    ) {
        let all = 0..self.moments.in_features();
        let gradients = products(self.isa, halves, &self.moments.matrix, all, chunk.clone());
        for (half, mut gradient) in halves.iter_mut().zip(gradients) {
            Arch::new().dispatch(Pass::<G> {
                half,
                chunk: chunk.clone(),
                gradient: &mut gradient,
                changes,
                moments: &self.moments.matrix,
                grid: PhantomData,
            });
        }
    }
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
        for begin in rows.clone().step_by(CHUNK_ROWS) {
            let part = begin..(begin + CHUNK_ROWS).min(rows.end);
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
        for (half, gradient) in halves.iter().zip(&gradients) {
            for (errors, gradient) in half.errors[chunk.clone()].iter().zip(gradient) {
                let terms = errors.iter().zip(gradient);
                loss += terms
                    .map(|(e, g)| f64::from(*e) * f64::from(*g))
                    .sum::<f64>();
            }
        }
    }
    loss
}

fn pack_row<G: FeedbackGrid>(half: &Half, lane: usize, blocks: &mut [G::Block]) -> ScaleOverflow {
    let subs = G::BLOCK / G::SUB;
    let mut overflow = 0;
    for (index, block) in blocks.iter_mut().enumerate() {
        let scales = half.scales[index * subs..][..subs].iter();
        let scales: Vec<[f32; 4]> = scales.map(|parts| parts.map(|row| row[lane])).collect();
        let values = half.values[index * G::BLOCK..][..G::BLOCK].iter();
        let codes: Vec<u8> = values
            .map(|row| code_of::<G::Codebook>(row[lane]))
            .collect();
        overflow += u64::from(grid::is_saturated(scales[0][0]))
            + u64::from(grid::is_saturated(scales[0][1]));
        *block = G::pack(&scales, &codes);
    }
    ScaleOverflow(overflow)
}

/// The stored code of a value of the codebook.
fn code_of<C: Codebook>(value: f32) -> u8 {
    let code = C::code(super::lanes::Lanes::splat(pulp::Scalar, value));
    code.as_slice()[0] as i32 as u8
}
