//! A Hugging Face checkpoint read as the GGUF file it would become in its own float type.
//!
//! Enters: a folder. Leaves: tensors and rows under GGUF names. Writes nothing.

use std::collections::BTreeMap;
use std::path::Path;

use nemoconv_formats::GgmlType;
use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::packed::{Inputs, Scheme};

use super::{PackedMatrix, StoredTensor};
use crate::backend::activation::Activation;
use crate::convert::tile::{Scratch, Tile, interleaved_rows};
use crate::error::Result;
use crate::model::config::NemotronHConfig;
use crate::plan::file_type::FileType;
use crate::plan::sources::Piece;
use crate::plan::types::TypeSettings;
use crate::plan::widen::Widening;
use crate::plan::{Plan, PlannedTensor, Settings};

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
        let settings = Settings {
            types: match changes {
                true => TypeSettings::of(FileType::F32),
                false => TypeSettings::own(),
            },
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
                is_packed: scheme_of(tensor).is_some(),
                place,
                offset: 0,
            })
            .collect()
    }

    /// The shard of a matrix; the folder of what lies in several tensors or in none.
    pub fn file_of(&self, tensor: &StoredTensor, matrix: usize) -> &Path {
        let piece = self.plan.tensors[tensor.place].pieces.get(matrix);
        let shard = match piece {
            Some(Piece::Tensor { source, .. }) => {
                let entry = &self.checkpoint.tensors()[*source];
                self.checkpoint.shards().get(entry.shard)
            }
            _ => None,
        };
        shard.map_or(self.checkpoint.folder(), |shard| shard.path())
    }

    /// How a tensor is packed: the scheme of its first matrix.
    pub fn scheme(&self, tensor: &StoredTensor) -> Option<&Scheme> {
        scheme_of(&self.plan.tensors[tensor.place])
    }

    /// A matrix as a packed checkpoint has it; `None` where its rows are something else.
    pub fn packed_matrix(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
    ) -> Result<Option<PackedMatrix<'_>>> {
        let planned = &self.plan.tensors[tensor.place];
        let is_as_stored = planned.source == planned.stored && planned.factor == 1.0;
        let Piece::Packed(linear) = &planned.pieces[matrix] else {
            return Ok(None);
        };
        if !is_as_stored || planned.ty != GgmlType::F32 {
            return Ok(None);
        }
        Ok(Some(PackedMatrix {
            linear: linear.stored(&self.checkpoint)?,
            head_rows: interleaved_rows(planned).unwrap_or(0),
        }))
    }

    /// Bytes of a tensor in the checkpoint.
    pub fn stored_bytes(&self, tensor: &StoredTensor) -> u64 {
        let pieces = &self.plan.tensors[tensor.place].pieces;
        let of_piece = |piece: &Piece| match piece {
            Piece::Packed(linear) => linear.bytes(&self.checkpoint),
            Piece::Tensor { .. } | Piece::SecondScale(_) | Piece::Zeros => {
                tensor.bytes() / tensor.matrices.max(1) as u64
            }
        };
        pieces.iter().map(of_piece).sum()
    }

    /// How the configuration wants inputs taken, by GGUF name, where it wants them quantized in a way that is known.
    /// Matrices of a stack share the largest of their fixed scales, as runtimes have it.
    pub fn inputs(&self) -> Result<BTreeMap<String, Activation>> {
        let mut inputs = BTreeMap::new();
        for tensor in &self.plan.tensors {
            let mut largest = None;
            for piece in &tensor.pieces {
                let Piece::Packed(linear) = piece else {
                    continue;
                };
                if let Some(scale) = linear.input_scale(&self.checkpoint)? {
                    largest = Some(largest.map_or(scale, |largest: f32| largest.max(scale)));
                }
                let fixed = |of: fn(f32) -> Activation| largest.map(of);
                let activation = match linear.scheme().inputs {
                    Inputs::Int8PerToken => Some(Activation::TokenInt8),
                    Inputs::Int8PerTensor => fixed(Activation::StaticInt8),
                    Inputs::Float8PerToken => Some(Activation::TokenFloat8),
                    Inputs::Float8PerTensor => fixed(Activation::StaticFloat8),
                    Inputs::Float8PerGroup(group) => Some(Activation::GroupFloat8(group)),
                    Inputs::Nvfp4 => fixed(Activation::Nvfp4),
                    Inputs::AsTheyAre | Inputs::Other(_) => None,
                };
                if let Some(activation) = activation {
                    inputs.insert(tensor.name.clone(), activation);
                }
            }
        }
        Ok(inputs)
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

fn scheme_of(tensor: &PlannedTensor) -> Option<&Scheme> {
    tensor.pieces.iter().find_map(|piece| match piece {
        Piece::Packed(linear) => Some(linear.scheme()),
        Piece::Tensor { .. } | Piece::SecondScale(_) | Piece::Zeros => None,
    })
}
