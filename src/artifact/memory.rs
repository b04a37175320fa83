//! Tensors held in memory as storage: what a stage has computed, seen as a stored model.
//!
//! Enters: named tensors with their bytes. Leaves: rows as bytes. Knows no file.

use std::sync::Arc;

use nemoconv_formats::GgmlType;

use super::StoredTensor;
use crate::error::Fault;

/// A tensor with its bytes.
#[derive(Debug, Clone)]
pub struct MemoryTensor {
    /// GGUF name, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// Type of the bytes.
    pub ty: GgmlType,
    /// Matrices in the stack; 1 for everything but routed experts.
    pub matrices: usize,
    /// `out_features` of one matrix.
    pub rows: usize,
    /// `in_features`: the row length, whole blocks of `ty`.
    pub columns: usize,
    /// All rows of all matrices, one after the other.
    pub bytes: Arc<[u8]>,
}

impl MemoryTensor {
    /// A tensor of F32 values `[matrices, rows, columns]`.
    pub fn of_f32(
        name: impl Into<String>,
        [matrices, rows, columns]: [usize; 3],
        values: &[f32],
    ) -> Self {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self {
            name: name.into(),
            ty: GgmlType::F32,
            matrices,
            rows,
            columns,
            bytes: bytes.into(),
        }
    }

    fn stored(&self, place: usize) -> StoredTensor {
        StoredTensor {
            name: self.name.clone(),
            ty: self.ty,
            matrices: self.matrices,
            rows: self.rows,
            columns: self.columns,
            is_packed: false,
            place,
            offset: 0,
        }
    }

    /// Whether the bytes are those of the shape.
    fn check(&self) -> Result<(), Fault> {
        let elements = [self.matrices, self.rows, self.columns]
            .iter()
            .try_fold(1_u64, |product, size| product.checked_mul(*size as u64));
        let whole_rows = self.columns.is_multiple_of(self.ty.block_elements());
        let expected = elements.filter(|_| whole_rows);
        let expected = expected.and_then(|elements| self.ty.bytes_for(elements));
        if expected == Some(self.bytes.len() as u64) {
            return Ok(());
        }
        let shape = [self.matrices, self.rows, self.columns];
        let what = format!(
            "{} bytes are not {} of shape {shape:?}",
            self.bytes.len(),
            self.ty
        );
        Err(Fault::new(what).in_tensor(&self.name))
    }
}

/// Tensors in memory.
#[derive(Debug)]
pub struct MemoryStorage {
    tensors: Vec<MemoryTensor>,
}

impl MemoryStorage {
    pub fn new(tensors: Vec<MemoryTensor>) -> Result<Self, Fault> {
        for tensor in &tensors {
            tensor.check()?;
        }
        Ok(Self { tensors })
    }

    pub fn tensors(&self) -> Vec<StoredTensor> {
        let tensors = self.tensors.iter().enumerate();
        tensors
            .map(|(place, tensor)| tensor.stored(place))
            .collect()
    }

    pub fn rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        rows: usize,
    ) -> Option<&[u8]> {
        let begin = (matrix * tensor.rows + first_row) * tensor.row_bytes();
        let bytes = &self.tensors[tensor.place].bytes;
        bytes.get(begin..begin + rows * tensor.row_bytes())
    }
}
