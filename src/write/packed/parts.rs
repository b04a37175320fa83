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
    /// The bytes of a part and their offset in its tensor. Parts that are the same for all rows come with the first.
    ///
    /// # Errors
    /// The rows are not whole words (see [`rows_together`]).
    pub fn part(&self, role: Role) -> Result<(u64, Vec<u8>)> {
        let first = self.first as u64;
        let groups = self.grid.groups(self.columns);
        Ok(match (role, self.layout) {
            (Role::Codes, Layout::Gptq { width, .. }) => {
                let codes = self.codes();
                let mut words = vec![0; codes.len() * width.bits() / 8];
                bits::pack_transposed(*width, self.columns, &codes, &mut words)?;
                (0, words)
            }
            (Role::Codes, Layout::PackQuantized { width, .. }) => {
                let row_bytes = width.words(self.columns) * bits::WORD_BYTES;
                let mut words = vec![0; self.count() * row_bytes];
                bits::pack_rows(*width, self.columns, &self.codes(), &mut words)?;
                (first * row_bytes as u64, words)
            }
            (Role::Codes, _) => (
                first * self.columns as u64,
                bytemuck::cast_slice(&self.codes()).to_vec(),
            ),
            (Role::Scale, Layout::Gptq { .. }) => (0, self.scales_by_group(groups)),
            (Role::Scale, _) => {
                let scales = self
                    .each()
                    .flat_map(|row| row.scales.as_flattened().to_vec());
                (first * 2 * groups as u64, scales.collect())
            }
            (Role::ZeroPoint, Layout::Gptq { width, .. }) => {
                let zeros = vec![0; groups * self.all_rows];
                let mut words = vec![0; groups * width.words(self.all_rows) * bits::WORD_BYTES];
                bits::pack_rows(*width, self.all_rows, &zeros, &mut words)?;
                bits::to_gptq_v1_zeros(*width, &mut words);
                (0, words)
            }
            (Role::ZeroPoint, Layout::PackQuantized { width, .. }) => {
                let zeros: Vec<i8> = self.each().flat_map(|row| row.zeros.to_vec()).collect();
                let words_per_column = width.words(self.count());
                let mut words = vec![0; words_per_column * groups * bits::WORD_BYTES];
                bits::pack_columns(*width, groups, &zeros, &mut words)?;
                let before = self.first / width.per_word() * groups * bits::WORD_BYTES;
                (before as u64, words)
            }
            (Role::ZeroPoint, _) => {
                let zeros: Vec<i8> = self.each().flat_map(|row| row.zeros.to_vec()).collect();
                (first * groups as u64, bytemuck::cast_slice(&zeros).to_vec())
            }
            (Role::Shape, _) => {
                let shape = [self.all_rows, self.columns].map(|size| (size as i64).to_le_bytes());
                (0, shape.as_flattened().to_vec())
            }
            (Role::GroupIndex, _) => {
                let size = self.grid.group_columns(self.columns);
                let groups = (0..self.columns).map(|column| ((column / size) as i32).to_le_bytes());
                (0, groups.flatten().collect())
            }
            (Role::SecondScale | Role::InputScale | Role::InputZeroPoint, _) => (0, Vec::new()),
        })
    }

    fn count(&self) -> usize {
        self.rows.len() / self.grid.row_bytes(self.columns)
    }

    fn each(&self) -> impl Iterator<Item = IntegerRow<'_>> {
        let rows = self.rows.chunks_exact(self.grid.row_bytes(self.columns));
        rows.map(|row| self.grid.split(self.columns, row))
    }

    fn codes(&self) -> Vec<i8> {
        let mut codes = Vec::with_capacity(self.count() * self.columns);
        self.each()
            .for_each(|row| codes.extend_from_slice(row.codes));
        codes
    }

    /// `[groups, rows]`.
    fn scales_by_group(&self, groups: usize) -> Vec<u8> {
        let of_group = |group: usize| self.each().flat_map(move |row| row.scales[group]);
        (0..groups).flat_map(of_group).collect()
    }
}
