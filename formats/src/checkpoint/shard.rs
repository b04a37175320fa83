//! One safetensors file.
//!
//! Enters: bytes nobody has checked. Leaves: its tensors in data order, which together fill the file exactly. As strict
//! as the `safetensors` crate, and beyond it: no name may be there twice.

use super::{
    TensorEntry,
    config_json::{describe, offset_of},
    index_json::Entries,
};
use crate::{Dtype, Error, ErrorKind, MappedFile, Result, limits::SAFETENSORS_MAX_HEADER_BYTES};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::{borrow::Cow, collections::HashSet, path::Path};

/// Bytes of the header length that a file begins with.
const LENGTH_BYTES: u64 = 8;

/// The key of the header that is not a tensor.
const METADATA_KEY: &str = "__metadata__";

/// A safetensors file, mapped.
#[derive(Debug)]
pub struct Shard {
    file: MappedFile,
}

impl Shard {
    /// Maps the file and reads its tensors; `shard` is the number they carry.
    pub(super) fn open(path: &Path, shard: usize) -> Result<(Self, Vec<TensorEntry>)> {
        let file = MappedFile::open(path)?;
        let mut tensors = parse_header(file.bytes()).map_err(|e| e.in_file(path))?;
        for tensor in &mut tensors {
            tensor.shard = shard;
        }
        Ok((Self { file }, tensors))
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    pub(super) fn file(&self) -> &MappedFile {
        &self.file
    }
}

/// A tensor as the header spells it.
#[derive(Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The tensors of the safetensors file whose bytes are `bytes`, in data order, with `shard` 0.
///
/// Memory grows with the header's bytes, never with a count it claims.
///
/// # Errors
/// Anything that contradicts the format, with the offset and the tensor at fault; an element type that is not known.
pub fn parse_header(bytes: &[u8]) -> Result<Vec<TensorEntry>> {
    let (text, data_start) = header_text(bytes)?;
    let Entries(entries) = serde_json::from_str::<Entries<&RawValue>>(text).map_err(|error| {
        let at = LENGTH_BYTES.saturating_add(offset_of(text, &error) as u64);
        Error::malformed(format!("header is not JSON: {}", describe(&error))).at(at)
    })?;
    let file_bytes = bytes.len() as u64;
    let mut seen = HashSet::new();
    let mut tensors = Vec::new();
    for (name, raw) in &entries {
        let name_it = |e: Error| e.in_tensor(name).at(offset_in(text, raw.get()));
        if !seen.insert(name.as_str()) {
            return Err(name_it(Error::malformed("header names it twice")));
        }
        match name.as_str() {
            METADATA_KEY => check_metadata(raw).map_err(name_it)?,
            _ => tensors.push(tensor(name, raw, data_start, file_bytes).map_err(name_it)?),
        }
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    check_coverage(&tensors, data_start, file_bytes)?;
    Ok(tensors)
}

/// The header's JSON and where the data begins.
fn header_text(bytes: &[u8]) -> Result<(&str, u64)> {
    let truncated = |expected: u64| Error::new(ErrorKind::Truncated { expected, found: bytes.len() as u64 });
    let length = bytes.first_chunk().ok_or_else(|| truncated(LENGTH_BYTES))?;
    let length = u64::from_le_bytes(*length);
    if length > SAFETENSORS_MAX_HEADER_BYTES {
        let limit = SAFETENSORS_MAX_HEADER_BYTES;
        return Err(Error::new(ErrorKind::Limit { what: "header length", limit, found: length }).at(0));
    }
    let data_start = length.saturating_add(LENGTH_BYTES);
    let header = usize::try_from(data_start)
        .ok()
        .and_then(|end| bytes.get(LENGTH_BYTES as usize..end))
        .ok_or_else(|| truncated(data_start).at(0))?;
    let text = std::str::from_utf8(header).map_err(|e| {
        Error::malformed("header is not UTF-8").at(LENGTH_BYTES.saturating_add(e.valid_up_to() as u64))
    })?;
    match text.starts_with('{') {
        true => Ok((text, data_start)),
        false => Err(Error::malformed("header must begin with `{`").at(LENGTH_BYTES)),
    }
}

/// Offset in the file of `part`, a slice of the header.
fn offset_in(header: &str, part: &str) -> u64 {
    let distance = (part.as_ptr() as usize).saturating_sub(header.as_ptr() as usize);
    LENGTH_BYTES.saturating_add(distance as u64)
}

/// The format wants a map of strings to strings.
fn check_metadata(raw: &RawValue) -> Result<()> {
    match serde_json::from_str::<Option<Entries<Cow<str>>>>(raw.get()) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::malformed(describe(&error))),
    }
}

fn tensor(name: &str, raw: &RawValue, data_start: u64, file_bytes: u64) -> Result<TensorEntry> {
    let raw: RawTensor = serde_json::from_str(raw.get()).map_err(|error| Error::malformed(describe(&error)))?;
    let dtype = Dtype::from_name(&raw.dtype)
        .ok_or_else(|| Error::unsupported(format!("dtype `{}` is not supported", raw.dtype)))?;
    let (begin, end) = raw.data_offsets;
    let bytes = end
        .checked_sub(begin)
        .ok_or_else(|| Error::malformed(format!("data ends at {end:#x} before it begins at {begin:#x}")))?;
    let shape_bytes = raw
        .shape
        .iter()
        .try_fold(dtype.bytes() as u64, |product, &dim| product.checked_mul(dim as u64))
        .ok_or_else(|| Error::malformed(format!("shape {:?} has more than 2^64 - 1 bytes", raw.shape)))?;
    if shape_bytes != bytes {
        let shape = &raw.shape;
        return Err(Error::malformed(format!("{dtype} of shape {shape:?} takes {shape_bytes} bytes, found {bytes}")));
    }
    let file_end = data_start.saturating_add(end);
    if file_end > file_bytes {
        return Err(Error::new(ErrorKind::Truncated { expected: file_end, found: file_bytes })
            .hint("the download may be incomplete: fetch the file again"));
    }
    let offset = data_start.saturating_add(begin);
    Ok(TensorEntry { name: name.to_owned(), dtype, shape: raw.shape, shard: 0, offset, bytes })
}

/// Tensors in data order must follow each other without a gap, up to the end of the file.
fn check_coverage(tensors: &[TensorEntry], data_start: u64, file_bytes: u64) -> Result<()> {
    let mut end = data_start;
    let mut before = None;
    for tensor in tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end { "overlaps" } else { "leaves a gap after" };
            let whom = before.map_or("the header".to_owned(), |name| format!("`{name}`"));
            return Err(Error::malformed(format!("data {what} {whom}")).in_tensor(&tensor.name).at(tensor.offset));
        }
        end = end.saturating_add(tensor.bytes);
        before = Some(tensor.name.as_str());
    }
    match file_bytes.checked_sub(end) {
        Some(0) => Ok(()),
        surplus => {
            let surplus = surplus.unwrap_or_default();
            Err(Error::malformed(format!("{surplus} bytes belong to no tensor")).at(end))
        }
    }
}
