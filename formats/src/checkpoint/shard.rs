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
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    path::Path,
};

/// Bytes of the header length that a file begins with.
const LENGTH_BYTES: u64 = 8;

/// The key of the header that is not a tensor.
const METADATA_KEY: &str = "__metadata__";

/// A safetensors file, mapped.
#[derive(Debug)]
pub struct Shard {
    file: MappedFile,
    metadata: BTreeMap<String, String>,
}

impl Shard {
    /// Maps the file and reads its tensors; `shard` is the number they carry.
    pub(super) fn open(path: &Path, shard: usize) -> Result<(Self, Vec<TensorEntry>)> {
        let file = MappedFile::open(path)?;
        let (mut tensors, metadata) = parse(file.bytes()).map_err(|e| e.in_file(path))?;
        for tensor in &mut tensors {
            tensor.shard = shard;
        }
        Ok((Self { file, metadata }, tensors))
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    /// The texts of `__metadata__`; of repeated keys the last.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
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
    Ok(parse(bytes)?.0)
}

/// Tensors in data order, and metadata.
fn parse(bytes: &[u8]) -> Result<(Vec<TensorEntry>, BTreeMap<String, String>)> {
    let (text, data_start) = header_text(bytes)?;
    let Entries(entries) = serde_json::from_str::<Entries<&RawValue>>(text).map_err(|error| {
        let at = LENGTH_BYTES.saturating_add(offset_of(text, &error) as u64);
        Error::malformed(format!("header is not JSON: {}", describe(&error))).at(at)
    })?;
    let file_bytes = bytes.len() as u64;
    let mut seen = HashSet::new();
    let mut tensors = Vec::new();
    let mut metadata = BTreeMap::new();
    for (name, raw) in &entries {
        let name_it = |e: Error| e.in_tensor(name).at(offset_in(text, raw.get()));
        if !seen.insert(name.as_str()) {
            return Err(name_it(Error::malformed("header names it twice")));
        }
        match name.as_str() {
            METADATA_KEY => metadata = texts(raw).map_err(name_it)?,
            _ => tensors.push(tensor(name, raw, data_start, file_bytes).map_err(name_it)?),
        }
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    check_coverage(&tensors, data_start, file_bytes)?;
    Ok((tensors, metadata))
}

/// The header's JSON and where the data begins.
fn header_text(bytes: &[u8]) -> Result<(&str, u64)> {
    let truncated = |expected: u64| {
        Error::new(ErrorKind::Truncated {
            expected,
            found: bytes.len() as u64,
        })
    };
    let (length, rest) = bytes
        .split_first_chunk()
        .ok_or_else(|| truncated(LENGTH_BYTES))?;
    let length = u64::from_le_bytes(*length);
    if length > SAFETENSORS_MAX_HEADER_BYTES {
        let limit = SAFETENSORS_MAX_HEADER_BYTES;
        let kind = ErrorKind::Limit {
            what: "header length",
            limit,
            found: length,
        };
        return Err(Error::new(kind).at(0));
    }
    let data_start = length.saturating_add(LENGTH_BYTES);
    let header = usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| truncated(data_start).at(0))?;
    let text = std::str::from_utf8(header).map_err(|e| {
        Error::malformed("header is not UTF-8")
            .at(LENGTH_BYTES.saturating_add(e.valid_up_to() as u64))
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
fn texts(raw: &RawValue) -> Result<BTreeMap<String, String>> {
    let entries = serde_json::from_str::<Option<Entries<Cow<str>>>>(raw.get())
        .map_err(|error| Error::malformed(describe(&error)))?;
    let entries = entries.map_or_else(Vec::new, |Entries(entries)| entries);
    Ok(entries
        .into_iter()
        .map(|(key, text)| (key, text.into_owned()))
        .collect())
}

fn tensor(name: &str, raw: &RawValue, data_start: u64, file_bytes: u64) -> Result<TensorEntry> {
    let raw: RawTensor =
        serde_json::from_str(raw.get()).map_err(|error| Error::malformed(describe(&error)))?;
    let dtype = Dtype::from_name(&raw.dtype)
        .ok_or_else(|| Error::unsupported(format!("dtype `{}` is not supported", raw.dtype)))?;
    let (begin, end) = raw.data_offsets;
    let bytes = end.checked_sub(begin).ok_or_else(|| {
        Error::malformed(format!(
            "data ends at {end:#x} before it begins at {begin:#x}"
        ))
    })?;
    let shape_bytes = raw
        .shape
        .iter()
        .try_fold(dtype.bytes() as u64, |product, &dim| {
            product.checked_mul(dim as u64)
        })
        .ok_or_else(|| {
            Error::malformed(format!(
                "shape {:?} has more than 2^64 - 1 bytes",
                raw.shape
            ))
        })?;
    if shape_bytes != bytes {
        let shape = &raw.shape;
        return Err(Error::malformed(format!(
            "{dtype} of shape {shape:?} takes {shape_bytes} bytes, found {bytes}"
        )));
    }
    let file_end = data_start.saturating_add(end);
    if file_end > file_bytes {
        return Err(Error::new(ErrorKind::Truncated {
            expected: file_end,
            found: file_bytes,
        })
        .hint("the download may be incomplete: fetch the file again"));
    }
    let offset = data_start.saturating_add(begin);
    Ok(TensorEntry {
        name: name.to_owned(),
        dtype,
        shape: raw.shape,
        shard: 0,
        offset,
        bytes,
    })
}

/// Tensors in data order must follow each other without a gap, up to the end of the file.
fn check_coverage(tensors: &[TensorEntry], data_start: u64, file_bytes: u64) -> Result<()> {
    let mut end = data_start;
    let mut before = None;
    for tensor in tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end {
                "overlaps"
            } else {
                "leaves a gap after"
            };
            let whom = before.map_or("the header".to_owned(), |name| format!("`{name}`"));
            return Err(Error::malformed(format!("data {what} {whom}"))
                .in_tensor(&tensor.name)
                .at(tensor.offset));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        bytes
    }

    /// Expects this message of the header, followed by 24 bytes of data; an empty one expects no error.
    #[track_caller]
    fn check(header: &str, expected: &str) {
        let found =
            parse_header(&file(header, 24)).map_or_else(|e| e.to_string(), |_| String::new());
        assert_eq!(found, expected);
    }

    const GOOD: &str = r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}"#;

    #[test]
    fn tensors_come_in_data_order() {
        let tensors = parse_header(&file(GOOD, 24)).unwrap();
        let start = 8 + GOOD.len() as u64;
        let seen: Vec<_> = tensors
            .iter()
            .map(|t| {
                (
                    t.name.as_str(),
                    t.dtype,
                    &t.shape[..],
                    t.offset,
                    t.bytes,
                    t.elements(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("b", Dtype::Bf16, &[4][..], start, 8, 4),
                ("a", Dtype::F32, &[2, 2][..], start + 8, 16, 4),
            ]
        );
    }

    #[test]
    fn the_safetensors_crate_agrees() {
        use safetensors::{Dtype as Theirs, tensor::TensorView};
        let data: Vec<u8> = (0..64).collect();
        let views = [
            ("e", Theirs::F8_E4M3, vec![3], 3),
            ("empty", Theirs::F32, vec![0, 7], 0),
            ("half", Theirs::F16, vec![2, 3], 12),
            ("scalar", Theirs::F64, vec![], 8),
            ("word", Theirs::I64, vec![1], 8),
            ("b", Theirs::BOOL, vec![2], 2),
        ]
        .map(|(name, dtype, shape, bytes)| {
            (name, TensorView::new(dtype, shape, &data[..bytes]).unwrap())
        });
        let written = safetensors::serialize(views, None).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&written).unwrap();
        let ours = parse_header(&written).unwrap();
        assert_eq!(ours.len(), theirs.len());
        for entry in ours {
            let view = theirs.tensor(&entry.name).unwrap();
            assert_eq!(
                format!("{:?}", view.dtype()).to_uppercase(),
                entry.dtype.name()
            );
            assert_eq!(view.shape(), entry.shape);
            let start = entry.offset as usize;
            assert_eq!(view.data(), &written[start..start + entry.bytes as usize]);
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        let bytes = file(GOOD, 24);
        for end in 0..bytes.len() {
            let error = parse_header(&bytes[..end]).unwrap_err();
            assert!(
                matches!(error.kind, ErrorKind::Truncated { .. }),
                "cut at {end}: {error}"
            );
        }
    }

    #[test]
    fn lies_of_the_length() {
        let check = |bytes: &[u8], expected: &str| {
            assert_eq!(parse_header(bytes).unwrap_err().to_string(), expected)
        };
        check(
            &[9, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'],
            "file is truncated: expected 17 bytes, found 10 (at 0x0)",
        );
        check(
            &u64::MAX.to_le_bytes(),
            "header length is 18446744073709551615, the limit is 100000000 (at 0x0)",
        );
        check(
            b"GGUF\x03\0\0\0",
            "header length is 14064895815, the limit is 100000000 (at 0x0)",
        );
        check(&file("", 0), "header must begin with `{` (at 0x8)");
        check(&file(" {}", 0), "header must begin with `{` (at 0x8)");
        check(&file("{}", 1), "1 bytes belong to no tensor (at 0xa)");
        let mut not_text = file(GOOD, 24);
        not_text[10] = 0xff;
        check(&not_text, "header is not UTF-8 (at 0xa)");
    }

    #[test]
    fn lies_of_the_json() {
        check(GOOD, "");
        check(&format!("{GOOD}   "), "");
        check(
            &format!("{GOOD} x"),
            "header is not JSON: trailing characters (at 0x78)",
        );
        check("{\"a\":}", "header is not JSON: expected value (at 0xd)");
        check("{]", "header is not JSON: key must be a string (at 0x9)");
        check(
            &format!("{{\"a\":{}", "[".repeat(10_000)),
            "header is not JSON: EOF while parsing a list (at 0x271c)",
        );
        check(
            &GOOD.replace("\"b\":", "\"a\":"),
            "`a`: header names it twice (at 0x45)",
        );
        check(
            &GOOD.replace("\"b\":", r#""\u0061":"#),
            "`a`: header names it twice (at 0x4a)",
        );
        check(
            r#"{"__metadata__":{"format":"pt"}}"#,
            "24 bytes belong to no tensor (at 0x28)",
        );
        check(
            r#"{"__metadata__":{"format":1}}"#,
            "`__metadata__`: invalid type: integer `1`, expected a string (at 0x18)",
        );
    }

    #[test]
    fn lies_of_tensors() {
        let bend = |from: &str, to: &str| GOOD.replacen(from, to, 1);
        check(
            &bend("F32", "F4"),
            "`a`: dtype `F4` is not supported (at 0xd)",
        );
        check(
            &bend("\"F32\"", "4"),
            "`a`: invalid type: integer `4`, expected a string (at 0xd)",
        );
        check(
            &bend("\"dtype\":\"F32\",", ""),
            "`a`: missing field `dtype` (at 0xd)",
        );
        check(
            &bend("\"shape\":[2,2]", "\"dtype\":\"F32\""),
            "`a`: duplicate field `dtype` (at 0xd)",
        );
        check(
            &bend("[2,2]", "[-2,2]"),
            "`a`: invalid value: integer `-2`, expected usize (at 0xd)",
        );
        check(
            &bend("[2,2]", "[2,2.0]"),
            "`a`: invalid type: floating point `2.0`, expected usize (at 0xd)",
        );
        check(
            &bend("[2,2]", "[2,3]"),
            "`a`: F32 of shape [2, 3] takes 24 bytes, found 16 (at 0xd)",
        );
        check(
            &bend("[2,2]", "[4294967296,4294967296]"),
            "`a`: shape [4294967296, 4294967296] has more than 2^64 - 1 bytes (at 0xd)",
        );
        check(
            &bend("[8,24]", "[24,8]"),
            "`a`: data ends at 0x8 before it begins at 0x18 (at 0xd)",
        );
        check(
            &bend("[8,24]", "[8]"),
            "`a`: invalid length 1, expected a tuple of size 2 (at 0xd)",
        );
    }

    #[test]
    fn lies_of_offsets() {
        // The header is 112 bytes long, so the data begins at 0x78.
        let two = |a: [u64; 2], b: [u64; 2]| {
            let entry = |[begin, end]: [u64; 2]| {
                let length = end - begin;
                format!(r#"{{"dtype":"U8","shape":[{length}],"data_offsets":[{begin},{end}]}}"#)
            };
            format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b))
        };
        let check = |a, b, expected: &str| check(&format!("{:112}", two(a, b)), expected);
        check([0, 8], [8, 24], "");
        check([8, 24], [0, 8], "");
        check(
            [0, 8],
            [9, 25],
            "`b`: file is truncated: expected 145 bytes, found 144 (at 0x41)",
        );
        check([0, 8], [7, 24], "`b`: data overlaps `a` (at 0x7f)");
        check([0, 8], [0, 24], "`b`: data overlaps `a` (at 0x78)");
        check([0, 24], [0, 24], "`b`: data overlaps `a` (at 0x78)");
        check(
            [0, 8],
            [9, 24],
            "`b`: data leaves a gap after `a` (at 0x81)",
        );
        check(
            [1, 8],
            [8, 24],
            "`a`: data leaves a gap after the header (at 0x79)",
        );
        check([0, 8], [8, 23], "1 bytes belong to no tensor (at 0x8f)");
    }
}
