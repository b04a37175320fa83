//! The head of a GGUF file: everything before the tensor data.
//!
//! Enters: the bytes of a whole file, unchecked. Leaves: metadata and tensor infos, of which every one lies inside the
//! file. Rejects what ggml's reader rejects (gguf.cpp, `gguf_init_from_reader`) and, beyond it, data past the end of
//! the file, text that is not UTF-8, names with a NUL, and bools other than 0 and 1.

use super::{
    Array, Metadata, TensorInfo, Value,
    tensor_info::{check_name, checked_bytes},
};
use crate::{Error, ErrorKind, GgmlType, Result, cursor::Cursor};
use std::collections::HashSet;

/// The first four bytes of a GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// The version written; 2 has the same layout and is read too.
pub const VERSION: u32 = 3;

/// The key that sets [`Header::alignment`].
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// Alignment of tensor data where [`ALIGNMENT_KEY`] is absent.
pub const DEFAULT_ALIGNMENT: u32 = 32;

/// Metadata and tensor infos of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Header {
    /// Container version, 2 or 3.
    pub version: u32,
    /// Keys and values in file order.
    pub metadata: Metadata,
    /// Tensors in file order, which is data order.
    pub tensors: Vec<TensorInfo>,
    /// Alignment of tensor data in bytes, a power of two.
    pub alignment: u32,
    /// Where the data section begins, in bytes from the start of the file.
    pub data_offset: u64,
}

impl Header {
    /// Reads the header of the file whose bytes are `bytes`, data included.
    ///
    /// Memory grows with the header's bytes, never with a count it claims.
    ///
    /// # Errors
    /// Anything that contradicts the format, with the offset and the key or tensor at fault.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let header = Self::parse_unplaced(bytes)?;
        let (alignment, data_offset) = (header.alignment, header.data_offset);
        check_names(&header.tensors)?;
        check_offsets(&header.tensors, alignment, data_offset, bytes.len() as u64)?;
        Ok(header)
    }

    /// The same for tools that say all that is wrong with a file: neither where tensors lie nor whether their names
    /// are distinct has been checked.
    ///
    /// # Errors
    /// As [`Self::parse`], but for these two.
    pub fn parse_unplaced(bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor::new(bytes);
        let version = read_version(&mut cursor)?;
        let tensor_count = read_count(&mut cursor, "tensors")?;
        let key_count = read_count(&mut cursor, "keys")?;
        let metadata = read_metadata(&mut cursor, key_count)?;
        let alignment = alignment(&metadata)?;
        let tensors = read_tensors(&mut cursor, tensor_count)?;
        let data_offset = match tensors.is_empty() {
            true => cursor.at(),
            false => align(cursor.at(), alignment).ok_or_else(past_u64)?,
        };
        Ok(Self {
            version,
            metadata,
            tensors,
            alignment,
            data_offset,
        })
    }
}

fn read_version(cursor: &mut Cursor) -> Result<u32> {
    let magic = cursor.take(4)?;
    if magic != MAGIC {
        return Err(Error::malformed(format!(
            "not a GGUF file: expected `GGUF`, found `{}`",
            magic.escape_ascii()
        ))
        .at(0));
    }
    match cursor.u32()? {
        version @ 2..=VERSION => Ok(version),
        version if version & 0xffff == 0 && version != 0 => {
            Err(Error::unsupported("big-endian GGUF").at(4))
        }
        version => {
            Err(Error::unsupported(format!("GGUF version {version}, expected 2 or 3")).at(4))
        }
    }
}

/// A count of things that follow; ggml holds it in an i64.
fn read_count(cursor: &mut Cursor, what: &str) -> Result<u64> {
    let at = cursor.at();
    let count = cursor.u64()?;
    match i64::try_from(count) {
        Ok(_) => Ok(count),
        Err(_) => Err(Error::malformed(format!("number of {what} is negative")).at(at)),
    }
}

fn read_metadata(cursor: &mut Cursor, count: u64) -> Result<Metadata> {
    let mut entries = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..count {
        let at = cursor.at();
        let key = cursor.string()?;
        check_key(key).map_err(|e| e.at(at))?;
        if !seen.insert(key) {
            return Err(Error::malformed("key is there twice").in_tensor(key).at(at));
        }
        let value = read_value(cursor).map_err(|e| e.in_tensor(key))?;
        entries.push((key.to_owned(), value));
    }
    Ok(Metadata::from_distinct(entries))
}

