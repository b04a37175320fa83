//! A grid as the walk over rows sees it: sixteen rows at a time.
//!
//! The walk asks through a table and is compiled once; passes over columns are compiled for each way of rounding and each
//! size of sub-blocks, searches for scales for each grid; all of them for each CPU.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::super::ScaleOverflow;
use super::super::lanes::Lanes;
use super::super::symmetric::Codebook;
use super::cholesky::{Factor, Strips};
use super::descent::Pass;
use super::description::GridDescription;
use super::grid::{FeedbackGrid, RoundedRow};
use super::scales::{Candidates, Scales};
use super::sweep::{FirstPass, Half, ROWS, Row};

/// Most weights of a block.
const MAX_BLOCK: usize = 256;

/// What rounding asks of a grid. Scales are `[d, dmin, scale, min]` of sixteen rows, targets `[column]`.
pub trait CompiledGrid: Sync + Send {
    /// Columns of a block.
    fn block(&self) -> usize;

    /// Columns that share scales.
    fn sub(&self) -> usize;

    /// All that another machine has to know.
    fn description(&self) -> GridDescription;

    /// See [`FeedbackGrid::preset`].
    fn preset(&self, half: &mut Half, pivots: &[f32]);

    /// Makes scales that were chosen beforehand what is fixed when a block begins; see [`FeedbackGrid::begin`].
    fn begin(&self, targets: &[Row], pivots: &[f32], scales: &mut [Row; 4]);

    /// Scales to try for a sub-block; see [`FeedbackGrid::candidates`].
    fn candidates(&self, head: &[Row; 4], targets: &[Row], pivots: &[f32], out: &mut Candidates);

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
pub struct Compiled<G, const SUB: usize>(pub G);

impl<G: FeedbackGrid, const SUB: usize> Compiled<G, SUB> {
    const WHOLE: () =
        assert!(G::SUB == SUB && G::BLOCK.is_multiple_of(SUB) && G::BLOCK <= MAX_BLOCK);
}

impl<G: FeedbackGrid, const SUB: usize> CompiledGrid for Compiled<G, SUB> {
    fn block(&self) -> usize {
        let () = Self::WHOLE;
        G::BLOCK
    }

    fn sub(&self) -> usize {
        SUB
    }

    fn description(&self) -> GridDescription {
        self.0.description()
    }

    fn preset(&self, half: &mut Half, pivots: &[f32]) {
        self.0.preset(half, pivots);
    }

    fn begin(&self, targets: &[Row], pivots: &[f32], scales: &mut [Row; 4]) {
        if G::HAS_HEAD {
            Arch::new().dispatch(Begin {
                grid: &self.0,
                targets,
                pivots,
                scales,
            });
        }
    }

    fn candidates(&self, head: &[Row; 4], targets: &[Row], pivots: &[f32], out: &mut Candidates) {
        Arch::new().dispatch(Choose::<G, SUB> {
            grid: &self.0,
            head,
            targets,
            pivots,
            out,
        });
    }

    fn first_pass(
        &self,
        half: &mut Half,
        chunk: Range<usize>,
        targets: &mut [Row],
        factor: &Factor,
    ) {
        Arch::new().dispatch(FirstPass::<_, SUB> {
            half,
            chunk,
            targets,
            factor,
            grid: self,
            nearest: G::Codebook::NEAREST,
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
        Arch::new().dispatch(Pass::<_, SUB> {
            half,
            chunk,
            gradient,
            changes,
            moments,
            lattice: self.0.lattice(),
            nearest: G::Codebook::NEAREST,
        });
    }

    fn row_bytes(&self, columns: usize) -> usize {
        self.0.row_bytes(columns)
    }

    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
        self.0.pack_row(row, out)
    }
}

struct Begin<'a, G> {
    grid: &'a G,
    targets: &'a [Row],
    pivots: &'a [f32],
    scales: &'a mut [Row; 4],
}

impl<G: FeedbackGrid> WithSimd for Begin<'_, G> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut targets = [Lanes::zero(simd); MAX_BLOCK];
        for lane in (0..ROWS).step_by(Lanes::<S>::COUNT) {
            for (target, row) in targets.iter_mut().zip(self.targets) {
                *target = Lanes::read(simd, &row[lane..]);
            }
            let targets = &targets[..G::BLOCK];
            let head = self.grid.begin(simd, targets, self.pivots);
            head.write(self.scales, lane);
        }
    }
}

struct Choose<'a, G, const SUB: usize> {
    grid: &'a G,
    head: &'a [Row; 4],
    targets: &'a [Row],
    pivots: &'a [f32],
    out: &'a mut Candidates,
}

impl<G: FeedbackGrid, const SUB: usize> WithSimd for Choose<'_, G, SUB> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut targets = [Lanes::zero(simd); SUB];
        let mut weights = targets;
        for (weight, pivot) in weights.iter_mut().zip(self.pivots) {
            *weight = Lanes::splat(simd, *pivot);
        }
        for lane in (0..ROWS).step_by(Lanes::<S>::COUNT) {
            for (target, row) in targets.iter_mut().zip(self.targets) {
                *target = Lanes::read(simd, &row[lane..]);
            }
            self.out.restart(lane);
            let head = Scales::read(simd, self.head, lane);
            self.grid.candidates(&head, &targets, &weights, self.out);
        }
    }
}
