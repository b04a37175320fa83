//! Kernels that take rows column by column, or all values together, and leave a few numbers.

use super::{groups_of, word};
use crate::array::{Array, Device};
use crate::error::Result;
use crate::kernels;

/// What the columns of some rows come to.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnSums {
    /// Sums of values.
    pub sums: Vec<f64>,
    /// Sums of squares.
    pub squares: Vec<f64>,
    /// Largest magnitudes; NaN is passed over.
    pub max_abs: Vec<f32>,
}

/// Bins of magnitudes: the upper bits of an f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MagnitudeBins {
    /// Bits below those that number the bins.
    pub shift: u32,
    /// The number of the first bin, which takes all that is smaller.
    pub least: u32,
}

impl MagnitudeBins {
    /// How many there are; the last one takes all that is larger.
    pub const COUNT: usize = 1024;
}

/// Rows that a group of threads sums up.
const PART_ROWS: usize = 512;
/// Columns of a group.
const TILE_COLUMNS: usize = 32;
/// Numbers of a column: two sums in two floats each, a magnitude.
const NUMBERS: usize = 5;
/// Values that a group of threads counts.
const PART_VALUES: usize = 1 << 14;

impl ColumnSums {
    /// Zeros.
    fn empty(n: usize) -> Self {
        Self {
            sums: vec![0.0; n],
            squares: vec![0.0; n],
            max_abs: vec![0.0; n],
        }
    }

    /// Adds what the kernel found of some rows, `[NUMBERS, n]`.
    fn add(&mut self, found: &[f32]) {
        let n = self.sums.len();
        let pairs = |at: usize| {
            found[at * n..]
                .iter()
                .zip(&found[(at + 1) * n..(at + 2) * n])
        };
        for (sums, at) in [(&mut self.sums, 0), (&mut self.squares, 2)] {
            for (sum, (large, small)) in sums.iter_mut().zip(pairs(at)) {
                *sum += f64::from(*large) + f64::from(*small);
            }
        }
        let largest = self.max_abs.iter_mut().zip(&found[4 * n..]);
        largest.for_each(|(max, found)| *max = max.max(*found));
    }
}

impl Device {
    /// What the columns of `x [_, n]` come to; waits for the device.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn column_sums(&self, x: &Array, n: usize) -> Result<ColumnSums> {
        assert!(x.len().is_multiple_of(n));
        let mut all = ColumnSums::empty(n);
        for rows in self.rows_of_views(0..x.len() / n, [4 * n, 0]) {
            let parts = rows.len().div_ceil(PART_ROWS);
            let out = self.uninitialized(parts * NUMBERS * n)?;
            let (view, first_value) = x.part(rows.start * n..rows.end * n);
            // The last one is a zero that compilers must not know.
            let parameters = [word(rows.len()), word(n), first_value, word(PART_ROWS), 0];
            let groups = word(parts * n.div_ceil(TILE_COLUMNS));
            let views = [view, out.view()];
            self.launch(&kernels::COLUMN_SUMS, groups, &views, &parameters)?;
            let found = self.download_all(&out)?;
            found.chunks(NUMBERS * n).for_each(|found| all.add(found));
        }
        Ok(all)
    }

    /// How many of the values have which magnitude; what is not finite is left out. Waits for the device.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn magnitude_counts(&self, values: &Array, bins: MagnitudeBins) -> Result<Vec<u32>> {
        let counts = self.zeros(MagnitudeBins::COUNT)?;
        for first in (0..values.len()).step_by(self.part_values()) {
            let part = first..values.len().min(first + self.part_values());
            let count = part.len();
            let (view, first_value) = values.part(part);
            let parameters = [
                word(count),
                first_value,
                word(PART_VALUES),
                bins.shift,
                bins.least,
            ];
            let groups = groups_of(count, word(PART_VALUES));
            let views = [view, counts.view()];
            self.launch(&kernels::MAGNITUDE_COUNTS, groups, &views, &parameters)?;
        }
        let counts = self.download_all(&counts)?;
        Ok(counts.into_iter().map(f32::to_bits).collect())
    }
}
