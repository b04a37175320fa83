//! Square matrices and products in f64.
//!
//! Enters: f64 values. Leaves: products whose bits are the same on every CPU and for any number of threads: each sum
//! runs in index order, vector lanes lie across columns, nothing is fused.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use pulp::{Arch, Simd, WithSimd};

use super::mixer::Mixer;
use crate::error::Result;
use crate::parallel;

/// Columns that a panel holds side by side.
pub const PANEL: usize = 8;
/// Rows that share a pass over a panel.
const ROWS: usize = 4;
/// Rows whose sums are made before the next panel is looked at: they stay in the second-level cache.
const CHUNK_ROWS: usize = 16;

/// A square matrix, row-major.
#[derive(Debug)]
pub struct SquareMatrix {
    size: usize,
    values: Arc<Vec<f64>>,
    transposed: OnceLock<Vec<f64>>,
}

impl SquareMatrix {
    /// `values` is `[size, size]`, row-major.
    ///
    /// # Panics
    /// `values` has another length.
    pub fn new(size: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), size * size, "a square has equal sides");
        Self {
            size,
            values: Arc::new(values),
            transposed: OnceLock::new(),
        }
    }

    /// Rows, and columns.
    pub fn size(&self) -> usize {
        self.size
    }

    /// All values, row-major.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The same, shared: machines that hold a copy know it by this.
    pub fn shared(&self) -> &Arc<Vec<f64>> {
        &self.values
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.size..][..self.size]
    }

    /// All values, column-major: made once.
    pub fn transposed(&self) -> &[f64] {
        self.transposed.get_or_init(|| {
            let size = self.size;
            let mut transposed = vec![0.0; size * size];
            for (row, values) in self.values.chunks_exact(size.max(1)).enumerate() {
                for (column, value) in values.iter().enumerate() {
                    transposed[column * size + row] = *value;
                }
            }
            transposed
        })
    }

    /// `self * other`.
    ///
    /// # Panics
    /// The sizes differ.
    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.size, other.size, "both are of one size");
        Self::new(self.size, product(&self.values, self.size, other))
    }
}

impl Clone for SquareMatrix {
    fn clone(&self) -> Self {
        Self {
            size: self.size,
            values: Arc::clone(&self.values),
            transposed: OnceLock::new(),
        }
    }
}

impl PartialEq for SquareMatrix {
    fn eq(&self, other: &Self) -> bool {
        self.size == other.size && self.values == other.values
    }
}

/// `a: [rows, size]` times `b: [size, size]`, in parallel over columns.
pub fn product(a: &[f64], size: usize, b: &SquareMatrix) -> Vec<f64> {
    let rows = a.len() / size.max(1);
    let strips = parallel::map(strips(size), |strip| {
        let packed = Packed::of(size, strip.len(), |k, column| {
            b.values[k * size + strip.start + column]
        });
        (strip, packed.product(a, rows))
    });
    let mut out = vec![0.0; rows * size];
    for (strip, values) in strips {
        let width = padded(strip.len());
        for (row, values) in values.chunks_exact(width).enumerate() {
            out[row * size..][strip.clone()].copy_from_slice(&values[..strip.len()]);
        }
    }
    out
}

/// The same by a machine, if there is one that has room, with the same bits where all values are finite.
///
/// # Errors
/// The machine fails.
pub fn product_on(
    mixer: Option<&dyn Mixer>,
    a: &[f64],
    size: usize,
    b: &SquareMatrix,
) -> Result<Vec<f64>> {
    let elsewhere = match mixer {
        Some(mixer) => mixer.product(a, b)?,
        None => None,
    };
    Ok(elsewhere.unwrap_or_else(|| product(a, size, b)))
}

/// Columns `0..columns` in parts that are multiplied together.
pub fn strips(columns: usize) -> Vec<Range<usize>> {
    const STRIP: usize = 8 * PANEL;
    let begins = (0..columns).step_by(STRIP);
    begins
        .map(|begin| begin..(begin + STRIP).min(columns))
        .collect()
}

/// Columns of a strip as they are computed: whole panels.
pub fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PANEL)
}

/// A right-hand side `[depth, columns]`, panel by panel: `[panel, depth, PANEL]`, zeros where columns end.
#[derive(Debug)]
pub struct Packed {
    depth: usize,
    values: Vec<f64>,
}

