//! What stays on a device while a matrix is calibrated and rounded: sums of products of inputs, rows that are multiplied.
//!
//! Enters: rows of inputs that lie there, columns of rows to hold. Leaves: sums in f64, products. Knows no weights.

use std::ops::Range;

use nemoconv_device::{Array, Device, FEEDBACK_CHUNK, MatmulLayout, Packed};

use super::rounding::RoundingOnDevice;
use super::{OnDevice, TILE_BYTES, or_no_room};
use crate::backend::ProductSums;
use crate::error::Result;
use crate::parallel;
use crate::quantize::feedback::{
    GridDescription, HeldRows, RoundingRows, RowProducts, SUMMED_COLUMNS,
};

/// Rows whose products are summed in f32 before the sums are added without loss.
const CROSS_ROWS: usize = 4096;
/// Sums that a thread of this computer takes at a time.
const SUMMED: usize = 1 << 16;

/// Second moments, in strips of rows that fit a view: pairs of floats, the large and the small part of each sum.
pub struct GramOnDevice<'a> {
    on: &'a OnDevice,
    n: usize,
    strips: Vec<(Range<usize>, Array)>,
}

impl<'a> GramOnDevice<'a> {
    /// Zeros, `[n, n]`.
    pub fn new(on: &'a OnDevice, n: usize) -> Result<Self> {
        let device = on.device();
        let zeros = |strip: Range<usize>| {
            let sums = device.zeros(2 * strip.len() * n)?;
            Ok((strip, sums))
        };
        let strips = device.gram_strips(n).map(zeros).collect::<Result<_>>()?;
        Ok(Self { on, n, strips })
    }
}

impl ProductSums<Array> for GramOnDevice<'_> {
    fn add(&mut self, _: &Array, u: &Array) -> Result<()> {
        let device = self.on.counted("gram");
        Ok(device.gram(u, self.n, &mut self.strips)?)
    }

    fn finish(&self, sums: &mut [f64]) -> Result<()> {
        add_strips(self.on.device(), &self.strips, self.n, sums)
    }
}

/// Adds sums in pairs of floats, strip by strip of rows of `n`.
fn add_strips(
    device: &Device,
    strips: &[(Range<usize>, Array)],
    n: usize,
    sums: &mut [f64],
) -> Result<()> {
    for (strip, found) in strips {
        let found = device.download_all(found)?;
        let sums = sums[strip.start * n..strip.end * n].chunks_mut(SUMMED);
        let found = found.chunks(2 * SUMMED);
        parallel::for_each(sums.zip(found), |(sums, found)| {
            for (sum, parts) in sums.iter_mut().zip(found.chunks_exact(2)) {
                *sum += f64::from(parts[0]) + f64::from(parts[1]);
            }
        });
    }
    Ok(())
}

/// Products of two kinds of rows, in strips of columns of the first: pairs of floats, as of second moments.
pub struct CrossGramOnDevice<'a> {
    on: &'a OnDevice,
    width: usize,
    n: usize,
    strips: Vec<(Range<usize>, Array)>,
}

impl<'a> CrossGramOnDevice<'a> {
    /// Zeros, `[width, n]`.
    pub fn new(on: &'a OnDevice, width: usize, n: usize) -> Result<Self> {
        let step = (TILE_BYTES / (8 * n)).max(1);
        let strips = (0..width).step_by(step).map(|first| {
            let strip = first..width.min(first + step);
            let sums = on.device().zeros(2 * strip.len() * n)?;
            Ok((strip, sums))
        });
        Ok(Self {
            on,
            width,
            n,
            strips: strips.collect::<Result<_>>()?,
        })
    }

    /// Rows that one product takes: as many as views show of both kinds, and few enough for sums in f32.
    fn rows_at_once(&self) -> usize {
        let limits = self.on.device().description().limits;
        let values = (limits.view_bytes - limits.view_alignment) / 4;
        (values as usize / self.width.max(self.n)).clamp(1, CROSS_ROWS)
    }

    /// Columns of some rows of both kinds in parts, if their products are those of parts.
    fn in_parts(&self, v: &Array, u: &Array, rows: &Range<usize>) -> Result<Option<[Packed; 2]>> {
        let device = self.on.device();
        if !device.splits(self.width, self.n, rows.len()) {
            return Ok(None);
        }
        let columns =
            |x: &Array, n: usize| device.try_split(x, [rows.start * n, 1, n], n, rows.len());
        let (v, u) = (columns(v, self.width)?, columns(u, self.n)?);
        Ok(v.zip(u).map(|(v, u)| [v, u]))
    }

    fn add_rows(&mut self, v: &Array, u: &Array, rows: Range<usize>) -> Result<()> {
        let device = self.on.device();
        let parts = self.in_parts(v, u, &rows)?;
        for (strip, sums) in &mut self.strips {
            let mut product = device.uninitialized(strip.len() * self.n)?;
            if let Some([v, u]) = &parts {
                let (factors, place) = ([1.0, 0.0], [0, self.n]);
                device.matmul_split(v, strip.clone(), u, factors, place, &mut product)?;
            } else {
                let layout = MatmulLayout {
                    a: [rows.start * self.width + strip.start, 1, self.width],
                    b: [rows.start * self.n, self.n, 1],
                    ..MatmulLayout::linear(strip.len(), rows.len(), self.n, 0, self.n)
                };
                device.matmul(&layout, v, u, &mut product)?;
            }
            device.accumulate(sums, &product)?;
        }
        Ok(())
    }
}