/// Checks a metadata key against what ggml accepts.
pub(super) fn check_key(key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::malformed("key is empty"));
    }
    match key.contains('\0') {
        true => Err(Error::malformed("key contains a NUL").in_tensor(key)),
        false => Ok(()),
    }
}

fn read_value(cursor: &mut Cursor) -> Result<Value> {
    let at = cursor.at();
    Ok(match cursor.u32()? {
        0 => Value::U8(cursor.number(u8::from_le_bytes)?),
        1 => Value::I8(cursor.number(i8::from_le_bytes)?),
        2 => Value::U16(cursor.number(u16::from_le_bytes)?),
        3 => Value::I16(cursor.number(i16::from_le_bytes)?),
        4 => Value::U32(cursor.u32()?),
        5 => Value::I32(cursor.number(i32::from_le_bytes)?),
        6 => Value::F32(cursor.number(f32::from_le_bytes)?),
        7 => Value::Bool(read_bool(cursor)?),
        8 => Value::String(cursor.string()?.to_owned()),
        9 => Value::Array(read_array(cursor)?),
        10 => Value::U64(cursor.u64()?),
        11 => Value::I64(cursor.number(i64::from_le_bytes)?),
        12 => Value::F64(cursor.number(f64::from_le_bytes)?),
        id => return Err(Error::malformed(format!("value type {id} does not exist")).at(at)),
    })
}

fn read_array(cursor: &mut Cursor) -> Result<Array> {
    let at = cursor.at();
    let id = cursor.u32()?;
    let count = cursor.count()?;
    Ok(match id {
        0 => Array::U8(cursor.numbers(count, u8::from_le_bytes)?),
        1 => Array::I8(cursor.numbers(count, i8::from_le_bytes)?),
        2 => Array::U16(cursor.numbers(count, u16::from_le_bytes)?),
        3 => Array::I16(cursor.numbers(count, i16::from_le_bytes)?),
        4 => Array::U32(cursor.numbers(count, u32::from_le_bytes)?),
        5 => Array::I32(cursor.numbers(count, i32::from_le_bytes)?),
        6 => Array::F32(cursor.numbers(count, f32::from_le_bytes)?),
        7 => Array::Bool(repeat(count, || read_bool(cursor))?),
        8 => Array::String(repeat(count, || cursor.string().map(str::to_owned))?),
        9 => return Err(Error::malformed("array of arrays").at(at)),
        10 => Array::U64(cursor.numbers(count, u64::from_le_bytes)?),
        11 => Array::I64(cursor.numbers(count, i64::from_le_bytes)?),
        12 => Array::F64(cursor.numbers(count, f64::from_le_bytes)?),
        id => {
            return Err(Error::malformed(format!("array element type {id} does not exist")).at(at));
        }
    })
}

/// `count` values that each take bytes, so that memory follows what was read.
fn repeat<T>(count: u64, read: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    let mut read = read;
    let mut values = Vec::new();
    for _ in 0..count {
        values.push(read()?);
    }
    Ok(values)
}

fn read_bool(cursor: &mut Cursor) -> Result<bool> {
    let at = cursor.at();
    match cursor.number(u8::from_le_bytes)? {
        0 => Ok(false),
        1 => Ok(true),
        byte => Err(Error::malformed(format!("bool must be 0 or 1, found {byte}")).at(at)),
    }
}

/// The alignment that `metadata` asks for.
pub(super) fn alignment(metadata: &Metadata) -> Result<u32> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok(*alignment),
        Some(Value::U32(alignment)) => Err(Error::malformed(format!(
            "alignment must be a power of two, found {alignment}"
        ))
        .in_tensor(ALIGNMENT_KEY)),
        Some(_) => Err(Error::malformed("alignment must be a u32").in_tensor(ALIGNMENT_KEY)),
    }
}

/// `offset` rounded up to a multiple of `alignment`; `None` past 2^64.
pub(super) fn align(offset: u64, alignment: u32) -> Option<u64> {
    offset.checked_next_multiple_of(u64::from(alignment))
}

