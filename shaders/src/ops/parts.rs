//! Rows that one launch takes, where arrays have more bytes than a view may span.

use std::ops::Range;

use super::word;
use crate::array::{Array, Device};
use crate::driver::View;

/// Kernels count the values of a view in 32 bits, and threads beyond the last.
const MOST_BYTES: u64 = 1 << 32;

/// Rows of one launch, in arrays whose views begin with the same row.
pub(super) struct RowPart {
    /// Where views begin: at the first of `rows`, or at one before that lies where views may begin.
    begin: usize,
    pub(super) rows: Range<usize>,
}

impl RowPart {
    /// These rows of an array, of `width` values each; the last one of all may be shorter.
    pub(super) fn view(&self, array: &Array, width: usize) -> View {
        let end = array.len().min(self.rows.end * width);
        array.part(self.begin * width..end).0
    }

    /// Rows of the views before the first that is meant.
    pub(super) fn first_row(&self) -> u32 {
        word(self.rows.start - self.begin)
    }
}

impl Device {
    /// Bytes that a view of one launch may span.
    pub(super) fn view_bytes(&self) -> usize {
        self.description().limits.view_bytes.min(MOST_BYTES) as usize
    }

    /// Bytes that fit a view wherever they begin: at most an alignment before what it shows.
    pub(super) fn least_view(&self) -> usize {
        self.view_bytes() - self.view_alignment()
    }

    fn view_alignment(&self) -> usize {
        self.description().limits.view_alignment as usize
    }

    /// Whether one view shows these bytes.
    pub(super) fn fits_a_view(&self, bytes: &Range<usize>) -> bool {
        bytes.end - bytes.start / self.view_alignment() * self.view_alignment() <= self.view_bytes()
    }

    /// Rows, of so many bytes in each array, as many at a time as views show wherever they begin: for kernels that take
    /// the first value of a view. A row that no view spans comes alone.
    pub(super) fn rows_of_views(
        &self,
        rows: Range<usize>,
        row_bytes: [usize; 2],
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let [a, b] = row_bytes;
        let step = (self.least_view() / a.max(b).max(1)).max(1);
        let end = rows.end;
        rows.step_by(step)
            .map(move |first| first..end.min(first + step))
    }

    /// Rows, of so many bytes in each array, as many at a time as views show: for kernels whose arrays begin where their
    /// views do. Views begin with every so many rows as are whole alignments, 64 for rows of an odd number of values at an
    /// alignment of 256 bytes: views of 128 MiB show them up to 2 MiB each. More are not cut, for the launch to refuse.
    pub(super) fn parts_of_rows(
        &self,
        rows: Range<usize>,
        row_bytes: &[usize],
    ) -> impl Iterator<Item = RowPart> + use<> {
        let aligned = row_bytes.iter().map(|bytes| self.aligned_rows(*bytes));
        let aligned = aligned.max().unwrap_or(1);
        let widest = row_bytes.iter().copied().max().unwrap_or(0);
        let fitting = self.view_bytes() / widest.max(1);
        let begin = rows.start / aligned * aligned;
        let step = match rows.end - begin {
            all if all <= fitting => all.max(1),
            _ => (fitting / aligned).max(1) * aligned,
        };
        (begin..rows.end).step_by(step).map(move |begin| RowPart {
            begin,
            rows: begin.max(rows.start)..rows.end.min(begin + step),
        })
    }

    /// So many rows are whole alignments, which are powers of two.
    fn aligned_rows(&self, row_bytes: usize) -> usize {
        let alignment = self.view_alignment();
        alignment >> alignment.trailing_zeros().min(row_bytes.trailing_zeros())
    }
}
