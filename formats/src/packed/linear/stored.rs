//! A packed linear as bytes: codes, scales and zero points of all rows, for machines that decode them.
//!
//! Enters: a linear that was checked. Leaves: the bytes of its tensors where they lie in the checkpoint, scales and zero
//! points of GPTQ in another order. Decodes nothing.

use std::borrow::Cow;

use super::{PackedLinear, SecondScale};
use crate::checkpoint::Checkpoint;
use crate::packed::bits::{WORD_BYTES, Width, from_gptq_v1_zeros};
use crate::packed::layout::Role;
use crate::packed::scheme::{GptqZeros, Group, Layout};
use crate::{Dtype, Result};

/// Columns of GPTQ's tensors that are written as rows at a time: those of a cache line.
const COLUMNS_TOGETHER: usize = 16;

/// How integers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntegerCodes {
    /// `pack-quantized`: 32-bit words along a row; zero points are words along a column.
    Packed(Width),
    /// GPTQ: the same, but a word of every row comes before the next word of any.
    Transposed(Width),
    /// `int-quantized`: signed bytes; zero points are signed bytes too.
    Bytes,
}

/// The floats that weights are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatCodes {
    /// Bytes.
    E4M3,
    /// Two to a byte, the first in its low half.
    E2M1,
}

/// A packed linear where it lies in a checkpoint, all rows.
#[derive(Debug, Clone)]
pub enum StoredLinear<'a> {
    /// `(code - zero) * scale`.
    Integers(StoredIntegers<'a>),
    /// `code * scale`, times or through a second scale.
    Floats(StoredFloats<'a>),
}

/// Integers as compressed-tensors lays them out, but for the codes of GPTQ. Its scales and zero points are copies: they have
/// the other order of rows and columns, bit for bit.
#[derive(Debug, Clone)]
pub struct StoredIntegers<'a> {
    /// How codes are stored.
    pub storage: IntegerCodes,
    /// What shares a scale.
    pub group: Group,
    /// Codes.
    pub codes: &'a [u8],
    /// Scales.
    pub scales: Cow<'a, [u8]>,
    /// Their type.
    pub scale_dtype: Dtype,
    /// Zero points, where the weights have some.
    pub zeros: Option<Cow<'a, [u8]>>,
}

/// FP8 and NVFP4.
#[derive(Debug, Clone)]
pub struct StoredFloats<'a> {
    /// How codes are stored.
    pub storage: FloatCodes,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
    /// Codes.
    pub codes: &'a [u8],
    /// Scales, `[ceil(rows / block), ceil(columns / block)]`.
    pub scales: &'a [u8],
    /// Their type.
    pub scale_dtype: Dtype,
    /// The scale above all scales.
    pub second_scale: SecondScale,
}

impl StoredLinear<'_> {
    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        let parts = match self {
            Self::Integers(stored) => {
                let zeros = stored.zeros.as_deref().map_or(0, <[u8]>::len);
                [stored.codes.len(), stored.scales.len(), zeros]
            }
            Self::Floats(stored) => [stored.codes.len(), stored.scales.len(), 0],
        };
        parts.into_iter().fold(0, usize::saturating_add)
    }
}

