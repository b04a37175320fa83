//! Writing an importance matrix as llama-imatrix writes it (llama.cpp, tools/imatrix/imatrix.cpp, `save_imatrix`).
//!
//! Enters: sums of squares and counts. Leaves: the bytes of a GGUF file. What runtimes do not read (sums of the inputs
//! themselves, statistics over them) is left out.

use std::io;

use super::{CHUNK_COUNT_KEY, CHUNK_SIZE_KEY, COUNTS_SUFFIX, DATASETS_KEY, SQUARES_SUFFIX};
use crate::gguf::{Layout, Metadata, NewTensor};
use crate::{GgmlType, Result};

/// What the inputs of one weight summed up to.
#[derive(Debug, Clone, PartialEq)]
pub struct ImatrixSums {
    /// GGUF name of the weight, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// Sums of squared inputs, `[matrices, columns]`: one matrix per expert of a stack, else one.
    pub squares: Vec<f32>,
    /// Tokens that each matrix saw, `[matrices]`.
    pub counts: Vec<f32>,
}

/// An importance matrix laid out as a file.
#[derive(Debug)]
pub struct ImatrixFile<'a> {
    layout: Layout,
    /// Of every tensor of the layout.
    values: Vec<&'a [f32]>,
}

impl<'a> ImatrixFile<'a> {
    /// Lays out what was summed over `chunk_count` chunks of `chunk_size` tokens of the files `datasets`. Entries are
    /// written by name, as llama-imatrix does.
    ///
    /// # Errors
    /// As [`Layout::new`]: a name that is too long or there twice.
    pub fn new(
        datasets: Vec<String>,
        chunk_count: u32,
        chunk_size: u32,
        entries: &'a [ImatrixSums],
    ) -> Result<Self> {
        let mut keys = Metadata::new();
        keys.set("general.type", "imatrix");
        keys.set(DATASETS_KEY, datasets);
        keys.set(CHUNK_COUNT_KEY, chunk_count);
        keys.set(CHUNK_SIZE_KEY, chunk_size);
        let mut by_name: Vec<&ImatrixSums> = entries.iter().collect();
        by_name.sort_by(|a, b| a.name.cmp(&b.name));
        let (mut tensors, mut values) = (Vec::new(), Vec::new());
        for entry in by_name {
            let matrices = entry.counts.len();
            let columns = entry.squares.len().checked_div(matrices).unwrap_or(0);
            tensors.push(tensor(&entry.name, SQUARES_SUFFIX, columns, matrices));
            values.push(entry.squares.as_slice());
            tensors.push(tensor(&entry.name, COUNTS_SUFFIX, 1, matrices));
            values.push(entry.counts.as_slice());
        }
        let layout = Layout::new(keys, tensors)?;
        Ok(Self { layout, values })
    }

    /// Writes the whole file.
    ///
    /// # Errors
    /// The sink refuses.
    pub fn write(&self, out: &mut dyn io::Write) -> io::Result<()> {
        out.write_all(self.layout.header_bytes())?;
        let mut at = self.layout.header_bytes().len() as u64;
        for (index, values) in self.values.iter().enumerate() {
            pad(out, self.layout.tensor_offset(index).saturating_sub(at))?;
            for value in *values {
                out.write_all(&value.to_le_bytes())?;
            }
            let end = self.layout.tensor_offset(index);
            at = end.saturating_add(self.layout.tensor_bytes(index));
        }
        pad(out, self.layout.file_bytes().saturating_sub(at))
    }
}

/// ggml stores no trailing dimensions of 1.
fn tensor(weight: &str, suffix: &str, columns: usize, matrices: usize) -> NewTensor {
    let mut dims = vec![columns as u64];
    if matrices > 1 {
        dims.push(matrices as u64);
    }
    NewTensor {
        name: format!("{weight}{suffix}"),
        dims,
        ty: GgmlType::F32,
    }
}

fn pad(out: &mut dyn io::Write, bytes: u64) -> io::Result<()> {
    (0..bytes).try_for_each(|_| out.write_all(&[0]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Imatrix;
    use crate::gguf::Header;

    fn bytes(entries: &[ImatrixSums]) -> Vec<u8> {
        let file = ImatrixFile::new(vec!["a.txt".to_owned()], 3, 512, entries).unwrap();
        let mut bytes = Vec::new();
        file.write(&mut bytes).unwrap();
        bytes
    }

    fn sums(name: &str, squares: &[f32], counts: &[f32]) -> ImatrixSums {
        ImatrixSums {
            name: name.to_owned(),
            squares: squares.to_vec(),
            counts: counts.to_vec(),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let stack = sums(
            "b.weight",
            &[2.0, 4.0, 0.0, 0.0, 4.0, 1.0],
            &[2.0, 0.0, 4.0],
        );
        let bytes = bytes(&[stack, sums("a.weight", &[1.0, 3.0, 5.0], &[2.0])]);
        let imatrix = Imatrix::parse(&bytes).unwrap();
        assert_eq!(imatrix.datasets, ["a.txt"]);
        assert_eq!(imatrix.chunk_count, 3);
        let expected: [(&str, &[f32]); 2] = [
            ("a.weight", &[0.5, 1.5, 2.5]),
            ("b.weight", &[1.0, 2.0, 1.0, 1.0, 1.0, 0.25]),
        ];
        assert_eq!(imatrix.entries().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn tensors_are_named_and_shaped_as_llama_imatrix_does() {
        let bytes = bytes(&[
            sums("w", &[1.0; 8], &[1.0; 4]),
            sums("v", &[1.0; 5], &[1.0]),
        ]);
        let header = Header::parse(&bytes).unwrap();
        let tensors: Vec<_> = header
            .tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.dims.as_slice()))
            .collect();
        let expected: [(&str, &[u64]); 4] = [
            ("v.in_sum2", &[5]),
            ("v.counts", &[1]),
            ("w.in_sum2", &[2, 4]),
            ("w.counts", &[1, 4]),
        ];
        assert_eq!(tensors, expected);
        assert_eq!(bytes.len() % 32, 0);
    }
}
