//! Integer rows as the tensors of a layout.
//!
//! Enters: consecutive integer rows of one linear. Leaves: for each part of its layout the bytes and where they go.

use nemoconv_formats::packed::{Layout, Role, bits};

use crate::error::Result;
use crate::quantize::integer::{IntegerGrid, IntegerRow};

/// Consecutive rows of a linear.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// How they are stored.
    pub layout: &'a Layout,
    /// Their grid.
    pub grid: &'a IntegerGrid,
    /// `out_features` of the linear.
    pub all_rows: usize,
    /// `in_features`.
    pub columns: usize,
    /// The first row.
    pub first: usize,
    /// Integer rows, one after the other.
    pub rows: &'a [u8],
}

/// Rows that must be together: whole words of zero points, or all of a layout that packs along `in_features`.
pub fn rows_together(layout: &Layout, all_rows: usize) -> usize {
    match layout {
        Layout::Gptq { .. } => all_rows.max(1),
        Layout::PackQuantized { width, .. } => width.per_word(),
        _ => 1,
    }
}

impl Rows<'_> {
    /// Puts the bytes of a part into `out` and gives their offset in its tensor. Parts that are the same for all rows come
    /// with the first.
    ///
    /// # Errors
    /// The rows are not whole words (see [`rows_together`]).
    pub fn part(&self, role: Role, out: &mut Vec<u8>) -> Result<u64> {
        let first = self.first as u64;
        let groups = self.grid.groups(self.columns);
        out.clear();
        Ok(match (role, self.layout) {
            (Role::Codes, Layout::Gptq { width, .. }) => {
                let rows: Vec<_> = self.each().map(|row| row.codes).collect();
                out.resize(width.words(self.columns) * rows.len() * bits::WORD_BYTES, 0);
                bits::pack_transposed(*width, self.columns, &rows, out)?;
                0
            }
            (Role::Codes, Layout::PackQuantized { width, .. }) => {
                let row_bytes = width.words(self.columns) * bits::WORD_BYTES;
                out.resize(self.count() * row_bytes, 0);
                for (row, words) in self.each().zip(out.chunks_exact_mut(row_bytes)) {
                    bits::pack_rows(*width, self.columns, row.codes, words)?;
                }
                first * row_bytes as u64
            }
            (Role::Codes, _) => {
                self.each()
                    .for_each(|row| out.extend_from_slice(bytemuck::cast_slice(row.codes)));
                first * self.columns as u64
            }
            (Role::Scale, Layout::Gptq { .. }) => {
                let of_group = |group: usize| self.each().flat_map(move |row| row.scales[group]);
                out.extend((0..groups).flat_map(of_group));
                0
            }
            (Role::Scale, _) => {
                self.each()
                    .for_each(|row| out.extend_from_slice(row.scales.as_flattened()));
                first * 2 * groups as u64
            }
            (Role::ZeroPoint, Layout::Gptq { width, .. }) => {
                let zeros = vec![0; groups * self.all_rows];
                out.resize(groups * width.words(self.all_rows) * bits::WORD_BYTES, 0);
                bits::pack_rows(*width, self.all_rows, &zeros, out)?;
                bits::to_gptq_v1_zeros(*width, out);
                0
            }
            (Role::ZeroPoint, Layout::PackQuantized { width, .. }) => {
                let zeros: Vec<i8> = self.each().flat_map(|row| row.zeros).copied().collect();
                let words_per_column = width.words(self.count());
                out.resize(words_per_column * groups * bits::WORD_BYTES, 0);
                bits::pack_columns(*width, groups, &zeros, out)?;
                (self.first / width.per_word() * groups * bits::WORD_BYTES) as u64
            }
            (Role::ZeroPoint, _) => {
                self.each()
                    .for_each(|row| out.extend_from_slice(bytemuck::cast_slice(row.zeros)));
                first * groups as u64
            }
            (Role::Shape, _) => {
                let shape = [self.all_rows, self.columns].map(|size| (size as i64).to_le_bytes());
                out.extend_from_slice(shape.as_flattened());
                0
            }
            (Role::GroupIndex, _) => {
                let size = self.grid.group_columns(self.columns);
                let groups = (0..self.columns).map(|column| ((column / size) as i32).to_le_bytes());
                out.extend(groups.flatten());
                0
            }
            (Role::SecondScale | Role::InputScale | Role::InputZeroPoint, _) => 0,
        })
    }

    fn count(&self) -> usize {
        self.rows.len() / self.grid.row_bytes(self.columns)
    }

    fn each(&self) -> impl Iterator<Item = IntegerRow<'_>> {
        let rows = self.rows.chunks_exact(self.grid.row_bytes(self.columns));
        rows.map(|row| self.grid.split(self.columns, row))
    }
}