impl ProductSums<Array> for CrossGramOnDevice<'_> {
    fn add(&mut self, v: &Array, u: &Array) -> Result<()> {
        self.on.counted("cross_gram");
        let (rows, step) = (u.len() / self.n, self.rows_at_once());
        for first in (0..rows).step_by(step) {
            self.add_rows(v, u, first..rows.min(first + step))?;
        }
        Ok(())
    }

    fn finish(&self, sums: &mut [f64]) -> Result<()> {
        add_strips(self.on.device(), &self.strips, self.n, sums)
    }
}

impl OnDevice {
    /// Zeros to hold rows in, where there is room beside them for a part of a matrix, its products and their sums.
    fn rows_with_room(&self, rows: usize, columns: usize) -> Result<Array> {
        let values = self.device().zeros(rows * columns)?;
        let room = |values: usize| self.device().uninitialized(values * FEEDBACK_CHUNK);
        let _beside = [room(columns)?, room(2 * rows)?, room(rows)?];
        Ok(values)
    }
}

impl RowProducts for OnDevice {
    fn hold(&self, rows: usize, columns: usize) -> Result<Option<Box<dyn HeldRows + '_>>> {
        let Some(values) = or_no_room(self.rows_with_room(rows, columns))? else {
            self.open.tally.host("row_products");
            return Ok(None);
        };
        Ok(Some(Box::new(RowsOnDevice {
            on: self,
            rows,
            values,
        })))
    }

    fn rounding(
        &self,
        grid: &GridDescription,
        rows: usize,
        columns: usize,
    ) -> Result<Option<Box<dyn RoundingRows + '_>>> {
        let Some(rows) = RoundingOnDevice::new(self, grid, rows, columns)? else {
            self.open.tally.host("feedback_sweep");
            return Ok(None);
        };
        Ok(Some(Box::new(rows)))
    }
}

/// Rows that are multiplied where they are, `[column, row]`: a chunk of columns is one piece.
struct RowsOnDevice<'a> {
    on: &'a OnDevice,
    rows: usize,
    values: Array,
}

impl RowsOnDevice<'_> {
    /// As many columns as one view may span.
    fn columns_in_a_view(&self) -> usize {
        let limits = self.on.device().description().limits;
        let values = (limits.view_bytes - limits.view_alignment) / 4;
        (values as usize / self.rows.max(1)).max(1)
    }

    /// Columns `columns` times rows of `part` from `first_row` on, `[width, row]`.
    fn product(
        &self,
        columns: Range<usize>,
        (part, first_row): (&Array, usize),
        beta: f32,
        out: &mut Array,
    ) -> Result<()> {
        let width = out.len() / self.rows.max(1);
        let layout = MatmulLayout {
            a: [first_row * width, 1, width],
            b: [columns.start * self.rows, self.rows, 1],
            beta,
            is_fused: true,
            ..MatmulLayout::linear(width, columns.len(), self.rows, 0, self.rows)
        };
        Ok(self.on.device().matmul(&layout, part, &self.values, out)?)
    }
}

impl HeldRows for RowsOnDevice<'_> {
    fn set(&mut self, first: usize, columns: &[f32]) -> Result<()> {
        let at = first * self.rows;
        Ok(self.on.device().write(&mut self.values, at, columns)?)
    }

    fn times(&mut self, inputs: Range<usize>, part: &[f32], width: usize) -> Result<Vec<f32>> {
        let device = self.on.counted("row_products");
        let part = device.upload(part)?;
        let mut out = device.zeros(width * self.rows)?;
        let step = self.columns_in_a_view();
        for first in inputs.clone().step_by(step) {
            let columns = first..inputs.end.min(first + step);
            self.product(columns, (&part, first - inputs.start), 1.0, &mut out)?;
        }
        Ok(device.download_all(&out)?)
    }

    fn times_exactly(
        &mut self,
        inputs: Range<usize>,
        part: &[f32],
        width: usize,
    ) -> Result<Vec<f64>> {
        let device = self.on.counted("exact_row_products");
        let part = device.upload(part)?;
        let mut sums = device.zeros(2 * width * self.rows)?;
        let mut product = device.uninitialized(width * self.rows)?;
        let step = self.columns_in_a_view().min(SUMMED_COLUMNS);
        for first in inputs.clone().step_by(step) {
            let columns = first..inputs.end.min(first + step);
            self.product(columns, (&part, first - inputs.start), 0.0, &mut product)?;
            device.accumulate(&mut sums, &product)?;
        }
        let found = device.download_all(&sums)?;
        let mut sums = vec![0.0; found.len() / 2];
        let parts = sums.chunks_mut(SUMMED).zip(found.chunks(2 * SUMMED));
        parallel::for_each(parts, |(sums, found)| {
            for (sum, parts) in sums.iter_mut().zip(found.chunks_exact(2)) {
                *sum = f64::from(parts[0]) + f64::from(parts[1]);
            }
        });
        Ok(sums)
    }
}
