//! Phase one of writing a GGUF file: the header's bytes and every offset, before any data exists.
//!
//! Enters: metadata and shapes. Leaves: bytes to write first, and where each tensor goes. Touches no file.

#![allow(
    clippy::indexing_slicing,
    reason = "indices are the caller's, see the panics of each"
)]

use super::{
    Array, Metadata, Value,
    header::{ALIGNMENT_KEY, MAGIC, VERSION, align, alignment, check_key, past_u64},
    tensor_info::{check_name, checked_bytes},
};
use crate::{Error, GgmlType, Result, cursor::within, limits::GGUF_MAX_WRITTEN_ALIGNMENT};
use std::collections::HashSet;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    /// The name, at most 63 bytes.
    pub name: String,
    /// The shape, fastest dimension first, stored as given.
    pub dims: Vec<u64>,
    /// The type to store.
    pub ty: GgmlType,
}

/// A whole GGUF file (version 3, little-endian) but for the tensor data. Tensor `i` takes `tensor_bytes(i)` bytes at
/// `tensor_offset(i)`; whatever lies between tensors and after the last, up to `file_bytes()`, is zero.
#[derive(Debug, Clone)]
pub struct Layout {
    header: Vec<u8>,
    places: Vec<Place>,
    file_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    /// From the start of the data section until [`Layout::new`] has written the header, then from the file's.
    offset: u64,
    bytes: u64,
}

impl Layout {
    /// Lays out a file with these keys and tensors, both in the order given, aligned to `general.alignment` or 32.
    ///
    /// # Errors
    /// What no reader would accept: an empty key, an alignment that is not a u32 power of two, a tensor name over 63
    /// bytes or there twice, more than 4 dimensions, rows that do not fill blocks, sizes beyond 2^63. Besides, an
    /// alignment above [`GGUF_MAX_WRITTEN_ALIGNMENT`].
    pub fn new(metadata: Metadata, tensors: Vec<NewTensor>) -> Result<Self> {
        let alignment = alignment(&metadata)?;
        let limit = u64::from(GGUF_MAX_WRITTEN_ALIGNMENT);
        within("alignment", limit, alignment.into()).map_err(|e| e.in_tensor(ALIGNMENT_KEY))?;
        let (mut places, data_bytes) = place(&tensors, alignment)?;
        let mut header = Vec::new();
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        put_count(&mut header, tensors.len());
        put_count(&mut header, metadata.iter().len());
        for (key, value) in metadata.iter() {
            check_key(key)?;
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        for (tensor, place) in tensors.iter().zip(&places) {
            put_tensor(&mut header, tensor, place.offset);
        }
        let data_offset = align(header.len() as u64, alignment).ok_or_else(past_u64)?;
        let padding = data_offset.saturating_sub(header.len() as u64);
        header.extend(std::iter::repeat_n(
            0,
            usize::try_from(padding).map_err(|_| past_u64())?,
        ));
        let file_bytes = data_offset.checked_add(data_bytes).ok_or_else(past_u64)?;
        for place in &mut places {
            place.offset = place.offset.saturating_add(data_offset);
        }
        Ok(Self {
            header,
            places,
            file_bytes,
        })
    }

    /// The bytes before the data section, padding included.
    pub fn header_bytes(&self) -> &[u8] {
        &self.header
    }

    /// Number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.places.len()
    }

    /// Where tensor `index` begins, in bytes from the start of the file.
    ///
    /// # Panics
    /// `index` is not below [`Self::tensor_count`].
    pub fn tensor_offset(&self, index: usize) -> u64 {
        self.places[index].offset
    }

    /// Bytes of tensor `index`, without padding.
    ///
    /// # Panics
    /// `index` is not below [`Self::tensor_count`].
    pub fn tensor_bytes(&self, index: usize) -> u64 {
        self.places[index].bytes
    }

