//! Linear maps of the two axes of a matrix, and their application.
//!
//! Enters: a matrix as stored and a map for its rows and for its columns. Leaves: rows of the mapped matrix, computed in
//! f64. Knows no network.

use std::borrow::Cow;
use std::ops::Range;

use super::matrix::{Packed, SquareMatrix, padded, strips};
use super::mixer::{MixedPart, Mixer, Mixing};
use crate::error::Result;
use crate::parallel;

/// What becomes of one axis: `out_j = after_j * sum over k of Q[k, j] * before_k * in_k`, then `out = out[order]`.
///
/// Q is block-diagonal: the same matrix for every run of `mix.size()` indices.
#[derive(Debug, Clone, Default)]
pub struct AxisMap<'a> {
    /// A factor of every index before mixing.
    pub before: Option<Cow<'a, [f64]>>,
    /// Mixes indices of a run.
    pub mix: Option<&'a SquareMatrix>,
    /// A factor of every index after mixing.
    pub after: Option<Cow<'a, [f64]>>,
    /// Which index comes where.
    pub order: Option<Cow<'a, [u32]>>,
}

impl AxisMap<'_> {
    /// Whether it changes nothing.
    pub fn is_identity(&self) -> bool {
        self.before.is_none() && self.mix.is_none() && self.after.is_none() && self.order.is_none()
    }

    /// Whether it fits an axis of `len` indices: what is needed for [`apply`] not to panic.
    pub fn fits(&self, len: usize) -> bool {
        let factors =
            |factors: &Option<Cow<[f64]>>| factors.as_ref().is_none_or(|f| f.len() == len);
        let order = self.order.as_ref().is_none_or(|order| {
            order.len() == len && order.iter().all(|index| (*index as usize) < len)
        });
        let mix = self
            .mix
            .is_none_or(|mix| mix.size() > 0 && len.is_multiple_of(mix.size()));
        factors(&self.before) && factors(&self.after) && order && mix
    }

    /// The index before reordering.
    fn source(&self, index: usize) -> usize {
        self.order
            .as_ref()
            .map_or(index, |order| order[index] as usize)
    }

    fn before(&self, index: usize) -> f64 {
        self.before.as_ref().map_or(1.0, |factors| factors[index])
    }

    fn after(&self, index: usize) -> f64 {
        self.after.as_ref().map_or(1.0, |factors| factors[index])
    }

    /// The stored indices that these mapped ones are made of, ascending, each once.
    pub fn needed(&self, wanted: &[usize]) -> Vec<usize> {
        let mut needed: Vec<usize> = wanted.iter().map(|index| self.source(*index)).collect();
        if let Some(mix) = self.mix {
            let size = mix.size();
            let runs = needed.iter().map(|index| index / size);
            let mut runs: Vec<usize> = runs.collect();
            runs.sort_unstable();
            runs.dedup();
            return runs
                .iter()
                .flat_map(|run| run * size..(run + 1) * size)
                .collect();
        }
        needed.sort_unstable();
        needed.dedup();
        needed
    }
}

/// Some rows of a stored matrix.
pub struct StoredRows<'a> {
    /// Which they are, ascending.
    pub indices: Vec<usize>,
    /// Length of a row.
    pub columns: usize,
    /// `[indices, columns]`.
    pub values: &'a [f32],
}

/// Strips whose results wait to be put in place.
const STRIPS_AT_ONCE: usize = 32;

impl StoredRows<'_> {
    /// Where a row is among these.
    fn place(&self, index: usize) -> usize {
        self.indices.partition_point(|stored| *stored < index)
    }
}

/// Rows `wanted` of the mapped matrix, `[wanted, columns]`, converted by `of` from f64. What is mixed is mixed by `mixer`,
/// if there is one, with the same bits where all values are finite. Runs in rayon's current pool.
///
/// `stored` must hold what [`AxisMap::needed`] of the rows says and nothing else, and both maps must fit.
///
/// # Errors
/// The machine that mixes fails.
pub fn apply<T: Copy + Default + Send>(
    mixer: Option<&dyn Mixer>,
    stored: &StoredRows,
    wanted: &[usize],
    rows: &AxisMap,
    columns: &AxisMap,
    of: impl Fn(f64) -> T + Sync,
) -> Result<Vec<T>> {
    let mut out = vec![T::default(); wanted.len() * stored.columns];
    let is_mixed = rows.mix.is_some() || columns.mix.is_some();
    if let Some(mixer) = mixer.filter(|_| is_mixed)
        && apply_on(mixer, stored, wanted, rows, columns, &of, &mut out)?
    {
        return Ok(out);
    }
    apply_here(stored, wanted, rows, columns, of, &mut out);
    Ok(out)
}

