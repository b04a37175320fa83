//! Some rows of a packed linear, each of its tensors as its layout has it.
//!
//! Enters: a linear that was checked, rows. Leaves: signed codes, scales and zero points in the order of the rows.

use super::{Grid, PackedLinear, RowBuffers};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::packed::bits::{
    WORD_BYTES, Width, from_gptq_v1_zeros, unpack_columns, unpack_rows, unpack_transposed,
};
use crate::packed::layout::Role;
use crate::packed::scheme::{GptqZeros, Layout};
use crate::{Error, Result, float};

/// Some rows of a linear.
pub(super) struct Reader<'a> {
    pub(super) linear: &'a PackedLinear,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

impl Reader<'_> {
    pub(super) fn codes(&self, buffers: &mut RowBuffers) -> Result<()> {
        let columns = self.linear.columns;
        let entry = self.linear.entry(self.checkpoint, Role::Codes)?;
        let codes = &mut buffers.codes;
        codes.resize(self.rows.saturating_mul(columns), 0);
        match self.linear.scheme.layout {
            Layout::PackQuantized { width, .. } => {
                let row_bytes = width.words(columns).saturating_mul(WORD_BYTES);
                self.read(
                    entry,
                    row_bytes,
                    self.first_row,
                    self.rows,
                    &mut buffers.bytes,
                )?;
                unpack_rows(width, columns, &buffers.bytes, codes)
            }
            Layout::IntQuantized { .. } | Layout::Float8 { .. } => {
                self.read(
                    entry,
                    columns,
                    self.first_row,
                    self.rows,
                    &mut buffers.bytes,
                )?;
                let bytes = buffers.bytes.iter();
                codes
                    .iter_mut()
                    .zip(bytes)
                    .for_each(|(code, byte)| *code = byte.cast_signed());
                Ok(())
            }
            Layout::Nvfp4(_) => {
                let row_bytes = columns.div_ceil(2);
                self.read(
                    entry,
                    row_bytes,
                    self.first_row,
                    self.rows,
                    &mut buffers.bytes,
                )?;
                for (codes, byte) in codes.chunks_mut(2).zip(&buffers.bytes) {
                    let nibbles = [byte & 15, byte.wrapping_shr(4)];
                    codes
                        .iter_mut()
                        .zip(nibbles)
                        .for_each(|(code, nibble)| *code = nibble.cast_signed());
                }
                Ok(())
            }
            Layout::Gptq { width, .. } => {
                let (first, count) = (self.first_row, self.rows);
                self.read_columns(entry, WORD_BYTES, first, count, &mut buffers.bytes)?;
                unpack_transposed(width, columns, &buffers.bytes, codes)
            }
        }
    }

    pub(super) fn scales(&self, buffers: &mut RowBuffers) -> Result<()> {
        let Grid {
            columns,
            block_rows,
            ..
        } = self.linear.grid;
        let entry = self.linear.entry(self.checkpoint, Role::Scale)?;
        let size = entry.dtype.bytes();
        let RowBuffers { scales, wide, .. } = buffers;
        let mut bytes = Vec::new();
        if let Layout::Gptq { .. } = self.linear.scheme.layout {
            self.read_columns(entry, size, self.first_row, self.rows, &mut bytes)?;
            wide.resize(columns.saturating_mul(self.rows), 0.0);
            float::to_f32(entry.dtype, &bytes, wide)?;
            transpose(wide, self.rows, scales);
            return Ok(());
        }
        let (first, count) = self.blocks(block_rows);
        self.read(
            entry,
            columns.saturating_mul(size),
            first,
            count,
            &mut bytes,
        )?;
        wide.resize(columns.saturating_mul(count), 0.0);
        float::to_f32(entry.dtype, &bytes, wide)?;
        self.spread(wide, first, block_rows, scales);
        Ok(())
    }

    pub(super) fn zeros(&self, buffers: &mut RowBuffers) -> Result<()> {
        let Grid {
            columns,
            block_rows,
            ..
        } = self.linear.grid;
        let RowBuffers {
            zeros,
            wide,
            narrow,
            ..
        } = buffers;
        zeros.clear();
        if self.linear.position(Role::ZeroPoint).is_none() {
            return Ok(());
        }
        let entry = self.linear.entry(self.checkpoint, Role::ZeroPoint)?;
        let mut bytes = Vec::new();
        match self.linear.scheme.layout {
            Layout::PackQuantized { width, .. } => {
                let (first, count, skip) = self.words(width);
                let row_bytes = columns.saturating_mul(WORD_BYTES);
                self.read(entry, row_bytes, first, count, &mut bytes)?;
                let rows = count.saturating_mul(width.per_word());
                narrow.resize(rows.saturating_mul(columns), 0);
                unpack_columns(width, columns, &bytes, narrow)?;
                let of_rows = narrow.iter().skip(skip.saturating_mul(columns));
                let count = self.rows.saturating_mul(columns);
                zeros.extend(of_rows.take(count).map(|zero| f32::from(*zero)));
            }
            Layout::Gptq {
                width, zeros: how, ..
            } => {
                let (first, count, skip) = self.words(width);
                self.read_columns(entry, WORD_BYTES, first, count, &mut bytes)?;
                if how == GptqZeros::MinusOne {
                    from_gptq_v1_zeros(width, &mut bytes);
                }
                let in_words = count.saturating_mul(width.per_word());
                narrow.resize(in_words.saturating_mul(columns), 0);
                unpack_rows(width, in_words, &bytes, narrow)?;
                wide.clear();
                for group in narrow.chunks(in_words.max(1)) {
                    let of_rows = group.iter().skip(skip).take(self.rows);
                    wide.extend(of_rows.map(|zero| f32::from(*zero)));
                }
                transpose(wide, self.rows, zeros);
            }
            _ => {
                let (first, count) = self.blocks(block_rows);
                self.read(entry, columns, first, count, &mut bytes)?;
                wide.clear();
                wide.extend(bytes.iter().map(|byte| f32::from(byte.cast_signed())));
                self.spread(wide, first, block_rows, zeros);
            }
        }
        Ok(())
    }

    /// First row of scales and their number.
    fn blocks(&self, block_rows: usize) -> (usize, usize) {
        let first = self.first_row.checked_div(block_rows).unwrap_or_default();
        let end = self
            .first_row
            .saturating_add(self.rows)
            .div_ceil(block_rows.max(1));
        (first, end.saturating_sub(first))
    }

    /// First word that holds something of these rows, the number of words, and what to skip in the first.
    fn words(&self, width: Width) -> (usize, usize, usize) {
        let (first, count) = self.blocks(width.per_word());
        let start = first.saturating_mul(width.per_word());
        (first, count, self.first_row.saturating_sub(start))
    }

    /// Gives each weight row its row of scales.
    fn spread(&self, of_blocks: &[f32], first: usize, block_rows: usize, out: &mut Vec<f32>) {
        let columns = self.linear.grid.columns;
        out.clear();
        for row in 0..self.rows {
            let block = self.first_row.saturating_add(row).checked_div(block_rows);
            let start = block
                .unwrap_or_default()
                .saturating_sub(first)
                .saturating_mul(columns);
            let of_row = of_blocks.get(start..).unwrap_or_default();
            out.extend(of_row.iter().take(columns));
        }
    }

    /// Reads `count` rows of a tensor from row `first` on.
    fn read(
        &self,
        entry: &TensorEntry,
        row_bytes: usize,
        first: usize,
        count: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        bytes.resize(count.saturating_mul(row_bytes), 0);
        self.checkpoint
            .read_at(entry, first.saturating_mul(row_bytes), bytes)
    }

    /// Reads `count` columns of a matrix from column `first` on, row by row.
    fn read_columns(
        &self,
        entry: &TensorEntry,
        element_bytes: usize,
        first: usize,
        count: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let &[rows, columns] = entry.shape.as_slice() else {
            return Err(Error::malformed("is no matrix").in_tensor(&entry.name));
        };
        let part = count.saturating_mul(element_bytes);
        bytes.resize(rows.saturating_mul(part), 0);
        for (row, bytes) in bytes.chunks_mut(part.max(1)).enumerate() {
            let start = row.saturating_mul(columns).saturating_add(first);
            let start = start.saturating_mul(element_bytes);
            self.checkpoint.read_at(entry, start, bytes)?;
        }
        Ok(())
    }
}

/// `[groups, rows]` to `[rows, groups]`.
fn transpose(from: &[f32], rows: usize, to: &mut Vec<f32>) {
    to.clear();
    for row in 0..rows {
        to.extend(from.iter().skip(row).step_by(rows.max(1)));
    }
}
