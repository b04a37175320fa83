//! Integers of packed checkpoints as values.

use std::ops::Range;

use nemoconv_formats::Dtype;
use nemoconv_formats::packed::bits::WORD_BYTES;
use nemoconv_formats::packed::{Group, IntegerCodes};

use super::packed::{scale_type, stored, stored_items, whole_heads};
use super::{groups_of, word};
use crate::array::{Array, Bytes, Device};
use crate::error::Result;
use crate::kernels;

/// Integers of a packed checkpoint: how rows of codes, scales and zero points lie in their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntegerLayout {
    /// How codes are stored.
    pub codes: IntegerCodes,
    /// Codes of a row.
    pub columns: usize,
    /// What shares a scale and a zero point.
    pub group: Group,
    /// BF16, F16 or F32.
    pub scales: Dtype,
    /// Rows of a head whose halves are to be interleaved; 0 where rows stay in their order.
    pub head_rows: usize,
}

impl IntegerLayout {
    /// Bytes from one row of codes to the next, and from 32 bits of a row to the next, where all codes have so many bytes.
    fn steps(&self, bytes: usize) -> [usize; 2] {
        match self.codes {
            IntegerCodes::Packed(width) => [width.words(self.columns) * WORD_BYTES, WORD_BYTES],
            IntegerCodes::Transposed(width) => {
                [WORD_BYTES, bytes / width.words(self.columns).max(1)]
            }
            IntegerCodes::Bytes => [self.columns, WORD_BYTES],
        }
    }

    /// The bytes of codes from the first to the last that these rows need, where all codes have so many.
    fn codes_of(&self, rows: &Range<usize>, bytes: usize) -> Range<usize> {
        let [row_bytes, _] = self.steps(bytes);
        match self.codes {
            IntegerCodes::Transposed(_) => rows.start * row_bytes..bytes,
            _ => rows.start * row_bytes..rows.end * row_bytes,
        }
    }

    /// Columns that share a scale.
    fn group_columns(&self) -> usize {
        match self.group {
            Group::Columns(columns) => columns,
            Group::Row | Group::Tensor => self.columns,
        }
    }

    /// Scales of a row.
    fn groups(&self) -> usize {
        self.columns / self.group_columns()
    }

    /// Scales from one row to the next.
    fn scale_step(&self) -> usize {
        match self.group {
            Group::Tensor => 0,
            _ => self.groups(),
        }
    }

    /// What the method promises to panic at.
    fn check(&self, has_zeros: bool) {
        let is_whole = matches!(self.group, Group::Row | Group::Tensor);
        let group_columns = self.group_columns();
        assert!(
            is_whole || group_columns > 0 && self.columns.is_multiple_of(group_columns),
            "groups do not divide rows: {self:?}"
        );
        let is_packed = self.codes != IntegerCodes::Bytes;
        assert!(
            !(has_zeros && is_packed && self.group == Group::Tensor),
            "packed zero points of a whole tensor"
        );
    }

    /// The scales that these rows need.
    fn scales_of(&self, rows: &Range<usize>) -> Range<usize> {
        match self.group {
            Group::Tensor => 0..1,
            _ => rows.start * self.groups()..rows.end * self.groups(),
        }
    }

    /// The bytes of zero points that these rows need, and the rows before them in the first word.
    fn zeros_of(&self, rows: &Range<usize>) -> (Range<usize>, usize) {
        match self.codes {
            IntegerCodes::Bytes => (self.scales_of(rows), 0),
            IntegerCodes::Packed(width) | IntegerCodes::Transposed(width) => {
                let row_of_words = self.groups() * WORD_BYTES;
                let words = rows.start / width.per_word()..width.words(rows.end);
                let bytes = words.start * row_of_words..words.end * row_of_words;
                (bytes, rows.start % width.per_word())
            }
        }
    }

    /// Bits of a code, and what to change in it so that all are too large by half their number.
    fn digits(&self) -> [usize; 2] {
        match self.codes {
            IntegerCodes::Packed(width) | IntegerCodes::Transposed(width) => [width.bits(), 0],
            IntegerCodes::Bytes => [8, 0x80],
        }
    }
}

impl Device {
    /// Values of some rows of integers, `(code - zero) * scale`, to the first values of `out`. `codes`, `scales` and
    /// `zeros` hold rows from the first on, as a checkpoint stores them; symmetric weights have no zero points.
    ///
    /// # Errors
    /// Device lost; the values or bytes of these rows are more than a view may span.
    ///
    /// # Panics
    /// The rows are not all there or do not fit `out`, groups do not divide them, scales are of another type, or packed
    /// zero points belong to a whole tensor.
    pub fn dequantize_integers(
        &self,
        layout: &IntegerLayout,
        codes: &Bytes,
        scales: &Bytes,
        zeros: Option<&Bytes>,
        rows: Range<usize>,
        out: &mut Array,
    ) -> Result<()> {
        layout.check(zeros.is_some());
        let count = rows.len() * layout.columns;
        assert!(
            count <= out.len(),
            "{rows:?} of {layout:?} do not fit {} values",
            out.len()
        );
        if count == 0 {
            return Ok(());
        }
        let zero_type = match (zeros, layout.codes) {
            (None, _) => 0,
            (Some(_), IntegerCodes::Bytes) => 1,
            (Some(_), _) => 2,
        };
        let heads = whole_heads(&rows, layout.head_rows);
        let all = codes.len() as usize;
        let [row_bytes, word_bytes] = layout.steps(all);
        let (codes, first_code) = stored(codes, layout.codes_of(&heads, all));
        let of_rows = layout.scales_of(&heads);
        let (scales, first_scale) = stored_items(scales, of_rows, layout.scales.bytes());
        let (of_rows, first_digit) = layout.zeros_of(&heads);
        let (zeros, first_zero) = match zeros {
            Some(zeros) => stored(zeros, of_rows),
            // Any view: it is not read.
            None => (scales, 0),
        };
        let [bits, flip] = layout.digits();
        let parameters = [
            count,
            layout.columns,
            bits,
            flip,
            first_code,
            row_bytes,
            word_bytes,
            layout.group_columns(),
            layout.scale_step(),
            scale_type(layout.scales),
            first_scale,
            zero_type,
            first_zero,
            first_digit,
            rows.start - heads.start,
            layout.head_rows,
        ]
        .map(word);
        let kernel = &kernels::DEQUANTIZE_INTEGERS;
        let views = [codes, scales, zeros, out.part(0..count).0];
        self.launch(
            kernel,
            groups_of(count, kernel.threads),
            &views,
            &parameters,
        )
    }
}
