//! GGUF files with one thing wrong.

use std::path::Path;

use nemoconv::formats::gguf::{Gguf, Layout, Metadata, NewTensor};

/// A GGUF file in memory, to be changed and written again.
pub struct Editable {
    pub metadata: Metadata,
    pub tensors: Vec<(NewTensor, Vec<u8>)>,
}

impl Editable {
    pub fn read(path: &Path) -> Self {
        let gguf = Gguf::open(path).unwrap();
        let tensors = gguf.header().tensors.iter().map(|tensor| {
            let new = NewTensor {
                name: tensor.name.clone(),
                dims: tensor.dims.clone(),
                ty: tensor.ty,
            };
            (new, gguf.tensor_bytes(tensor).to_vec())
        });
        Self {
            metadata: gguf.header().metadata.clone(),
            tensors: tensors.collect(),
        }
    }

    pub fn tensor(&mut self, name: &str) -> (&mut NewTensor, &mut Vec<u8>) {
        let found = self
            .tensors
            .iter_mut()
            .find(|(tensor, _)| tensor.name == name);
        let (tensor, bytes) = found.unwrap();
        (tensor, bytes)
    }

    /// Bytes of one row.
    pub fn row_bytes(&mut self, name: &str) -> usize {
        let (tensor, _) = self.tensor(name);
        tensor.ty.bytes_for(tensor.dims[0]).unwrap() as usize
    }

    /// Rows `a..a + count` and `b..b + count` change places.
    pub fn swap_rows(&mut self, name: &str, a: usize, b: usize, count: usize) {
        let row = self.row_bytes(name);
        let (_, bytes) = self.tensor(name);
        let (low, high) = bytes.split_at_mut(b * row);
        low[a * row..(a + count) * row].swap_with_slice(&mut high[..count * row]);
    }

    pub fn write(self, path: &Path) {
        let tensors = self
            .tensors
            .iter()
            .map(|(tensor, _)| tensor.clone())
            .collect();
        let layout = Layout::new(self.metadata, tensors).unwrap();
        let mut file = layout.header_bytes().to_vec();
        for (index, (_, bytes)) in self.tensors.iter().enumerate() {
            file.resize(layout.tensor_offset(index) as usize, 0);
            file.extend_from_slice(bytes);
        }
        file.resize(layout.file_bytes() as usize, 0);
        std::fs::write(path, file).unwrap();
    }
}

/// Where the header keeps the data offset of a tensor.
pub fn offset_field(file: &[u8], name: &str, dims: usize) -> usize {
    let mut info = (name.len() as u64).to_le_bytes().to_vec();
    info.extend_from_slice(name.as_bytes());
    let at = file.windows(info.len()).position(|bytes| bytes == info);
    at.unwrap() + info.len() + 4 + 8 * dims + 4
}