/// Writes what a machine mixed, ordered and scaled; `false` where it had no room.
fn apply_on<T: Send>(
    mixer: &dyn Mixer,
    stored: &StoredRows,
    wanted: &[usize],
    rows: &AxisMap,
    columns: &AxisMap,
    of: impl Fn(f64) -> T + Sync,
    out: &mut [T],
) -> Result<bool> {
    let width = stored.columns;
    let all = || 0..width;
    let rows_before = || stored.indices.iter().map(|index| rows.before(*index));
    let mixing = Mixing {
        values: stored.values,
        columns: columns.mix,
        columns_before: all().map(|column| columns.before(column)).collect(),
        columns_after: all().map(|column| columns.after(column)).collect(),
        rows: rows.mix.map(|matrix| (matrix, rows_before().collect())),
    };
    mixer.mix(&mixing, &mut |part: MixedPart| {
        let sources = all().map(|column| (column, columns.source(column)));
        let sources: Vec<(usize, usize)> = sources
            .filter(|(_, source)| part.columns.contains(source))
            .map(|(column, source)| (column, source - part.columns.start))
            .collect();
        let slots = out.chunks_exact_mut(width).zip(wanted);
        parallel::for_each(slots, |(out, row)| {
            let source = rows.source(*row);
            let place = stored.place(source);
            if !part.rows.contains(&place) {
                return;
            }
            let factor = match rows.mix {
                Some(_) => rows.after(source),
                None => rows.before(source) * rows.after(source),
            };
            let made = &part.values[(place - part.rows.start) * part.columns.len()..];
            for (column, at) in &sources {
                out[*column] = of(factor * made[*at]);
            }
        });
    })
}

/// The same on this computer, strip by strip of columns.
fn apply_here<T: Send>(
    stored: &StoredRows,
    wanted: &[usize],
    rows: &AxisMap,
    columns: &AxisMap,
    of: impl Fn(f64) -> T + Sync,
    out: &mut [T],
) {
    let width = stored.columns;
    for batch in strips(width).chunks(STRIPS_AT_ONCE) {
        let made = parallel::map(batch, |strip| {
            let inner = map_columns(stored, columns, strip);
            map_rows(stored, wanted, rows, &inner, padded(strip.len()))
        });
        for (strip, made) in batch.iter().zip(made) {
            let made = made.chunks_exact(padded(strip.len()));
            for (row, made) in out.chunks_exact_mut(width).zip(made) {
                for (slot, value) in row[strip.clone()].iter_mut().zip(made) {
                    *slot = of(*value);
                }
            }
        }
    }
}

/// Columns `strip` of all stored rows after the map of columns: `[indices, padded strip]`.
fn map_columns(stored: &StoredRows, map: &AxisMap, strip: &Range<usize>) -> Vec<f64> {
    match map.mix {
        Some(mix) => mix_columns(stored, map, mix, strip),
        None => {
            let width = padded(strip.len());
            let mut out = vec![0.0; stored.indices.len() * width];
            let rows = stored.values.chunks_exact(stored.columns);
            for (out, row) in out.chunks_exact_mut(width).zip(rows) {
                for (slot, column) in out.iter_mut().zip(strip.clone()) {
                    let source = map.source(column);
                    *slot = f64::from(row[source]) * map.before(source) * map.after(source);
                }
            }
            out
        }
    }
}