fn read_tensors(cursor: &mut Cursor, count: u64) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::new();
    for _ in 0..count {
        let at = cursor.at();
        let name = cursor.string()?;
        check_name(name).map_err(|e| e.at(at))?;
        let tensor = read_tensor(cursor, name).map_err(|e| e.in_tensor(name).at(at))?;
        tensors.push(tensor);
    }
    Ok(tensors)
}

fn read_tensor(cursor: &mut Cursor, name: &str) -> Result<TensorInfo> {
    let dims_at = cursor.at();
    let dim_count = u64::from(cursor.u32()?);
    let dims = cursor.numbers(dim_count, u64::from_le_bytes)?;
    let type_at = cursor.at();
    let type_id = cursor.u32()?;
    let ty = GgmlType::from_id(type_id).ok_or_else(|| {
        Error::unsupported(format!("tensor type {type_id} is not known")).at(type_at)
    })?;
    checked_bytes(&dims, ty).map_err(|e| e.at(dims_at))?;
    let offset = cursor.u64()?;
    Ok(TensorInfo {
        name: name.to_owned(),
        dims,
        ty,
        offset,
    })
}

fn check_names(tensors: &[TensorInfo]) -> Result<()> {
    let mut seen = HashSet::new();
    match tensors.iter().find(|tensor| !seen.insert(&tensor.name)) {
        Some(tensor) => Err(Error::malformed("tensor is there twice").in_tensor(&tensor.name)),
        None => Ok(()),
    }
}

/// Every tensor must begin where the padded one before it ends, and end inside the file.
fn check_offsets(
    tensors: &[TensorInfo],
    alignment: u32,
    data_offset: u64,
    file_bytes: u64,
) -> Result<()> {
    let mut expected = 0u64;
    for tensor in tensors {
        let name = |e: Error| e.in_tensor(&tensor.name);
        if tensor.offset != expected {
            return Err(name(Error::malformed(format!(
                "data must begin at {expected:#x} of the data section, found {:#x}",
                tensor.offset
            ))));
        }
        let start = data_offset
            .checked_add(expected)
            .ok_or_else(|| name(past_u64()))?;
        let end = start
            .checked_add(tensor.bytes())
            .ok_or_else(|| name(past_u64()))?;
        if end > file_bytes {
            return Err(name(
                Error::new(ErrorKind::Truncated {
                    expected: end,
                    found: file_bytes,
                })
                .at(start),
            ));
        }
        expected = expected
            .checked_add(tensor.bytes())
            .and_then(|end| align(end, alignment))
            .ok_or_else(|| name(past_u64()))?;
    }
    Ok(())
}

