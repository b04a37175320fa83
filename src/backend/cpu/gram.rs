//! Products over rows: `sum over k of a[k][i] b[k][j]`, the shape of second moments and of their factorization.
//!
//! Enters: row-major f32 arrays that share their rows. Leaves: sums. Every sum runs over
//! the rows in order, in chunks of [`CHUNK_ROWS`]; it depends neither on threads nor on the width of vectors.

use std::ops::Range;

use super::kernels::{self, FLOAT_ROWS, Isa, LANES, MAX_TOKENS};
use super::shared_rows::SharedRows;
use crate::parallel;

/// Rows that are summed in f32 before the caller sees the sums.
pub const CHUNK_ROWS: usize = 512;

/// Panels of a thread that read the same strips, and strips that they read in turn: together they fit a second-level cache.
const GROUP_PANELS: usize = 4;
const GROUP_STRIPS: usize = 16;

/// Some columns of a row-major array.
#[derive(Debug, Clone)]
pub struct Columns<'a> {
    /// All rows.
    pub values: &'a [f32],
    /// Length of a row.
    pub stride: usize,
    /// The columns that take part.
    pub range: Range<usize>,
}

impl Columns<'_> {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.stride..][self.range.clone()]
    }
}

/// For the rows of one chunk, calls `add(out[j][i], sum over k of a[k][i] b[k][j])` for every `i` and `j` of the ranges, `out`
/// being row-major with rows of `stride` values; of symmetric products (`only_upper`) for `i` from about `j` on alone.
///
/// # Panics
/// More than [`CHUNK_ROWS`] rows, or an output too small.
#[allow(
    clippy::too_many_arguments,
    reason = "the arguments of every matrix product"
)]
pub fn products<T: Send>(
    isa: Isa,
    rows: Range<usize>,
    a: &Columns,
    b: &Columns,
    only_upper: bool,
    out: &mut [T],
    stride: usize,
    add: impl Fn(&mut T, f32) + Sync,
) {
    assert!(rows.len() <= CHUNK_ROWS);
    if rows.is_empty() || b.range.is_empty() {
        return;
    }
    let strips = pack_strips(rows.clone(), b);
    let out = SharedRows::new(out, stride);
    let strip_len = rows.len() * MAX_TOKENS;
    let groups = a.range.len().div_ceil(GROUP_PANELS * FLOAT_ROWS);
    parallel::for_each(0..groups, |group| {
        let firsts = (group * GROUP_PANELS * FLOAT_ROWS..a.range.len()).step_by(FLOAT_ROWS);
        let panels: Vec<_> = firsts
            .take(GROUP_PANELS)
            .map(|first| {
                let end = a.range.len().min(first + FLOAT_ROWS);
                (first..end, pack_panel(rows.clone(), a, first..end))
            })
            .collect();
        let mut sums = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
        for (block, strips) in strips.chunks(GROUP_STRIPS * strip_len).enumerate() {
            for (columns, [low, high]) in &panels {
                for (strip, input) in strips.chunks_exact(strip_len).enumerate() {
                    let first_j = (block * GROUP_STRIPS + strip) * MAX_TOKENS;
                    if only_upper && first_j >= columns.start + FLOAT_ROWS {
                        break;
                    }
                    // SAFETY: these columns of the output belong to this group, and so to this thread, alone.
                    let part = |j| unsafe { out.part(j, columns.start, columns.len()) };
                    let rows = first_j..b.range.len().min(first_j + MAX_TOKENS);
                    rows.clone().for_each(|j| kernels::prefetch(part(j)));
                    kernels::float(isa, MAX_TOKENS, [low, high], input, &mut sums);
                    for (j, sums) in rows.zip(&sums) {
                        part(j)
                            .iter_mut()
                            .zip(sums)
                            .for_each(|(out, sum)| add(out, *sum));
                    }
                }
            }
        }
    });
}

/// `sums += X^T X` for `rows [_, n]`, `sums [n, n]`; columns from about the row on are meant.
pub fn second_moments(isa: Isa, rows: &[f32], n: usize, sums: &mut [f64]) {
    let columns = Columns {
        values: rows,
        stride: n,
        range: 0..n,
    };
    let count = rows.len() / n.max(1);
    for first in (0..count).step_by(CHUNK_ROWS) {
        let chunk = first..(first + CHUNK_ROWS).min(count);
        let add = |out: &mut f64, sum: f32| *out += f64::from(sum);
        products(isa, chunk, &columns, &columns, true, sums, n, add);
    }
}

