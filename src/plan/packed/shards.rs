//! Which tensor lies in which shard, and where.
//!
//! Enters: tensors in checkpoint order. Leaves: shards filled one after the other, each sorted as the format's own writers
//! sort: types of larger rank first, then names. So data is aligned without gaps.
//!
//! Source: safetensors 0.8, `serialize`; huggingface_hub, shard names and the index.

use std::cmp::Reverse;

use nemoconv_formats::Dtype;

use super::PackedTensor;
use crate::write::tensor_file::{NewTensor, header_bytes};

/// One shard.
#[derive(Debug, Clone)]
pub struct ShardLayout {
    /// Its name in the folder.
    pub name: String,
    /// Index into the folder's tensors and offset from the start of the file, in order of offsets.
    pub slots: Vec<(usize, u64)>,
    /// Length field, JSON and padding.
    pub header: Vec<u8>,
    /// Bytes of its tensors.
    pub tensor_bytes: u64,
}

impl ShardLayout {
    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensor_bytes
    }
}

/// Fills shards of at most `most` bytes; a larger tensor has a shard of its own.
pub fn shards(tensors: &[PackedTensor], most: u64) -> Vec<ShardLayout> {
    let mut groups: Vec<Vec<usize>> = vec![Vec::new()];
    let mut filled = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let full = filled + tensor.bytes() > most;
        if let (true, Some(false)) = (full, groups.last().map(Vec::is_empty)) {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += tensor.bytes();
        groups
            .last_mut()
            .expect("there is one from the start")
            .push(index);
    }
    let count = groups.len();
    let named = groups.into_iter().enumerate().map(|(number, group)| {
        let name = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        layout(name, group, tensors)
    });
    named.collect()
}

fn layout(name: String, mut group: Vec<usize>, tensors: &[PackedTensor]) -> ShardLayout {
    group.sort_by_key(|index| (Reverse(rank(tensors[*index].dtype)), &tensors[*index].name));
    let entries: Vec<NewTensor> = group
        .iter()
        .map(|index| NewTensor {
            name: tensors[*index].name.clone(),
            dtype: tensors[*index].dtype,
            shape: tensors[*index].shape.clone(),
        })
        .collect();
    // Older readers refuse a file without it.
    let header = header_bytes(&[("format", "pt".to_string())].into(), &entries);
    let mut offset = header.len() as u64;
    let slots = group.iter().map(|index| {
        let slot = (*index, offset);
        offset += tensors[*index].bytes();
        slot
    });
    let slots: Vec<_> = slots.collect();
    ShardLayout {
        name,
        slots,
        tensor_bytes: offset - header.len() as u64,
        header,
    }
}

/// The order of types in the format's own writers, the last of it first in a file.
fn rank(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::U8 => 0,
        Dtype::I8 => 1,
        Dtype::F8E4M3 => 2,
        Dtype::I16 => 3,
        Dtype::F16 => 4,
        Dtype::Bf16 => 5,
        Dtype::I32 => 6,
        Dtype::F32 => 7,
        Dtype::F64 => 8,
        Dtype::I64 => 9,
        _ => 0,
    }
}
