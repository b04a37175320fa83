//! Kernels that take rows of logits as distributions. They give sums of parts of rows, which are put together here, in f64.

use std::ops::Range;

use super::word;
use crate::array::{Array, Device};
use crate::error::Result;
use crate::kernels;

/// What softmax needs of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftmaxSums {
    /// The largest; NaN is passed over.
    pub max: f32,
    /// Index of the first largest.
    pub best: usize,
    /// `sum e^(logit - max)`; NaN where a logit is, or is +infinity.
    pub sum: f64,
}

/// Two rows of logits as distributions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KlDivergence {
    /// The first row.
    pub reference: SoftmaxSums,
    /// The second row.
    pub other: SoftmaxSums,
    /// KL(reference || other), nats.
    pub kl_divergence: f64,
}

/// Rows of logits of which the first values count.
#[derive(Clone, Copy)]
pub struct LogitRows<'a> {
    /// `[rows, stride]`.
    pub logits: &'a Array,
    /// Values from one row to the next.
    pub stride: usize,
}

/// Values that a group of threads sums up: a vocabulary of 131072 keeps 32 groups busy with each row.
const PART: usize = 4096;
/// Words of the sums of a part.
const WORDS: usize = 4;

impl LogitRows<'_> {
    fn rows(&self) -> usize {
        self.logits.len() / self.stride
    }

    fn values(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start * self.stride..rows.end * self.stride
    }
}

/// A number in two floats.
fn whole(pair: &[f32]) -> f64 {
    f64::from(pair[0]) + f64::from(pair[1])
}

/// What the sum of a part is multiplied with in that of its row.
fn share(part: &[f32], row: &SoftmaxSums) -> f64 {
    (f64::from(part[0]) - f64::from(row.max)).exp()
}

/// The sums of a row from those of its parts.
fn put_together(parts: &[f32]) -> SoftmaxSums {
    let mut row = SoftmaxSums {
        max: f32::NEG_INFINITY,
        best: 0,
        sum: 0.0,
    };
    let parts = parts.as_chunks::<WORDS>().0;
    for [max, best, ..] in parts {
        if *max > row.max {
            (row.max, row.best) = (*max, best.to_bits() as usize);
        }
    }
    let shares = parts
        .iter()
        .map(|part| share(part, &row) * whole(&part[2..]));
    row.sum = shares.sum();
    row
}

impl Device {
    /// What softmax needs of every row of `width` logits; waits for the device.
    ///
    /// # Errors
    /// Out of memory, device lost.
    pub fn softmax_sums(&self, logits: &Array, width: usize) -> Result<Vec<SoftmaxSums>> {
        let stride = width;
        let rows = LogitRows { logits, stride };
        let mut all = Vec::with_capacity(rows.rows());
        for part in self.rows_of_views(0..rows.rows(), [4 * width; 2]) {
            let sums = self.sums_of_parts(rows, part, width)?;
            let sums = self.download_all(&sums)?;
            all.extend(sums.chunks(WORDS * width.div_ceil(PART)).map(put_together));
        }
        Ok(all)
    }

    /// The KL divergence of each row of `reference` and that of `other`, of which `width` logits count; waits for the
    /// device. Magnitudes above 1e30 may overflow: the divergence is no number then.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// Rows are missing, or shorter than `width`.
    pub fn kl_divergence(
        &self,
        reference: LogitRows,
        other: LogitRows,
        width: usize,
    ) -> Result<Vec<KlDivergence>> {
        assert_eq!(reference.rows(), other.rows());
        let row_bytes = [reference, other].map(|rows| 4 * rows.stride);
        let mut all = Vec::with_capacity(reference.rows());
        for rows in self.rows_of_views(0..reference.rows(), row_bytes) {
            let x_sums = self.sums_of_parts(reference, rows.clone(), width)?;
            let y_sums = self.sums_of_parts(other, rows.clone(), width)?;
            let differences =
                self.weighted_differences([reference, other], rows, width, &x_sums)?;
            let [x_sums, y_sums] = [x_sums, y_sums].map(|sums| self.download_all(&sums));
            let (x_sums, y_sums) = (x_sums?, y_sums?);
            let differences = self.download_all(&differences)?;
            let parts = width.div_ceil(PART);
            let rows = x_sums
                .chunks(WORDS * parts)
                .zip(y_sums.chunks(WORDS * parts))
                .zip(differences.chunks(2 * parts));
            all.extend(rows.map(|((x, y), differences)| divergence(x, y, differences)));
        }
        Ok(all)
    }

    /// Four words of each part of some rows.
    fn sums_of_parts(&self, of: LogitRows, rows: Range<usize>, width: usize) -> Result<Array> {
        assert!((1..=of.stride).contains(&width));
        let items = rows.len() * width.div_ceil(PART);
        let out = self.uninitialized(WORDS * items)?;
        let (x, first) = of.logits.part(of.values(&rows));
        let sizes = [rows.len(), width, of.stride].map(word);
        // The last one is a zero that compilers must not know.
        let parameters = [&sizes[..], &[first, word(PART), 0]].concat();
        let views = [x, out.view()];
        self.launch(&kernels::SOFTMAX_SUMS, word(items), &views, &parameters)?;
        Ok(out)
    }

    /// `sum e^(x - max) (x - y)` of each part of some rows of x and y, in two floats.
    fn weighted_differences(
        &self,
        [x, y]: [LogitRows; 2],
        rows: Range<usize>,
        width: usize,
        x_sums: &Array,
    ) -> Result<Array> {
        let items = rows.len() * width.div_ceil(PART);
        let out = self.uninitialized(2 * items)?;
        let (x_view, first_x) = x.logits.part(x.values(&rows));
        let (y_view, first_y) = y.logits.part(y.values(&rows));
        let parameters = [
            word(rows.len()),
            word(width),
            word(x.stride),
            first_x,
            word(y.stride),
            first_y,
            word(PART),
            // A zero that compilers must not know.
            0,
        ];
        let views = [x_view, y_view, x_sums.view(), out.view()];
        self.launch(&kernels::KL_DIVERGENCE, word(items), &views, &parameters)?;
        Ok(out)
    }
}

/// `sum p (ln p - ln q)` from the sums of the parts of a row.
fn divergence(x: &[f32], y: &[f32], differences: &[f32]) -> KlDivergence {
    let (reference, other) = (put_together(x), put_together(y));
    let parts = x.chunks(WORDS).zip(differences.chunks(2));
    let weighted: f64 = parts
        .map(|(part, difference)| share(part, &reference) * whole(difference))
        .sum();
    let of_max = f64::from(reference.max) - f64::from(other.max);
    let of_sum = reference.sum.ln() - other.sum.ln();
    KlDivergence {
        reference,
        other,
        kl_divergence: weighted / reference.sum - of_max - of_sum,
    }
}