impl PackedLinear {
    /// The bytes of codes with their scales.
    ///
    /// # Errors
    /// The linear is of another checkpoint.
    pub fn stored<'a>(&self, checkpoint: &'a Checkpoint) -> Result<StoredLinear<'a>> {
        match self.scheme.layout {
            Layout::PackQuantized { width, group, .. } => {
                self.stored_integers(checkpoint, IntegerCodes::Packed(width), group)
            }
            Layout::IntQuantized { group, .. } => {
                self.stored_integers(checkpoint, IntegerCodes::Bytes, group)
            }
            Layout::Float8 { .. } => self.stored_floats(checkpoint, FloatCodes::E4M3),
            Layout::Nvfp4(_) => self.stored_floats(checkpoint, FloatCodes::E2M1),
            Layout::Gptq {
                width,
                group,
                zeros,
                ..
            } => self.stored_gptq(checkpoint, width, group, zeros),
        }
    }

    fn stored_integers<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        storage: IntegerCodes,
        group: Group,
    ) -> Result<StoredLinear<'a>> {
        let scales = self.entry(checkpoint, Role::Scale)?;
        let zeros = self.position(Role::ZeroPoint);
        Ok(StoredLinear::Integers(StoredIntegers {
            storage,
            group,
            codes: checkpoint.bytes(self.entry(checkpoint, Role::Codes)?),
            scales: checkpoint.bytes(scales).into(),
            scale_dtype: scales.dtype,
            zeros: match zeros {
                Some(_) => {
                    let zeros = self.entry(checkpoint, Role::ZeroPoint)?;
                    Some(checkpoint.bytes(zeros).into())
                }
                None => None,
            },
        }))
    }

    /// GPTQ packs as `pack-quantized` does, codes along `in_features` and zero points along `out_features`, but stores words
    /// of the other dimension one after the other. What is small is brought to the order of rows.
    fn stored_gptq<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        width: Width,
        group: Group,
        how: GptqZeros,
    ) -> Result<StoredLinear<'a>> {
        let part = |role| self.entry(checkpoint, role);
        let (codes, scales) = (part(Role::Codes)?, part(Role::Scale)?);
        let zeros = checkpoint.bytes(part(Role::ZeroPoint)?);
        let mut zeros = transposed(zeros, WORD_BYTES, width.words(self.rows));
        if how == GptqZeros::MinusOne {
            from_gptq_v1_zeros(width, &mut zeros);
        }
        let of_rows = transposed(checkpoint.bytes(scales), scales.dtype.bytes(), self.rows);
        Ok(StoredLinear::Integers(StoredIntegers {
            storage: IntegerCodes::Transposed(width),
            group,
            codes: checkpoint.bytes(codes),
            scales: of_rows.into(),
            scale_dtype: scales.dtype,
            zeros: Some(zeros.into()),
        }))
    }

    fn stored_floats<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        storage: FloatCodes,
    ) -> Result<StoredLinear<'a>> {
        let scales = self.entry(checkpoint, Role::Scale)?;
        Ok(StoredLinear::Floats(StoredFloats {
            storage,
            block: [self.grid.block_rows, self.grid.block_columns],
            codes: checkpoint.bytes(self.entry(checkpoint, Role::Codes)?),
            scales: checkpoint.bytes(scales),
            scale_dtype: scales.dtype,
            second_scale: self.second_scale(checkpoint)?,
        }))
    }
}

/// Elements `[rows, columns]` of so many bytes as `[columns, rows]`.
fn transposed(bytes: &[u8], element_bytes: usize, columns: usize) -> Vec<u8> {
    match element_bytes {
        2 => transposed_elements::<2>(bytes, columns),
        _ => transposed_elements::<WORD_BYTES>(bytes, columns),
    }
}

fn transposed_elements<const BYTES: usize>(bytes: &[u8], columns: usize) -> Vec<u8> {
    let (elements, _) = bytes.as_chunks::<BYTES>();
    let columns = columns.max(1);
    let rows = elements
        .len()
        .checked_div(columns)
        .unwrap_or_default()
        .max(1);
    let mut out = vec![0; bytes.len()];
    let (places, _) = out.as_chunks_mut::<BYTES>();
    let parts = places.chunks_mut(rows.saturating_mul(COLUMNS_TOGETHER));
    for (index, part) in parts.enumerate() {
        let first = index.saturating_mul(COLUMNS_TOGETHER);
        for (row, elements) in elements.chunks(columns).enumerate() {
            let to = part.iter_mut().skip(row).step_by(rows);
            let from = elements.iter().skip(first);
            to.zip(from).for_each(|(to, from)| *to = *from);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        let (rows, columns) = (3, 37);
        let element = |row: usize, column: usize| (row * columns + column) as u16;
        let of_rows = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        let of_columns = (0..columns).flat_map(|column| (0..rows).map(move |row| (row, column)));
        let halves = |places: Vec<(usize, usize)>| -> Vec<u8> {
            let values = places.into_iter().map(|(row, column)| element(row, column));
            values.flat_map(u16::to_le_bytes).collect()
        };
        let (bytes, expected) = (halves(of_rows.collect()), halves(of_columns.collect()));
        assert_eq!(transposed(&bytes, 2, columns), expected);
        let words = |bytes: &[u8]| -> Vec<u8> {
            let halves = bytes.as_chunks::<2>().0.iter();
            halves.flat_map(|[low, high]| [*low, *high, 7, 9]).collect()
        };
        assert_eq!(transposed(&words(&bytes), 4, columns), words(&expected));
        assert!(transposed(&[], 4, 0).is_empty());
    }
}