fn mix_columns(
    stored: &StoredRows,
    map: &AxisMap,
    mix: &SquareMatrix,
    strip: &Range<usize>,
) -> Vec<f64> {
    let size = mix.size();
    let runs = strip.clone().map(|column| map.source(column) / size);
    let (first, last) = runs.fold((usize::MAX, 0), |(first, last), run| {
        (first.min(run), last.max(run))
    });
    // Columns of other runs than a column's own count for nothing.
    let depth = first * size..(last + 1) * size;
    let right = Packed::of(depth.len(), strip.len(), |k, column| {
        let (k, source) = (depth.start + k, map.source(strip.start + column));
        match k / size == source / size {
            true => map.before(k) * mix.row(k % size)[source % size] * map.after(source),
            false => 0.0,
        }
    });
    let rows = stored.values.chunks_exact(stored.columns);
    let mut out = Vec::with_capacity(stored.indices.len() * padded(strip.len()));
    let mut left = Vec::new();
    const ROWS_AT_ONCE: usize = 16;
    let mut rows = rows.peekable();
    while rows.peek().is_some() {
        left.clear();
        for row in rows.by_ref().take(ROWS_AT_ONCE) {
            left.extend(row[depth.clone()].iter().map(|value| f64::from(*value)));
        }
        out.extend(right.product(&left, left.len() / depth.len()));
    }
    out
}

