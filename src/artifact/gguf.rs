//! GGUF files as storage: one file, or the parts of a split one.
//!
//! Enters: the path of the first part. Leaves: tensors with their places, rows as bytes. Knows no network.

use std::path::{Path, PathBuf};

use nemoconv_formats::Error as FormatError;
use nemoconv_formats::gguf::{Gguf, Metadata, TensorInfo, Value};

use super::StoredTensor;
use crate::error::Result;

/// Parts of a model, the first with the model's keys.
#[derive(Debug)]
pub struct GgufStorage {
    parts: Vec<Gguf>,
}

impl GgufStorage {
    pub fn open(path: &Path) -> Result<Self> {
        let parts = open_parts(path)?;
        Ok(Self { parts })
    }

    pub fn parts(&self) -> &[Gguf] {
        &self.parts
    }

    pub fn metadata(&self) -> &Metadata {
        &self.parts[0].header().metadata
    }

    pub fn tensors(&self) -> Vec<StoredTensor> {
        let mut tensors = Vec::new();
        for (place, part) in self.parts.iter().enumerate() {
            let data = part.header().data_offset;
            let infos = part.header().tensors.iter();
            tensors.extend(infos.map(|info| stored(info, place, data)));
        }
        tensors
    }

    pub fn mapped_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        rows: usize,
    ) -> Option<&[u8]> {
        let begin = usize::try_from(row_offset(tensor, matrix, first_row)).ok()?;
        let bytes = self.parts[tensor.place].file().bytes();
        bytes.get(begin..begin + rows * tensor.row_bytes())
    }

    pub fn read_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        bytes: &mut [u8],
    ) -> Result<()> {
        let file = self.parts[tensor.place].file();
        Ok(file.read_at(row_offset(tensor, matrix, first_row), bytes)?)
    }
}

pub fn row_offset(tensor: &StoredTensor, matrix: usize, row: usize) -> u64 {
    tensor.offset + ((matrix * tensor.rows + row) * tensor.row_bytes()) as u64
}

/// The header has checked that shape, type and size agree and lie in the file.
pub fn stored(info: &TensorInfo, place: usize, data_offset: u64) -> StoredTensor {
    let size = |index: usize| info.dims.get(index).copied().unwrap_or(1) as usize;
    let is_stack = info.dims.len() > 2;
    StoredTensor {
        name: info.name.clone(),
        ty: info.ty,
        matrices: if is_stack { size(2) * size(3) } else { 1 },
        rows: size(1),
        columns: size(0),
        is_packed: false,
        place,
        offset: data_offset + info.offset,
    }
}

/// Opens the first part and all others it names, checking that they belong together.
///
/// # Errors
/// A part that is missing, corrupt, of another split, or not the first.
pub fn open_parts(path: &Path) -> Result<Vec<Gguf>> {
    let first = Gguf::open(path)?;
    let count = split_number(&first.header().metadata, "split.count").unwrap_or(1);
    if count <= 1 {
        return Ok(vec![first]);
    }
    if split_number(&first.header().metadata, "split.no") != Some(0) {
        let error = FormatError::malformed("is not the first part of the split model");
        return Err(error
            .in_file(path)
            .hint("open the file that ends in -00001-of-")
            .into());
    }
    let mut parts = vec![first];
    for index in 1..count {
        let part_path = part_path(path, index, count)?;
        let part = Gguf::open(&part_path)?;
        let place = (
            split_number(&part.header().metadata, "split.no"),
            split_number(&part.header().metadata, "split.count"),
        );
        if place != (Some(index), Some(count)) {
            let what = format!("is not part {} of {count} by its split keys", index + 1);
            return Err(FormatError::malformed(what).in_file(part_path).into());
        }
        parts.push(part);
    }
    Ok(parts)
}

pub fn split_number(metadata: &Metadata, key: &str) -> Option<u64> {
    match metadata.get(key)? {
        Value::U16(number) => Some(u64::from(*number)),
        Value::U32(number) => Some(u64::from(*number)),
        Value::I32(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

/// `name-00001-of-00003.gguf` to the part of another index.
pub fn part_path(first: &Path, index: u64, count: u64) -> Result<PathBuf> {
    let name = first.file_name().and_then(|name| name.to_str());
    let suffix = format!("-00001-of-{count:05}.gguf");
    let stem = name
        .and_then(|name| name.strip_suffix(&suffix))
        .ok_or_else(|| {
            let what = format!("a model of {count} parts must be named *{suffix}");
            FormatError::malformed(what).in_file(first)
        })?;
    let part = format!("{stem}-{:05}-of-{count:05}.gguf", index + 1);
    Ok(first.with_file_name(part))
}
