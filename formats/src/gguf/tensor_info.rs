//! One tensor of a GGUF file: name, shape, type, place.

use crate::{
    Error, ErrorKind, GgmlType, Result,
    limits::{GGUF_MAX_DIMS, GGUF_MAX_TENSOR_NAME_BYTES},
};

/// A tensor as described in the header; its shape has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The name, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// The shape, fastest dimension first: `[in_features, out_features]` for a matrix. As many as stored, 0 to 4.
    pub dims: Vec<u64>,
    /// The stored type.
    pub ty: GgmlType,
    /// Bytes from the start of the data section.
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.dims
            .iter()
            .fold(1, |product, &dim| product.saturating_mul(dim))
    }

    /// Number of rows: every dimension but the first, multiplied.
    pub fn rows(&self) -> u64 {
        self.dims
            .iter()
            .skip(1)
            .fold(1, |product, &dim| product.saturating_mul(dim))
    }

    /// Bytes of the data, without padding.
    pub fn bytes(&self) -> u64 {
        self.ty.bytes_for(self.elements()).unwrap_or(u64::MAX)
    }
}

/// Checks a name against what ggml can hold.
pub(super) fn check_name(name: &str) -> Result<()> {
    if name.len() > GGUF_MAX_TENSOR_NAME_BYTES {
        return Err(Error::new(ErrorKind::Limit {
            what: "length of the tensor name in bytes",
            limit: GGUF_MAX_TENSOR_NAME_BYTES as u64,
            found: name.len() as u64,
        }));
    }
    if name.contains('\0') {
        return Err(Error::malformed("name contains a NUL"));
    }
    Ok(())
}

/// Bytes of a tensor of this shape, if ggml can hold it: at most 4 dimensions, elements countable in an i64, rows of
/// whole blocks.
pub(super) fn checked_bytes(dims: &[u64], ty: GgmlType) -> Result<u64> {
    if dims.len() > GGUF_MAX_DIMS {
        return Err(Error::new(ErrorKind::Limit {
            what: "number of dimensions",
            limit: GGUF_MAX_DIMS as u64,
            found: dims.len() as u64,
        }));
    }
    // Zeros count as ones, so that every partial product of an accepted shape is representable too.
    let countable = dims.iter().try_fold(1u64, |product, &dim| {
        product
            .checked_mul(dim.max(1))
            .filter(|&product| product <= i64::MAX as u64)
    });
    let row = dims.first().copied().unwrap_or(1);
    if countable.is_none() {
        return Err(Error::malformed(format!(
            "shape {dims:?} has more than 2^63 - 1 elements"
        )));
    }
    if !row.is_multiple_of(ty.block_elements() as u64) {
        return Err(Error::malformed(format!(
            "cannot be {ty}: row length must be a multiple of {}, found {row}",
            ty.block_elements()
        )));
    }
    ty.bytes_for(dims.iter().product()).ok_or_else(|| {
        Error::malformed(format!(
            "{ty} of shape {dims:?} has more than 2^64 - 1 bytes"
        ))
    })
}
