//! GGUF containers: metadata, tensor infos, offsets.
//!
//! Enters: files nobody has checked, or keys and shapes to be written. Leaves: checked headers and views of tensor
//! data, or a layout to stream into. Knows no key's meaning but the alignment's.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        reason = "the bytes read here are untrusted"
    )
)]

mod header;
mod layout;
mod metadata;
mod tensor_info;

pub use header::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, Header, MAGIC, VERSION};
pub use layout::{Layout, NewTensor};
pub use metadata::{Array, Metadata, Value};
pub use tensor_info::TensorInfo;

use crate::{MappedFile, Result};
use std::{ops::Range, path::Path};

/// A GGUF file, mapped and checked.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    header: Header,
}

impl Gguf {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// As [`MappedFile::open`] and [`Header::parse`], with the path.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let header = Header::parse(file.bytes()).map_err(|e| e.in_file(path))?;
        Ok(Self { file, header })
    }

    /// The file.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    /// Metadata and tensor infos.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The data of `tensor`, in its stored type, without padding. Empty for an info that is not of this file and
    /// reaches past its end.
    pub fn tensor_bytes(&self, tensor: &TensorInfo) -> &[u8] {
        self.tensor_range(tensor)
            .and_then(|range| self.file.bytes().get(range))
            .unwrap_or_default()
    }

    fn tensor_range(&self, tensor: &TensorInfo) -> Option<Range<usize>> {
        let start = self.header.data_offset.checked_add(tensor.offset)?;
        let end = start.checked_add(tensor.bytes())?;
        Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }
}
