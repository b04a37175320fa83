//! Products of F32 on tensor cores: each operand in three parts of BF16, of whose products six are summed.

use std::ops::Range;

use super::stored::{PARTS, Packed, Packing, TILE};
use super::word;
use crate::array::{Array, Device};
use crate::driver::View;
use crate::error::{DeviceError, Result};
use crate::kernels;
use crate::ops::MatmulLayout;

/// Which products of F32 are those of parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splitting {
    /// None.
    Never,
    /// Large ones.
    WherePays,
    /// All that can be: for tests.
    Always,
}

/// Products with so many multiplications are split: an assumption, not a measurement, as for libraries.
const SPLIT_FROM: u64 = 1 << 27;
/// So often at least each value is multiplied that is split for it. On an H100 it takes 3 ps to be read and written in parts, and
/// 1000 products with it 18 ps less, at the peaks of memory and of both arithmetics: even at 170.
const SPLIT_USES: usize = 256;
/// The same where weights are there in BF16, and inputs alone are split: half a tile, for which half the peak is left.
const STORED_USES: usize = TILE / 2;

/// Rows and columns that a group of threads of `split_floats` takes.
const SPLIT_ROWS: usize = 32;
const SPLIT_COLUMNS: usize = 64;

impl Device {
    /// Whether the product of `rows` and `columns` of `inner` values is one of parts, both operands to be split for it.
    pub fn splits(&self, rows: usize, columns: usize, inner: usize) -> bool {
        self.pays([rows, columns, inner], rows.min(columns), SPLIT_USES)
    }

    /// The same of inputs alone, with weights that are stored in BF16.
    pub fn splits_inputs(&self, rows: usize, columns: usize, inner: usize) -> bool {
        self.pays([rows, columns, inner], rows.min(columns), STORED_USES)
    }

    fn pays(&self, sizes: [usize; 3], uses: usize, least: usize) -> bool {
        let multiplications = sizes.iter().map(|size| *size as u64);
        let multiplications = multiplications.fold(1, u64::saturating_mul);
        match self.splitting() {
            Splitting::Never => false,
            Splitting::WherePays => uses >= least && multiplications >= SPLIT_FROM,
            Splitting::Always => true,
        }
    }

    /// As `try_split`, where there is room.
    ///
    /// # Errors
    /// Out of memory, device lost; a row is more than a view may span.
    ///
    /// # Panics
    /// Rows are not there.
    pub(super) fn split(
        &self,
        values: &Array,
        at: [usize; 3],
        rows: usize,
        inner: usize,
    ) -> Result<Packed> {
        let packed = Packed::reserve(self, rows, inner, Packing::Parts)?;
        if rows == 0 || inner == 0 {
            return Ok(packed);
        }
        let end = at[0] + (rows - 1) * at[1] + (inner - 1) * at[2] + 1;
        assert!(end <= values.len(), "rows are missing");
        for part in self.parts_of_rows(0..rows, &[4 * at[1], packed.row_bytes()]) {
            self.split_rows(values, at, part.rows, &packed)?;
        }
        Ok(packed)
    }

    /// Some rows of them, which begin where a view of parts may.
    fn split_rows(
        &self,
        values: &Array,
        [first, row, column]: [usize; 3],
        rows: Range<usize>,
        packed: &Packed,
    ) -> Result<()> {
        let inner = packed.width();
        let begin = first + rows.start * row;
        let end = first + (rows.end - 1) * row + (inner - 1) * column + 1;
        let (view, first) = values.part(begin..end);
        let part_words = packed.row_bytes() / 4 / PARTS;
        let sizes = [rows.len(), inner, first as usize, row, column, part_words].map(word);
        let groups = rows.len().div_ceil(SPLIT_ROWS) * (2 * part_words).div_ceil(SPLIT_COLUMNS);
        let views = [view, packed.part(rows).0];
        self.launch(&kernels::SPLIT_FLOATS, word(groups), &views, &sizes)
    }

