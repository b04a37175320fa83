//! Second moments of rows, in pairs of floats.

use std::ops::Range;

use super::stored::{Packed, TILE};
use super::word;
use crate::array::{Array, Device};
use crate::error::Result;
use crate::kernels;

/// Rows of inputs that are summed in f32 before the sums are added without loss.
const GRAM_ROWS: usize = 512;
/// Rows and columns of second moments that a group of threads computes.
const GRAM_TILE: usize = 32;
/// Bytes of second moments that are held together.
const GRAM_BYTES: u64 = 512 << 20;

impl Device {
    /// Rows of second moments of width `n` that [`Self::gram`] may be asked for together.
    pub fn gram_strips(&self, n: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let limits = self.description().limits;
        let rows = (limits.view_bytes.min(GRAM_BYTES) as usize / (8 * n.max(1))).max(1);
        (0..n)
            .step_by(rows)
            .map(move |first| first..n.min(first + rows))
    }

    /// `sums += X^T X` for `x [_, n]`, in strips of rows of it, each with its sums: `sums [strip, n]` pairs of floats, the large
    /// and the small part of each sum; columns from about the row on are meant.
    ///
    /// # Errors
    /// Device lost; sums are larger than a view may be (see [`Self::gram_strips`]).
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn gram(&self, x: &Array, n: usize, strips: &mut [(Range<usize>, Array)]) -> Result<()> {
        assert!(x.len().is_multiple_of(n));
        let count = x.len() / n;
        for first in (0..count).step_by(GRAM_ROWS) {
            let rows = first..count.min(first + GRAM_ROWS);
            let columns = self.split_columns(x, n, rows.clone())?;
            for (strip, sums) in &mut *strips {
                assert!(sums.len() == 2 * strip.len() * n);
                match &columns {
                    Some(columns) => self.gram_of_parts(columns, strip, sums)?,
                    None => self.gram_of_rows(x, n, rows.clone(), strip, sums)?,
                }
            }
        }
        Ok(())
    }

    fn gram_of_rows(
        &self,
        x: &Array,
        n: usize,
        rows: Range<usize>,
        strip: &Range<usize>,
        sums: &Array,
    ) -> Result<()> {
        let (view, first_value) = x.part(rows.start * n..rows.end * n);
        let sizes = [rows.len(), n, strip.start, strip.len()].map(word);
        // The last one is a zero that compilers must not know.
        let parameters = [&sizes[..], &[first_value, 0]].concat();
        let groups = strip.len().div_ceil(GRAM_TILE) * n.div_ceil(GRAM_TILE);
        let views = [view, sums.view()];
        self.launch(&kernels::GRAM, word(groups), &views, &parameters)
    }

    /// Some rows of `x`, each column in parts; `None` where sums are not those of parts, or there is no room for them.
    fn split_columns(&self, x: &Array, n: usize, rows: Range<usize>) -> Result<Option<Packed>> {
        match self.splits(n, n, rows.len()) {
            true => self.try_split(x, [rows.start * n, 1, n], n, rows.len()),
            false => Ok(None),
        }
    }

    fn gram_of_parts(&self, columns: &Packed, strip: &Range<usize>, sums: &Array) -> Result<()> {
        let n = columns.rows();
        // The last one is a zero that compilers must not know.
        let parameters = [n, columns.width(), strip.start, strip.len(), 0].map(word);
        let groups = strip.len().div_ceil(TILE) * n.div_ceil(TILE);
        let views = [columns.part(0..n).0, sums.view()];
        self.launch(&kernels::GRAM_SPLIT, word(groups), &views, &parameters)
    }
}