pub(super) fn past_u64() -> Error {
    Error::malformed("data section ends beyond 2^64 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one key and one F32 tensor `t` of 3 x 2 elements; the pieces are what the tests bend.
    struct Pieces {
        magic: &'static [u8],
        version: u32,
        tensor_count: u64,
        key_count: u64,
        keys: Vec<u8>,
        tensors: Vec<u8>,
        data: Vec<u8>,
    }

    fn good() -> Pieces {
        Pieces {
            magic: b"GGUF",
            version: 3,
            tensor_count: 1,
            key_count: 1,
            keys: key("k", 4, &7u32.to_le_bytes()),
            tensors: tensor("t", &[3, 2], 0, 0),
            data: vec![0; 24],
        }
    }

    fn string(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text].concat()
    }

    fn key(name: &str, value_type: u32, value: &[u8]) -> Vec<u8> {
        [
            &string(name.as_bytes()),
            &value_type.to_le_bytes()[..],
            value,
        ]
        .concat()
    }

    fn tensor(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
        let mut bytes = string(name.as_bytes());
        bytes.extend((dims.len() as u32).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(ty.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    impl Pieces {
        fn bytes(&self) -> Vec<u8> {
            let mut bytes = self.magic.to_vec();
            bytes.extend(self.version.to_le_bytes());
            bytes.extend(self.tensor_count.to_le_bytes());
            bytes.extend(self.key_count.to_le_bytes());
            bytes.extend(&self.keys);
            bytes.extend(&self.tensors);
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(&self.data);
            bytes
        }
    }

    /// Bends the good file and expects this message; an empty one expects no error.
    #[track_caller]
    fn check(bend: impl Fn(&mut Pieces), expected: &str) {
        let mut pieces = good();
        bend(&mut pieces);
        let found =
            Header::parse(&pieces.bytes()).map_or_else(|e| e.to_string(), |_| String::new());
        assert_eq!(found, expected);
    }

    #[test]
    fn the_good_file_is_read() {
        let header = Header::parse(&good().bytes()).unwrap();
        assert_eq!(
            (header.version, header.alignment, header.data_offset),
            (3, 32, 96)
        );
        assert_eq!(header.metadata.get("k"), Some(&Value::U32(7)));
        let [tensor] = &header.tensors[..] else {
            panic!("one tensor")
        };
        assert_eq!(
            (tensor.name.as_str(), tensor.ty, &tensor.dims[..]),
            ("t", GgmlType::F32, &[3, 2][..])
        );
        assert_eq!(
            (tensor.elements(), tensor.rows(), tensor.bytes()),
            (6, 2, 24)
        );
    }

    #[test]
    fn every_cut_is_noticed() {
        let bytes = good().bytes();
        for end in 0..bytes.len() {
            let error = Header::parse(&bytes[..end]).unwrap_err();
            assert!(
                matches!(error.kind, ErrorKind::Truncated { .. }),
                "cut at {end}: {error}"
            );
        }
    }

    #[test]
    fn lies_of_the_preamble() {
        check(
            |p| p.magic = b"GGML",
            "not a GGUF file: expected `GGUF`, found `GGML` (at 0x0)",
        );
        check(|p| p.version = 2, "");
        check(
            |p| p.version = 0,
            "GGUF version 0, expected 2 or 3 (at 0x4)",
        );
        check(
            |p| p.version = 1,
            "GGUF version 1, expected 2 or 3 (at 0x4)",
        );
        check(
            |p| p.version = 4,
            "GGUF version 4, expected 2 or 3 (at 0x4)",
        );
        check(
            |p| p.version = 3u32.swap_bytes(),
            "big-endian GGUF (at 0x4)",
        );
        check(
            |p| p.tensor_count = u64::MAX,
            "number of tensors is negative (at 0x8)",
        );
        check(
            |p| p.key_count = 1 << 63,
            "number of keys is negative (at 0x10)",
        );
        check(
            |p| (p.tensor_count, p.data) = (i64::MAX as u64, vec![]),
            "``: file is truncated: expected 98 bytes, found 96 (at 0x5e)",
        );
    }

    #[test]
    fn lies_of_keys() {
        check(|p| p.keys = key("", 4, &[0; 4]), "key is empty (at 0x18)");
        check(
            |p| p.keys = key("a\0", 4, &[0; 4]),
            "`a\0`: key contains a NUL (at 0x18)",
        );
        check(
            |p| (p.keys, p.key_count) = ([key("k", 0, &[1]), key("k", 0, &[2])].concat(), 2),
            "`k`: key is there twice (at 0x26)",
        );
        check(
            |p| p.keys = [string(b"k\xffk"), vec![0; 5]].concat(),
            "text is not UTF-8 (at 0x21)",
        );
        check(
            |p| p.keys = key("k", 8, &string(b"\xf0\x9f")),
            "`k`: text is not UTF-8 (at 0x2d)",
        );
        check(
            |p| p.keys = key("k", 13, &[0; 4]),
            "`k`: value type 13 does not exist (at 0x21)",
        );
        check(
            |p| p.keys = key("k", 7, &[2]),
            "`k`: bool must be 0 or 1, found 2 (at 0x25)",
        );
        check(
            |p| p.keys = [u64::MAX.to_le_bytes()].concat(),
            "string length is 18446744073709551615, the limit is 1073741824 (at 0x18)",
        );
    }

    #[test]
    fn lies_of_arrays() {
        let array = |ty: u32, count: u64, rest: &[u8]| {
            key(
                "k",
                9,
                &[&ty.to_le_bytes(), &count.to_le_bytes()[..], rest].concat(),
            )
        };
        check(
            |p| p.keys = array(9, 1, &[0; 12]),
            "`k`: array of arrays (at 0x25)",
        );
        check(
            |p| p.keys = array(13, 1, &[0; 12]),
            "`k`: array element type 13 does not exist (at 0x25)",
        );
        check(
            |p| p.keys = array(7, 2, &[1, 3]),
            "`k`: bool must be 0 or 1, found 3 (at 0x32)",
        );
        check(
            |p| p.keys = array(0, 1 << 31, &[]),
            "`k`: array length is 2147483648, the limit is 1073741824 (at 0x29)",
        );
        check(
            |p| p.keys = array(12, 1 << 30, &[]),
            "`k`: file is truncated: expected 8589934641 bytes, found 120 (at 0x31)",
        );
    }

    #[test]
    fn lies_of_the_alignment() {
        let alignment =
            |value_type, value: u64| key(ALIGNMENT_KEY, value_type, &value.to_le_bytes()[..4]);
        check(
            |p| p.keys = alignment(5, 32),
            "`general.alignment`: alignment must be a u32",
        );
        for found in [0, 24] {
            check(
                |p| p.keys = alignment(4, found),
                &format!("`general.alignment`: alignment must be a power of two, found {found}"),
            );
        }
        check(|p| p.keys = alignment(4, 8), "");
    }

    #[test]
    fn lies_of_tensors() {
        let one = |info: Vec<u8>| move |p: &mut Pieces| p.tensors = info.clone();
        check(
            |p| {
                (p.tensors, p.tensor_count) = (
                    [tensor("t", &[2], 0, 0), tensor("t", &[2], 0, 32)].concat(),
                    2,
                )
            },
            "`t`: tensor is there twice",
        );
        check(one(tensor(&"n".repeat(63), &[3, 2], 0, 0)), "");
        check(
            one(tensor(&"n".repeat(64), &[3, 2], 0, 0)),
            "length of the tensor name in bytes is 64, the limit is 63 (at 0x29)",
        );
        check(
            one(tensor("a\0b", &[3, 2], 0, 0)),
            "name contains a NUL (at 0x29)",
        );
        check(
            one(tensor("t", &[1, 1, 1, 1, 1], 0, 0)),
            "`t`: number of dimensions is 5, the limit is 4 (at 0x32)",
        );
        check(one(tensor("t", &[], 0, 0)), "");
        check(one(tensor("t", &[0, 5], 0, 0)), "");
        check(
            one(tensor("t", &[1 << 32, 1 << 31], 0, 0)),
            "`t`: shape [4294967296, 2147483648] has more than 2^63 - 1 elements (at 0x32)",
        );
        check(
            one(tensor("t", &[u64::MAX, 0], 0, 0)),
            "`t`: shape [18446744073709551615, 0] has more than 2^63 - 1 elements (at 0x32)",
        );
        check(
            one(tensor("t", &[1 << 62], 0, 0)),
            "`t`: F32 of shape [4611686018427387904] has more than 2^64 - 1 bytes (at 0x32)",
        );
        check(
            one(tensor("t", &[2], 4, 0)),
            "`t`: tensor type 4 is not known (at 0x3e)",
        );
        check(
            one(tensor("t", &[48, 2], 8, 0)),
            "`t`: cannot be Q8_0: row length must be a multiple of 32, found 48 (at 0x32)",
        );
    }

    #[test]
    fn lies_of_offsets() {
        let two = |second: u64| [tensor("a", &[1], 0, 0), tensor("b", &[1], 0, second)].concat();
        let with = |second: u64| {
            move |p: &mut Pieces| {
                (p.tensors, p.tensor_count, p.data) = (two(second), 2, vec![0; 36])
            }
        };
        check(with(32), "");
        for wrong in [0, 4, 64, u64::MAX] {
            let expected =
                format!("`b`: data must begin at 0x20 of the data section, found {wrong:#x}");
            check(with(wrong), &expected);
        }
        check(
            |p| p.tensors = tensor("t", &[3, 3], 0, 0),
            "`t`: file is truncated: expected 132 bytes, found 120 (at 0x60)",
        );
        check(
            |p| p.tensors = tensor("t", &[u64::MAX / 4 - 1], 0, 0),
            "`t`: data section ends beyond 2^64 bytes",
        );
    }
}