    /// `out = alpha X Y^T + beta out` for rows `rows` of X, both in parts: `out [rows, columns]`, with its first value and
    /// the step to its next row in `place`.
    ///
    /// # Errors
    /// Device lost; Y alone is larger than a view may be.
    ///
    /// # Panics
    /// The operands are not in parts or not of the same width, or the result does not fit `out`.
    pub fn matmul_split(
        &self,
        x: &Packed,
        rows: Range<usize>,
        y: &Packed,
        [alpha, beta]: [f32; 2],
        place: [usize; 2],
        out: &mut Array,
    ) -> Result<()> {
        assert!(
            [x, y]
                .iter()
                .all(|operand| operand.packing() == Packing::Parts)
        );
        assert!(x.width() == y.width());
        assert!(rows.end <= x.rows(), "rows are missing");
        if rows.is_empty() || y.rows() == 0 {
            return Ok(());
        }
        let end = place[0] + (rows.len() - 1) * place[1] + y.rows();
        assert!(
            y.rows() <= place[1].max(1) && end <= out.len(),
            "the result is too short"
        );
        let row_bytes = [x.row_bytes(), 4 * place[1]];
        for part in self.rows_of_views(rows.clone(), row_bytes) {
            let at = [place[0] + (part.start - rows.start) * place[1], place[1]];
            self.split_part(x, part, y, [alpha, beta], at, out)?;
        }
        Ok(())
    }

    fn split_part(
        &self,
        x: &Packed,
        rows: Range<usize>,
        y: &Packed,
        factors: [f32; 2],
        [first, row]: [usize; 2],
        out: &Array,
    ) -> Result<()> {
        let (x_view, x_first) = x.part(rows.clone());
        let (y_view, y_first) = y.part(0..y.rows());
        let (out, out_first) = out.part(first..first + (rows.len() - 1) * row + y.rows());
        let sizes = [rows.len(), y.rows(), x.width()].map(word);
        let firsts = [x_first, y_first, out_first, word(row)];
        let parameters = [&sizes[..], &firsts, &factors.map(f32::to_bits)].concat();
        let views: [View; 3] = [x_view, y_view, out];
        let groups = rows.len().div_ceil(TILE) * y.rows().div_ceil(TILE);
        self.launch(&kernels::MATMUL_SPLIT, word(groups), &views, &parameters)
    }

    /// Both operands of a product in parts; `None` where it is not to be computed so, or there is no room for them.
    pub(super) fn split_operands(
        &self,
        layout: &MatmulLayout,
        a: &Array,
        b: &Array,
    ) -> Result<Option<[Packed; 2]>> {
        let MatmulLayout {
            rows,
            columns,
            inner,
            ..
        } = *layout;
        if !self.splits(rows, columns, inner) {
            return Ok(None);
        }
        let [first, k, column] = layout.b;
        let Some(left) = self.try_split(a, layout.a, rows, inner)? else {
            return Ok(None);
        };
        let right = self.try_split(b, [first, column, k], columns, inner)?;
        Ok(right.map(|right| [left, right]))
    }

    /// `rows` rows of `inner` values in parts; `at`: their first value, and the steps to the next row and column. `None` where
    /// there is no room for the parts, or no view of the values or of them.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// Rows are not there.
    pub fn try_split(
        &self,
        values: &Array,
        at: [usize; 3],
        rows: usize,
        inner: usize,
    ) -> Result<Option<Packed>> {
        let spanned = 4 * (rows * at[1]).max(inner * at[2]);
        if spanned.max(rows * Packing::Parts.row_bytes(inner)) > self.least_view() {
            return Ok(None);
        }
        match self.split(values, at, rows, inner) {
            Err(DeviceError::OutOfMemory { .. }) => Ok(None),
            packed => packed.map(Some),
        }
    }
}