/// `sums += V^T U` for as many rows of both, `v [_, width]`, `u [_, n]`: `sums [width, n]`.
pub fn cross_moments(
    isa: Isa,
    (v, width): (&[f32], usize),
    (u, n): (&[f32], usize),
    sums: &mut [f64],
) {
    let columns = |values, stride| Columns {
        values,
        stride,
        range: 0..stride,
    };
    let count = u.len() / n.max(1);
    for first in (0..count).step_by(CHUNK_ROWS) {
        let chunk = first..(first + CHUNK_ROWS).min(count);
        let add = |out: &mut f64, sum: f32| *out += f64::from(sum);
        let (u, v) = (columns(u, n), columns(v, width));
        products(isa, chunk, &u, &v, false, sums, n, add);
    }
}

/// `[strip of 8 columns][row][8]`, zeros beyond the last column.
fn pack_strips(rows: Range<usize>, b: &Columns) -> Vec<f32> {
    let strip_len = rows.len() * MAX_TOKENS;
    let mut strips = vec![0.0; b.range.len().div_ceil(MAX_TOKENS) * strip_len];
    if strip_len == 0 {
        return strips;
    }
    let fill = |(strip, out): (usize, &mut [f32])| {
        let first = strip * MAX_TOKENS;
        let count = MAX_TOKENS.min(b.range.len() - first);
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(MAX_TOKENS)) {
            out[..count].copy_from_slice(&b.row(row)[first..first + count]);
        }
    };
    parallel::for_each(strips.chunks_mut(strip_len).enumerate(), fill);
    strips
}

/// Two halves `[row][16]` of 32 columns, zeros beyond the last.
fn pack_panel(rows: Range<usize>, a: &Columns, columns: Range<usize>) -> [Vec<[f32; LANES]>; 2] {
    let half = |first: usize| {
        let first = (columns.start + first).min(columns.end);
        let range = first..(first + LANES).min(columns.end);
        let pack = |row: usize| {
            let mut lanes = [0.0; LANES];
            lanes[..range.len()].copy_from_slice(&a.row(row)[range.clone()]);
            lanes
        };
        rows.clone().map(pack).collect()
    };
    [half(0), half(LANES)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0)
            .collect()
    }

    fn found(isa: Isa, rows: usize, a: &Columns, b: &Columns) -> Vec<f32> {
        let stride = a.range.len();
        let mut out = vec![0.0; stride * b.range.len()];
        products(isa, 0..rows, a, b, false, &mut out, stride, |out, sum| {
            *out += sum
        });
        out
    }

    #[test]
    fn sums_are_those_of_plain_loops() {
        let (rows, stride_a, stride_b) = (37, 71, 45);
        let (a, b) = (values(rows * stride_a), values(rows * stride_b));
        let left = Columns {
            values: &a,
            stride: stride_a,
            range: 3..70,
        };
        let right = Columns {
            values: &b,
            stride: stride_b,
            range: 1..44,
        };
        for isa in Isa::all() {
            let mut found = found(isa, rows, &left, &right).into_iter();
            for (j, i) in right
                .range
                .clone()
                .flat_map(|j| left.range.clone().map(move |i| (j, i)))
            {
                let product =
                    |k: usize| f64::from(a[k * stride_a + i]) * f64::from(b[k * stride_b + j]);
                let exact: f64 = (0..rows).map(product).sum();
                let found = f64::from(found.next().unwrap());
                assert!(
                    (found - exact).abs() < 1e-3,
                    "{isa:?} {i} {j}: {found} {exact}"
                );
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn wide_and_narrow_vectors_give_the_same_bits() {
        let a = values(200 * 40);
        let columns = Columns {
            values: &a,
            stride: 40,
            range: 0..40,
        };
        let fused = Isa::all().into_iter().filter(|isa| *isa != Isa::Portable);
        let all: Vec<_> = fused
            .map(|isa| found(isa, 200, &columns, &columns))
            .collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
