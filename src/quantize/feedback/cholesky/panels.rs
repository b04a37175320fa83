//! L on its way, in panels of columns: what is factored already is multiplied from where it lies, nothing is packed twice.

use std::ops::Range;

use super::STRIP;
use crate::backend::cpu::gram::CHUNK_ROWS;
use crate::backend::cpu::kernels::{self, FLOAT_ROWS, FloatTile, Isa, LANES, MAX_TOKENS};
use crate::parallel;

const _: () = assert!(MAX_TOKENS == STRIP);

/// Some columns of a lower triangular matrix, from the row of the first of them to the last row.
pub struct Panel {
    /// The first column, and the first row that is held.
    first: usize,
    /// Sixteen columns each, `[row][16]`; zeros beyond the last column.
    halves: [Vec<[f32; LANES]>; 2],
}

/// The lower triangle of a symmetric matrix, panel by panel; `upper(i, j)` gives what it holds, asked with `i <= j`.
pub fn panels(n: usize, upper: impl Fn(usize, usize) -> f32 + Sync) -> Vec<Panel> {
    let panel = |first: usize| {
        let half = |begin: usize| {
            let mut half = vec![[0.0; LANES]; n - first];
            let blocks = half.chunks_mut(LANES).zip((first..n).step_by(LANES));
            // Rows that lie far apart in memory are read sixteen at a time.
            for (rows, first_row) in blocks {
                let columns = begin..n.min(begin + LANES);
                for (lane, column) in columns.enumerate() {
                    let own = (first_row..).zip(rows.iter_mut());
                    for (row, lanes) in own.skip(column.saturating_sub(first_row)) {
                        lanes[lane] = upper(column, row);
                    }
                }
            }
            half
        };
        Panel {
            first,
            halves: [half(first), half(first + LANES)],
        }
    };
    parallel::map((0..n).step_by(FLOAT_ROWS), panel)
}

impl Panel {
    /// One element, `column` counted from the panel's first.
    #[inline(always)]
    pub fn at(&self, row: usize, column: usize) -> f32 {
        self.halves[column / LANES][row - self.first][column % LANES]
    }

    /// Replaces one.
    pub fn set(&mut self, row: usize, column: usize, value: f32) {
        self.halves[column / LANES][row - self.first][column % LANES] = value;
    }

    /// Columns `16 half..16 half + 16` of one row.
    #[inline(always)]
    pub fn lanes(&self, row: usize, half: usize) -> &[f32; LANES] {
        &self.halves[half][row - self.first]
    }

    /// Takes from rows of a block what rows behind it explain: `row[j] -= sum over k of coefficient[k][j] row[k]`.
    pub fn subtract(&mut self, isa: Isa, coefficients: &Coefficients) {
        let Coefficients { columns, rows, .. } = coefficients;
        let mut tile = FloatTile::default();
        // Of a panel on the diagonal, rows before its own are not held.
        let begin = columns.start.max(self.first);
        let skipped = (begin - columns.start) / STRIP;
        let split = rows.start - self.first;
        let [low, high] = self.halves.each_mut().map(|half| half.split_at_mut(split));
        for (chunk, strips) in coefficients.chunks() {
            let inside = chunk.start - rows.start..chunk.end - rows.start;
            let read = [&low.1[inside.clone()], &high.1[inside]];
            let strips = strips.chunks_exact(chunk.len() * STRIP).skip(skipped);
            for (strip, first) in strips.zip((begin..columns.end).step_by(STRIP)) {
                let own = first - self.first..columns.end.min(first + STRIP) - self.first;
                let own = [&mut low.0[own.clone()], &mut high.0[own]];
                own.iter().for_each(|rows| kernels::prefetch(rows));
                kernels::float(isa, STRIP, read, strip, &mut tile);
                subtract_tile(own, &tile);
            }
        }
    }

    /// Takes `sums`, `[rows, n]`, from those of its rows.
    pub fn subtract_sums(&mut self, rows: &Range<usize>, sums: &[f64], n: usize) {
        for row in rows.start.max(self.first)..rows.end {
            let sums = &sums[(row - rows.start) * n + self.first..(row - rows.start + 1) * n];
            let [low, high] = self
                .halves
                .each_mut()
                .map(|half| &mut half[row - self.first]);
            let own = low.iter_mut().chain(high).zip(sums);
            own.for_each(|(x, sum)| *x = (f64::from(*x) - sum) as f32);
        }
    }