    /// Bytes of the whole file, the padding after the last tensor included.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}

/// Places in the data section, and its length.
fn place(tensors: &[NewTensor], alignment: u32) -> Result<(Vec<Place>, u64)> {
    let mut seen = HashSet::new();
    let mut places = Vec::with_capacity(tensors.len());
    let mut offset = 0u64;
    for tensor in tensors {
        let name = |e: Error| e.in_tensor(&tensor.name);
        check_name(&tensor.name).map_err(name)?;
        if !seen.insert(&tensor.name) {
            return Err(name(Error::malformed("tensor is there twice")));
        }
        let bytes = checked_bytes(&tensor.dims, tensor.ty).map_err(name)?;
        places.push(Place { offset, bytes });
        offset = offset
            .checked_add(bytes)
            .and_then(|end| align(end, alignment))
            .ok_or_else(|| name(past_u64()))?;
    }
    Ok((places, offset))
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&(count as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_count(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn put_tensor(out: &mut Vec<u8>, tensor: &NewTensor, offset: u64) {
    put_string(out, &tensor.name);
    #[allow(
        clippy::cast_possible_truncation,
        reason = "at most 4, as `place` has checked"
    )]
    let dim_count = tensor.dims.len() as u32;
    out.extend_from_slice(&dim_count.to_le_bytes());
    for dim in &tensor.dims {
        out.extend_from_slice(&dim.to_le_bytes());
    }
    out.extend_from_slice(&tensor.ty.id().to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($id:literal, $value:expr) => {{
            out.extend_from_slice(&u32::to_le_bytes($id));
            out.extend_from_slice(&$value.to_le_bytes());
        }};
    }
    match value {
        Value::U8(value) => number!(0, value),
        Value::I8(value) => number!(1, value),
        Value::U16(value) => number!(2, value),
        Value::I16(value) => number!(3, value),
        Value::U32(value) => number!(4, value),
        Value::I32(value) => number!(5, value),
        Value::F32(value) => number!(6, value),
        Value::Bool(value) => number!(7, u8::from(*value)),
        Value::String(text) => {
            out.extend_from_slice(&u32::to_le_bytes(8));
            put_string(out, text);
        }
        Value::Array(array) => {
            out.extend_from_slice(&u32::to_le_bytes(9));
            put_array(out, array);
        }
        Value::U64(value) => number!(10, value),
        Value::I64(value) => number!(11, value),
        Value::F64(value) => number!(12, value),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($id:literal, $values:expr) => {{
            out.extend_from_slice(&u32::to_le_bytes($id));
            put_count(out, $values.len());
            for value in $values {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }};
    }
    match array {
        Array::U8(values) => numbers!(0, values),
        Array::I8(values) => numbers!(1, values),
        Array::U16(values) => numbers!(2, values),
        Array::I16(values) => numbers!(3, values),
        Array::U32(values) => numbers!(4, values),
        Array::I32(values) => numbers!(5, values),
        Array::F32(values) => numbers!(6, values),
        Array::Bool(values) => {
            out.extend_from_slice(&u32::to_le_bytes(7));
            put_count(out, values.len());
            out.extend(values.iter().map(|&value| u8::from(value)));
        }
        Array::String(values) => {
            out.extend_from_slice(&u32::to_le_bytes(8));
            put_count(out, values.len());
            for value in values {
                put_string(out, value);
            }
        }
        Array::U64(values) => numbers!(10, values),
        Array::I64(values) => numbers!(11, values),
        Array::F64(values) => numbers!(12, values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Header;

    fn tensor(name: &str, dims: &[u64], ty: GgmlType) -> NewTensor {
        NewTensor {
            name: name.to_owned(),
            dims: dims.to_vec(),
            ty,
        }
    }

    fn every_value() -> Metadata {
        let mut metadata = Metadata::new();
        metadata.set("u8", 1u8);
        metadata.set("i8", -1i8);
        metadata.set("u16", 2u16);
        metadata.set("i16", -2i16);
        metadata.set("u32", 3u32);
        metadata.set("i32", -3i32);
        metadata.set("f32", 1.5f32);
        metadata.set("bool", true);
        metadata.set("string", "p\u{e4}\0");
        metadata.set("u64", u64::MAX);
        metadata.set("i64", i64::MIN);
        metadata.set("f64", -0.25f64);
        metadata.set("u8s", Array::U8(vec![1, 2]));
        metadata.set("i8s", Array::I8(vec![-1, 2]));
        metadata.set("u16s", Array::U16(vec![1, 2]));
        metadata.set("i16s", Array::I16(vec![-1, 2]));
        metadata.set("u32s", vec![1u32]);
        metadata.set("i32s", vec![-1i32, 2]);
        metadata.set("f32s", vec![0.5f32, f32::INFINITY]);
        metadata.set("bools", vec![true, false]);
        metadata.set("strings", vec![String::new(), "b".to_owned()]);
        metadata.set("u64s", vec![u64::MAX]);
        metadata.set("i64s", Array::I64(vec![i64::MIN]));
        metadata.set("f64s", Array::F64(vec![]));
        metadata
    }

    /// Lays out, fills with zeros, reads back, and expects what went in.
    fn check(metadata: Metadata, tensors: Vec<NewTensor>) {
        let layout = Layout::new(metadata.clone(), tensors.clone()).unwrap();
        let mut file = layout.header_bytes().to_vec();
        file.resize(layout.file_bytes() as usize, 0);
        let header = Header::parse(&file).unwrap();
        assert_eq!(header.metadata, metadata);
        assert_eq!(header.tensors.len(), tensors.len());
        let alignment = u64::from(header.alignment);
        for (index, (read, written)) in header.tensors.iter().zip(&tensors).enumerate() {
            assert_eq!(
                (&read.name, &read.dims, read.ty),
                (&written.name, &written.dims, written.ty)
            );
            assert_eq!(
                header.data_offset + read.offset,
                layout.tensor_offset(index)
            );
            assert_eq!(read.bytes(), layout.tensor_bytes(index));
            assert_eq!(layout.tensor_offset(index) % alignment, 0);
        }
        assert_eq!(layout.file_bytes() % alignment, 0);
        assert_eq!(layout.header_bytes().len() as u64 % alignment, 0);
        assert_eq!(layout.tensor_count(), tensors.len());
    }

    #[test]
    fn what_is_laid_out_reads_back() {
        check(Metadata::new(), vec![]);
        check(every_value(), vec![]);
        check(
            every_value(),
            vec![
                tensor("a", &[3], GgmlType::F32),
                tensor("b", &[256, 3], GgmlType::Q4_K),
                tensor("c", &[4, 1, 7], GgmlType::F16),
                tensor(&"n".repeat(63), &[0, 2], GgmlType::F32),
                tensor("e", &[], GgmlType::F32),
            ],
        );
        let mut wide = every_value();
        wide.set("general.alignment", 4096u32);
        check(
            wide,
            vec![
                tensor("a", &[3], GgmlType::F32),
                tensor("b", &[1], GgmlType::F32),
            ],
        );
    }

    #[test]
    fn the_last_tensor_is_padded() {
        let layout = Layout::new(Metadata::new(), vec![tensor("a", &[3], GgmlType::F32)]).unwrap();
        assert_eq!(layout.tensor_bytes(0), 12);
        assert_eq!(layout.file_bytes(), layout.tensor_offset(0) + 32);
    }

    #[test]
    fn what_no_reader_accepts_is_refused() {
        let refused = |metadata: Metadata, tensors: Vec<NewTensor>, expected: &str| {
            assert_eq!(
                Layout::new(metadata, tensors).unwrap_err().to_string(),
                expected
            );
        };
        let with = |key: &str, value: Value| {
            let mut metadata = Metadata::new();
            metadata.set(key, value);
            metadata
        };
        let a = tensor("a", &[32], GgmlType::Q8_0);
        refused(
            Metadata::new(),
            vec![a.clone(), a.clone()],
            "`a`: tensor is there twice",
        );
        refused(
            Metadata::new(),
            vec![tensor("a", &[2688, 4], GgmlType::Q4_K)],
            "`a`: cannot be Q4_K: row length must be a multiple of 256, found 2688",
        );
        refused(
            Metadata::new(),
            vec![tensor("a", &[1; 5], GgmlType::F32)],
            "`a`: number of dimensions is 5, the limit is 4",
        );
        let long = "n".repeat(64);
        refused(
            Metadata::new(),
            vec![tensor(&long, &[1], GgmlType::F32)],
            &format!("`{long}`: length of the tensor name in bytes is 64, the limit is 63"),
        );
        refused(
            Metadata::new(),
            vec![
                tensor("a", &[1 << 61], GgmlType::F32),
                tensor("b", &[1 << 61], GgmlType::F32),
            ],
            "`b`: data section ends beyond 2^64 bytes",
        );
        refused(with("", Value::U8(0)), vec![], "key is empty");
        refused(
            with("general.alignment", Value::U32(48)),
            vec![],
            "`general.alignment`: alignment must be a power of two, found 48",
        );
        refused(
            with("general.alignment", Value::U32(1 << 31)),
            vec![],
            "`general.alignment`: alignment is 2147483648, the limit is 2097152",
        );
        refused(
            with("general.alignment", Value::U64(32)),
            vec![],
            "`general.alignment`: alignment must be a u32",
        );
    }
}
