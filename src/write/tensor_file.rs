//! Small safetensors files that this program writes for itself: what they say, read back with every check.
//!
//! Enters: named arrays and texts, or a file nobody has checked. Leaves: the file, or arrays of the type and shape asked
//! for. Memory grows with the file, never with a size it claims.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv_formats::{Dtype, Error, Result};

/// A tensor to be written: name, type, shape.
#[derive(Debug, Clone)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// The shape, slowest dimension first.
    pub shape: Vec<usize>,
}

impl NewTensor {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }
}

/// Writes the header of a file of these tensors, whose data follows in the same order without gaps.
///
/// # Errors
/// The sink refuses.
pub fn write_header(
    out: &mut dyn Write,
    texts: &BTreeMap<&str, String>,
    tensors: &[NewTensor],
) -> io::Result<()> {
    out.write_all(&header_bytes(texts, tensors))
}

/// Length field, JSON and padding of a file of these tensors, whose data follows in the same order without gaps.
pub fn header_bytes(texts: &BTreeMap<&str, String>, tensors: &[NewTensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    if !texts.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(texts));
    }
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes();
        let entry = serde_json::json!({
            "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, end]
        });
        header.insert(tensor.name.clone(), entry);
        begin = end;
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let length = (json.len() as u64).to_le_bytes();
    [length.as_slice(), &json].concat()
}

/// Writes numbers, little-endian.
///
/// # Errors
/// The sink refuses.
pub fn write_numbers<'a, T: Copy + 'a, const N: usize>(
    out: &mut dyn Write,
    values: impl IntoIterator<Item = &'a T>,
    bytes: fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut values = values.into_iter();
    values.try_for_each(|value| out.write_all(&bytes(*value)))
}

/// Reads tensors by name and remembers which were asked for.
#[derive(Debug)]
pub struct TensorReader<'a> {
    file: &'a Checkpoint,
    /// Tensors that nobody has asked for yet.
    left: BTreeSet<&'a str>,
}

impl<'a> TensorReader<'a> {
    /// Reads from an opened file.
    pub fn new(file: &'a Checkpoint) -> Self {
        Self {
            file,
            left: file.tensors().iter().map(|t| t.name.as_str()).collect(),
        }
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// The shape that the file gives a tensor; empty where there is none.
    pub fn shape(&self, name: &str) -> &'a [usize] {
        self.file.tensor(name).map_or(&[], |entry| &entry.shape)
    }

    /// The bytes of a tensor of `dtype`, whatever its shape.
    ///
    /// # Errors
    /// It is missing or of another type.
    pub fn bytes(&mut self, name: &str, dtype: Dtype) -> Result<&'a [u8]> {
        let entry = self.take(name, dtype)?;
        Ok(self.file.bytes(entry))
    }

    /// The numbers of a tensor of `dtype` and `shape`.
    ///
    /// # Errors
    /// It is missing, of another type or of another shape.
    pub fn numbers<T, const N: usize>(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        of: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let entry = self.take(name, dtype)?;
        if entry.shape != shape {
            let what = format!("shape must be {shape:?}, found {:?}", entry.shape);
            return Err(Error::malformed(what).in_tensor(name));
        }
        let (words, _) = self.file.bytes(entry).as_chunks::<N>();
        Ok(words.iter().map(|word| of(*word)).collect())
    }

    /// The numbers of an F64 tensor of `shape`.
    ///
    /// # Errors
    /// As [`Self::numbers`].
    pub fn f64s(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        self.numbers(name, Dtype::F64, shape, f64::from_le_bytes)
    }

    /// A tensor that nobody has asked for.
    pub fn left_over(&self) -> Option<&'a str> {
        self.left.first().copied()
    }

    fn take(&mut self, name: &str, dtype: Dtype) -> Result<&'a TensorEntry> {
        let entry = self.file.tensor(name);
        let entry = entry.ok_or_else(|| Error::missing("is missing").in_tensor(name))?;
        self.left.remove(name);
        match entry.dtype == dtype {
            true => Ok(entry),
            false => {
                let what = format!("dtype must be {dtype}, found {}", entry.dtype);
                Err(Error::malformed(what).in_tensor(name))
            }
        }
    }
}