impl Packed {
    /// Packs the values that `value(k, column)` gives.
    pub fn of(depth: usize, columns: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let mut values = vec![0.0; depth * padded(columns)];
        for (panel, values) in values.chunks_exact_mut((depth * PANEL).max(1)).enumerate() {
            let first = panel * PANEL;
            let inside = PANEL.min(columns - first);
            for (k, row) in values.chunks_exact_mut(PANEL).enumerate() {
                for (column, slot) in row[..inside].iter_mut().enumerate() {
                    *slot = value(k, first + column);
                }
            }
        }
        Self { depth, values }
    }

    /// `a: [rows, depth]` times this: `[rows, padded columns]`.
    pub fn product(&self, a: &[f64], rows: usize) -> Vec<f64> {
        let width = self.values.len() / self.depth.max(1);
        let mut out = vec![0.0; rows * width];
        let arch = Arch::new();
        if self.depth == 0 {
            return out;
        }
        let chunks = a.chunks(CHUNK_ROWS * self.depth);
        for (a, out) in chunks.zip(out.chunks_mut((CHUNK_ROWS * width).max(1))) {
            for (panel, b) in self.values.chunks_exact(self.depth * PANEL).enumerate() {
                let first = panel * PANEL;
                let (fours, rest) = a.split_at(a.len() / (ROWS * self.depth) * ROWS * self.depth);
                let (out_fours, out_rest) = out.split_at_mut(fours.len() / self.depth * width);
                let groups = fours.chunks_exact(ROWS * self.depth);
                for (a, out) in groups.zip(out_fours.chunks_exact_mut(ROWS * width)) {
                    arch.dispatch(RowSums::<ROWS> {
                        a,
                        b,
                        out,
                        width,
                        first,
                    });
                }
                let singles = rest.chunks_exact(self.depth);
                for (a, out) in singles.zip(out_rest.chunks_exact_mut(width)) {
                    arch.dispatch(RowSums::<1> {
                        a,
                        b,
                        out,
                        width,
                        first,
                    });
                }
            }
        }
        out
    }
}

/// `out[row][first + column] = sum over k of a[row][k] * b[k][column]` for N rows and one panel, `b [depth, PANEL]`.
struct RowSums<'a, const N: usize> {
    a: &'a [f64],
    b: &'a [f64],
    out: &'a mut [f64],
    width: usize,
    first: usize,
}

impl<const N: usize> WithSimd for RowSums<'_, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (b, _) = self.b.as_chunks::<PANEL>();
        let rows: [&[f64]; N] = std::array::from_fn(|row| &self.a[row * b.len()..][..b.len()]);
        // A panel is one vector of AVX-512, two of AVX2, eight numbers elsewhere.
        let mut sums = [[simd.splat_f64s(0.0); PANEL]; N];
        for (k, b) in b.iter().enumerate() {
            let (b, _) = S::as_simd_f64s(b);
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let factor = simd.splat_f64s(row[k]);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = simd.add_f64s(*sum, simd.mul_f64s(factor, *b));
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let sums = bytemuck::cast_slice::<S::f64s, f64>(sums);
            self.out[row * self.width + self.first..][..PANEL].copy_from_slice(&sums[..PANEL]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::SplitMix64;
    use super::*;

    #[test]
    fn instructions_change_no_bit() {
        let mut random = SplitMix64::new(2);
        let mut values = |len| -> Vec<f64> { (0..len).map(|_| random.next_uniform()).collect() };
        let (depth, width) = (77, PANEL);
        let (a, b) = (values(ROWS * depth), values(depth * PANEL));
        let sums = |run: &dyn Fn(RowSums<'_, ROWS>)| {
            let mut out = vec![0.0; ROWS * width];
            run(RowSums {
                a: &a,
                b: &b,
                out: &mut out,
                width,
                first: 0,
            });
            out
        };
        let here = sums(&|rows| Arch::new().dispatch(rows));
        assert_eq!(here, sums(&|rows| pulp::Scalar.vectorize(rows)));
    }

    #[test]
    fn products_are_those_of_the_textbook() {
        for (rows, size) in [(1, 1), (5, 7), (18, 66), (4, 130)] {
            let value = |index: usize| ((index * 37 + 11) % 101) as f64 - 50.0;
            let a: Vec<f64> = (0..rows * size).map(value).collect();
            let b = SquareMatrix::new(size, (0..size * size).map(value).collect());
            let found = product(&a, size, &b);
            for (row, a) in a.chunks_exact(size).enumerate() {
                for column in 0..size {
                    let sum: f64 = (0..size).map(|k| a[k] * b.row(k)[column]).sum();
                    assert_eq!(found[row * size + column], sum);
                    assert_eq!(
                        b.transposed()[column * size + row % size],
                        b.row(row % size)[column]
                    );
                }
            }
        }
    }
}
