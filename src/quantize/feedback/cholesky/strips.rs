//! Square matrices as products with panels of rows read them.

use std::ops::Range;

use crate::parallel;

/// Columns that lie side by side in [`Strips`].
pub const STRIP: usize = 8;
/// Rows that a thread copies at a time.
const DENSE_ROWS: usize = 256;

/// A square matrix in strips of eight columns, `[strip][row][8]`: what products with panels of rows read in order.
#[derive(Debug, Clone)]
pub struct Strips {
    n: usize,
    strips: Vec<Vec<f32>>,
}

impl Strips {
    /// The matrix whose row `i`, column `j` is `value(i, j)`.
    pub fn new(n: usize, value: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let fill = |columns: Range<usize>| {
            let mut strip = vec![0.0; n * STRIP];
            for (i, out) in strip.chunks_exact_mut(STRIP).enumerate() {
                for (j, out) in columns.clone().zip(out) {
                    *out = value(i, j);
                }
            }
            strip
        };
        Self::of(n, fill)
    }

    /// The matrix whose strip of some columns is `fill(columns)`: its first rows, eight values each; zero in the rest.
    pub fn of(n: usize, fill: impl Fn(Range<usize>) -> Vec<f32> + Sync) -> Self {
        let strip = |first: usize| fill(first..n.min(first + STRIP));
        Self {
            n,
            strips: parallel::map((0..n).step_by(STRIP), strip),
        }
    }

    /// Rows and columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Rows `rows` of strip `strip`, none of which lie where it is zero to its end.
    #[inline(always)]
    pub fn part(&self, strip: usize, rows: Range<usize>) -> &[f32] {
        &self.strips[strip][rows.start * STRIP..rows.end * STRIP]
    }

    /// Rows `rows` of columns `columns`, row-major. Runs in rayon's current pool.
    pub fn dense(&self, rows: Range<usize>, columns: Range<usize>) -> Vec<f32> {
        let mut dense = vec![0.0; rows.len() * columns.len()];
        let parts = dense.chunks_mut((DENSE_ROWS * columns.len()).max(1));
        parallel::for_each(parts.enumerate(), |(part, dense)| {
            let first = rows.start + part * DENSE_ROWS;
            let of_rows = dense.chunks_exact_mut(columns.len().max(1));
            for (row, dense) in (first..).zip(of_rows) {
                let places = dense.iter_mut().zip(columns.clone());
                places.for_each(|(value, column)| *value = self.at(row, column));
            }
        });
        dense
    }

    /// One element.
    #[inline(always)]
    pub fn at(&self, i: usize, j: usize) -> f32 {
        let strip = &self.strips[j / STRIP];
        strip.get(i * STRIP + j % STRIP).copied().unwrap_or(0.0)
    }
}
