//! A Hugging Face checkpoint read as the GGUF file it would become in its own float type.
//!
//! Enters: a folder. Leaves: tensors and rows under GGUF names. Writes nothing.

use std::path::Path;

use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::Checkpoint;

use super::StoredTensor;
use crate::convert::tile::{Scratch, Tile};
use crate::error::Result;
use crate::model::config::NemotronHConfig;
use crate::plan::file_type::FileType;
use crate::plan::types::TypeSettings;
use crate::plan::widen::Widening;
use crate::plan::{Plan, Settings};

/// An open checkpoint and the plan by which its rows are read.
#[derive(Debug)]
pub struct CheckpointStorage {
    checkpoint: Checkpoint,
    plan: Plan,
}

impl CheckpointStorage {
    /// `widen`: as the file it would become with every width rounded up to whole super-blocks.
    pub fn open(path: &Path, widen: bool) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let (_, config) = NemotronHConfig::open(&checkpoint)?;
        let changes = widen && Widening::to_super_blocks(&config, false)?.is_widened();
        // The factors of a widened stream leave no room in shorter floats.
        let file_type = match changes {
            true => FileType::F32,
            false => own_float_type(&checkpoint),
        };
        let settings = Settings {
            types: TypeSettings::of(file_type),
            widen,
            calibrated: false,
            with_mtp: false,
        };
        let plan = Plan::new(&checkpoint, config, &settings, None)?;
        Ok(Self { checkpoint, plan })
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Sizes of the network as its tensors have them.
    pub fn config(&self) -> NemotronHConfig {
        self.plan.widening.widened(&self.plan.config)
    }

    pub fn tensors(&self) -> Vec<StoredTensor> {
        let tensors = self.plan.tensors.iter().enumerate();
        tensors
            .map(|(place, tensor)| StoredTensor {
                name: tensor.name.clone(),
                ty: tensor.ty,
                matrices: tensor.pieces.len(),
                rows: tensor.dims.iter().skip(1).product::<u64>() as usize / tensor.pieces.len(),
                columns: tensor.dims[0] as usize,
                place,
                offset: 0,
            })
            .collect()
    }

    pub fn mapped_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        rows: usize,
    ) -> Option<&[u8]> {
        let planned = &self.plan.tensors[tensor.place];
        let tile = Tile::new(tensor.place, matrix, first_row, rows);
        let (entry, first) = tile.source_rows(&self.checkpoint, planned)?;
        let row_bytes = tensor.row_bytes();
        let bytes = self.checkpoint.bytes(entry);
        bytes.get(first * row_bytes..(first + rows) * row_bytes)
    }

    pub fn read_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        bytes: &mut [u8],
    ) -> Result<()> {
        let planned = &self.plan.tensors[tensor.place];
        // A plan lays vectors and small matrices out by its own extents; the rows here are those of the dimensions.
        let begin = first_row * tensor.row_bytes();
        let row_bytes = planned.row_bytes();
        let (first, last) = (begin / row_bytes, (begin + bytes.len()).div_ceil(row_bytes));
        let tile = Tile::new(tensor.place, matrix, first, last - first);
        let mut scratch = Scratch::default();
        let made = tile.make(&self.checkpoint, planned, &mut scratch)?;
        let skip = begin - first * row_bytes;
        bytes.copy_from_slice(&made.bytes[skip..skip + bytes.len()]);
        Ok(())
    }
}

/// The float type that holds every weight of the checkpoint exactly: F32 where it is mixed or scaled.
pub fn own_float_type(checkpoint: &Checkpoint) -> FileType {
    let matrices = checkpoint.tensors().iter().filter(|t| t.shape.len() >= 2);
    let mut types: Vec<Dtype> = matrices.map(|tensor| tensor.dtype).collect();
    types.dedup();
    match types.as_slice() {
        [Dtype::Bf16] => FileType::BF16,
        [Dtype::F16] => FileType::F16,
        _ => FileType::F32,
    }
}