    /// Turns rows of a block into `inverse^T rows`, with a lower triangular inverse.
    pub fn multiply(&mut self, isa: Isa, inverse: &Coefficients) {
        let mut tile = FloatTile::default();
        let rows = inverse.columns.start - self.first..inverse.columns.end - self.first;
        let strips = inverse.values.chunks_exact(rows.len() * STRIP);
        let [low, high] = self.halves.each_mut().map(|half| &mut half[rows.clone()]);
        for (strip, values) in strips.enumerate() {
            // What the inverse has before its diagonal is zero, and no later sum reads what is replaced here.
            let first = strip * STRIP;
            let read = [&low[first..], &high[first..]];
            kernels::float(isa, STRIP, read, &values[first * STRIP..], &mut tile);
            let own = first..low.len().min(first + STRIP);
            for (row, sums) in own.zip(&tile) {
                let (left, right) = sums.split_at(LANES);
                low[row].copy_from_slice(left);
                high[row].copy_from_slice(right);
            }
        }
    }
}

#[inline(always)]
fn subtract_tile([low, high]: [&mut [[f32; LANES]]; 2], sums: &FloatTile) {
    for ((low, high), sums) in low.iter_mut().zip(high).zip(sums) {
        let (left, right) = sums.split_at(LANES);
        low.iter_mut().zip(left).for_each(|(x, sum)| *x -= sum);
        high.iter_mut().zip(right).for_each(|(x, sum)| *x -= sum);
    }
}

/// How rows `rows` of a matrix take part in its rows `columns`: `[chunk][strip of 8 columns][row of the chunk][8]`.
pub struct Coefficients {
    columns: Range<usize>,
    rows: Range<usize>,
    values: Vec<f32>,
}

impl Coefficients {
    /// Row `k`, columns from `j` on, are `eight(k, j)`.
    pub fn new(
        columns: Range<usize>,
        rows: Range<usize>,
        eight: impl Fn(usize, usize) -> [f32; STRIP] + Sync,
    ) -> Self {
        let strips = columns.len().div_ceil(STRIP);
        let mut values = vec![0.0; strips * rows.len() * STRIP];
        let chunks = values.chunks_mut(strips * CHUNK_ROWS * STRIP);
        parallel::for_each(chunks.zip(cut(&rows)), |(values, chunk)| {
            let strips = values.chunks_exact_mut(chunk.len() * STRIP);
            for (out, first) in strips.zip(columns.clone().step_by(STRIP)) {
                let out = out.as_chunks_mut().0.iter_mut();
                out.zip(chunk.clone())
                    .for_each(|(out, k)| *out = eight(k, first));
            }
        });
        Self {
            columns,
            rows,
            values,
        }
    }

    /// What `rows` behind a block explain of it: the block's own columns of theirs.
    pub fn behind(panels: &[Panel], rows: Range<usize>, block: Range<usize>) -> Self {
        Self::new(block, rows, |k, j| {
            let lanes = panels[j / FLOAT_ROWS].lanes(k, j % FLOAT_ROWS / LANES);
            *lanes[j % LANES..]
                .first_chunk()
                .expect("strips end where halves do")
        })
    }

    fn chunks(&self) -> impl Iterator<Item = (Range<usize>, &[f32])> {
        let strips = self.columns.len().div_ceil(STRIP);
        let mut rest = &self.values[..];
        let chunks = cut(&self.rows).into_iter();
        chunks.map(move |chunk| {
            let values = rest
                .split_off(..strips * chunk.len() * STRIP)
                .expect("as many values as chunks hold");
            (chunk, values)
        })
    }
}

/// Chunks of rows, each summed in f32 before it is taken away.
fn cut(rows: &Range<usize>) -> Vec<Range<usize>> {
    let firsts = rows.clone().step_by(CHUNK_ROWS);
    firsts
        .map(|first| first..rows.end.min(first + CHUNK_ROWS))
        .collect()
}