/// Rows `wanted` of `inner: [indices, width]` after the map of rows.
fn map_rows(
    stored: &StoredRows,
    wanted: &[usize],
    map: &AxisMap,
    inner: &[f64],
    width: usize,
) -> Vec<f64> {
    let mut out = vec![0.0; wanted.len() * width];
    let Some(mix) = map.mix else {
        for (out, row) in out.chunks_exact_mut(width).zip(wanted) {
            let source = map.source(*row);
            let factor = map.before(source) * map.after(source);
            let from = &inner[stored.place(source) * width..][..width];
            out.iter_mut()
                .zip(from)
                .for_each(|(out, x)| *out = factor * x);
        }
        return out;
    };
    let size = mix.size();
    let mut by_run: Vec<(usize, usize)> = wanted
        .iter()
        .map(|row| map.source(*row))
        .enumerate()
        .collect();
    by_run.sort_by_key(|(_, source)| source / size);
    for group in by_run.chunk_by(|a, b| a.1 / size == b.1 / size) {
        let run = group[0].1 / size;
        let begin = stored.place(run * size);
        let right = Packed::of(size, width, |k, column| {
            map.before(run * size + k) * inner[(begin + k) * width + column]
        });
        let mut left = Vec::with_capacity(group.len() * size);
        for (_, source) in group {
            left.extend_from_slice(&mix.transposed()[source % size * size..][..size]);
        }
        let made = right.product(&left, group.len());
        for ((slot, source), made) in group.iter().zip(made.chunks_exact(width)) {
            let factor = map.after(*source);
            let out = &mut out[slot * width..][..width];
            out.iter_mut()
                .zip(made)
                .for_each(|(out, x)| *out = factor * x);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::orthogonal;
    use super::super::random::SplitMix64;
    use super::*;

    /// Mixes by loops, a third of the runs of each axis at a time.
    struct Thirds;

    impl Mixer for Thirds {
        fn mix(&self, mixing: &Mixing, take: &mut dyn FnMut(MixedPart)) -> Result<bool> {
            let ([rows, columns], [row_run, column_run]) = (mixing.shape(), mixing.runs());
            let third = |len: usize, run: usize| (len / run).div_ceil(3) * run;
            for first_row in (0..rows).step_by(third(rows, row_run)) {
                for first in (0..columns).step_by(third(columns, column_run)) {
                    let rows = first_row..rows.min(first_row + third(rows, row_run));
                    let columns = first..columns.min(first + third(columns, column_run));
                    let entries = rows
                        .clone()
                        .flat_map(|i| columns.clone().map(move |j| (i, j)));
                    take(MixedPart {
                        values: entries.map(|(i, j)| entry(mixing, i, j)).collect(),
                        rows,
                        columns,
                    });
                }
            }
            Ok(true)
        }

        fn product(&self, _: &[f64], _: &SquareMatrix) -> Result<Option<Vec<f64>>> {
            Ok(None)
        }
    }

    /// Mixed rows of mixed columns.
    fn entry(mixing: &Mixing, i: usize, j: usize) -> f64 {
        match &mixing.rows {
            None => inner(mixing, i, j),
            Some((q, before)) => run_of(q, i).fold(0.0, |sum, k| {
                let size = q.size();
                sum + q.row(k % size)[i % size] * (before[k] * inner(mixing, k, j))
            }),
        }
    }

    /// Mixed columns.
    fn inner(mixing: &Mixing, i: usize, j: usize) -> f64 {
        let row = &mixing.values[i * mixing.shape()[1]..];
        let (before, after) = (&mixing.columns_before, &mixing.columns_after);
        match mixing.columns {
            None => f64::from(row[j]) * before[j] * after[j],
            Some(q) => run_of(q, j).fold(0.0, |sum, k| {
                let size = q.size();
                sum + f64::from(row[k]) * (before[k] * q.row(k % size)[j % size] * after[j])
            }),
        }
    }

    fn run_of(q: &SquareMatrix, index: usize) -> Range<usize> {
        let run = index / q.size();
        run * q.size()..(run + 1) * q.size()
    }

    /// The definition, entry by entry.
    fn expected(map: &AxisMap, len: usize, entry: impl Fn(usize) -> f64, index: usize) -> f64 {
        let source = map.source(index);
        let sum: f64 = match map.mix {
            None => map.before(source) * entry(source),
            Some(mix) => (0..len)
                .filter(|k| k / mix.size() == source / mix.size())
                .map(|k| mix.row(k % mix.size())[source % mix.size()] * map.before(k) * entry(k))
                .sum(),
        };
        map.after(source) * sum
    }

    #[test]
    fn any_rows_of_any_maps_follow_the_definition() {
        let (height, width) = (12, 150);
        let mut random = SplitMix64::new(3);
        let values: Vec<f32> = (0..height * width)
            .map(|_| random.next_uniform() as f32)
            .collect();
        let mut factors = |len: usize| -> Option<Cow<[f64]>> {
            let factors = (0..len).map(|_| 1.5 + random.next_uniform());
            Some(factors.collect::<Vec<_>>().into())
        };
        let reversed = |len: u32| Some((0..len).rev().collect::<Vec<_>>().into());
        let (whole, thirds, pairs) = (
            orthogonal::random(width, 1),
            orthogonal::random(50, 2),
            orthogonal::random(4, 3),
        );
        let columns = [
            AxisMap::default(),
            AxisMap {
                before: factors(width),
                order: reversed(width as u32),
                ..AxisMap::default()
            },
            AxisMap {
                before: factors(width),
                mix: Some(&whole),
                after: factors(width),
                order: None,
            },
            AxisMap {
                mix: Some(&thirds),
                after: factors(width),
                order: reversed(width as u32),
                before: None,
            },
        ];
        let rows = [
            AxisMap::default(),
            AxisMap {
                after: factors(height),
                order: reversed(height as u32),
                ..AxisMap::default()
            },
            AxisMap {
                before: factors(height),
                mix: Some(&pairs),
                after: factors(height),
                order: reversed(height as u32),
            },
        ];
        for (rows, columns) in rows
            .iter()
            .flat_map(|r| columns.iter().map(move |c| (r, c)))
        {
            assert!(rows.fits(height) && columns.fits(width));
            for wanted in [vec![0], vec![7, 2, 11], (0..height).collect()] {
                let indices = rows.needed(&wanted);
                let part: Vec<f32> = indices
                    .iter()
                    .flat_map(|row| values[row * width..][..width].to_vec())
                    .collect();
                let stored = StoredRows {
                    indices,
                    columns: width,
                    values: &part,
                };
                let found = apply(None, &stored, &wanted, rows, columns, |x| x).unwrap();
                let parts = apply(Some(&Thirds), &stored, &wanted, rows, columns, |x| x);
                assert_eq!(parts.unwrap(), found);
                for (index, row) in wanted.iter().enumerate() {
                    for column in 0..width {
                        let inner = |row: usize| {
                            let entry = |k: usize| f64::from(values[row * width + k]);
                            expected(columns, width, entry, column)
                        };
                        let expected = expected(rows, height, inner, *row);
                        let found = found[index * width + column];
                        assert!((found - expected).abs() < 1e-12, "{found}, {expected}");
                    }
                }
            }
        }
    }
}
