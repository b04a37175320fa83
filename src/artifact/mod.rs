//! A stored model, whatever its container: a Hugging Face checkpoint or a GGUF file seen as one list of tensors.
//!
//! Enters: a path or hub id, or tensors in memory. Leaves: [`StoredModel`], sizes and tensors under GGUF names, rows as stored bytes or as
//! f32. A checkpoint is read as the GGUF file it would become in its own float types, packed weights as F32, so that
//! everything downstream knows one naming and one layout. Computes nothing.

mod checkpoint;
pub(crate) mod gguf;
pub(crate) mod gguf_config;
mod memory;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use nemoconv_formats::checkpoint::{Checkpoint, resolve_hub_id};
use nemoconv_formats::gguf::{Gguf, Metadata};
use nemoconv_formats::packed::{Inputs, Scheme, StoredLinear};
use nemoconv_formats::{GgmlType, block};

use crate::backend::activation::Activation;
use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{Presence, SECOND_SCALE, Widths, expected_tensors};
use checkpoint::CheckpointStorage;
use gguf::GgufStorage;
use memory::MemoryStorage;

pub use gguf::open_parts;
pub use memory::MemoryTensor;

/// A matrix as a packed checkpoint has it.
#[derive(Debug, Clone)]
pub struct PackedMatrix<'a> {
    /// Codes and scales in the order of the checkpoint's rows.
    pub linear: StoredLinear<'a>,
    /// Rows of a head whose halves are interleaved under GGUF names; 0 where rows have the checkpoint's order.
    pub head_rows: usize,
}

/// A tensor as it is stored: one matrix `[rows, columns]`, or a stack of them, one per expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// GGUF name, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// Stored type.
    pub ty: GgmlType,
    /// Matrices in the stack; 1 for everything but routed experts.
    pub matrices: usize,
    /// `out_features` of one matrix.
    pub rows: usize,
    /// `in_features`: the row length.
    pub columns: usize,
    /// Whether the rows are decoded from codes and scales of a packed checkpoint; then `ty` is what they are decoded to.
    pub is_packed: bool,
    /// Which file of the container, or which tensor of the plan.
    place: usize,
    /// Bytes from the start of that file.
    offset: u64,
}

impl StoredTensor {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.columns / self.ty.block_elements() * self.ty.block_bytes()
    }

    /// Bytes of the whole stack.
    pub fn bytes(&self) -> u64 {
        (self.row_bytes() * self.rows) as u64 * self.matrices as u64
    }

    /// Weights of the whole stack.
    pub fn weights(&self) -> u64 {
        (self.rows * self.columns) as u64 * self.matrices as u64
    }
}

/// The container a model is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// A Hugging Face folder or safetensors file.
    Checkpoint,
    /// GGUF, in one file or in parts.
    Gguf,
    /// Memory: computed by this program. Its numerics are those of a checkpoint.
    Memory,
}

#[derive(Debug)]
enum Storage {
    Checkpoint(Box<CheckpointStorage>),
    Gguf(GgufStorage),
    Memory(MemoryStorage),
}

/// A model that can be read: headers checked against the architecture, weights untouched.
#[derive(Debug)]
pub struct StoredModel {
    path: PathBuf,
    config: NemotronHConfig,
    tensors: Vec<StoredTensor>,
    by_name: HashMap<String, usize>,
    /// How a packed checkpoint wants the inputs of its tensors taken.
    inputs: BTreeMap<String, Activation>,
    /// Of NVFP4 tensors in GGUF: the scale above the scales of each matrix.
    second_scales: BTreeMap<String, Vec<f32>>,
    storage: Storage,
}

impl StoredModel {
    /// Opens a model folder, a safetensors file, a GGUF file (the first part of a split one) or `org/name` in the hub's
    /// cache.
    ///
    /// # Errors
    /// The file is corrupt or truncated, is not a Nemotron-H model, or lacks a tensor or has one of a wrong shape.
    pub fn open(model: &str) -> Result<Self> {
        let path = locate(model)?;
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            Self::open_gguf(&path)
        } else {
            Self::open_checkpoint(&path, false)
        }
    }

    /// Opens a checkpoint as the file it would become with every width rounded up to whole super-blocks of 256: the same
    /// function with larger sizes, in F32 where any width changes.
    ///
    /// # Errors
    /// As [`Self::open`]; a GGUF file cannot be widened.
    pub fn open_widened(model: &str) -> Result<Self> {
        let path = locate(model)?;
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            let fault = Fault::new("a GGUF file cannot be widened").in_file(path);
            return Err(Error::Plan(
                fault.hint("name the checkpoint that it was made from"),
            ));
        }
        Self::open_checkpoint(&path, true)
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let storage = GgufStorage::open(path)?;
        let tensors = storage.tensors();
        let config = gguf_config::parse(storage.metadata(), &tensors)
            .map_err(|fault| Error::Model(fault.in_file(path)))?;
        let model = Self::new(path, config, tensors, Storage::Gguf(storage))?;
        let second_scales = model.read_second_scales()?;
        Ok(Self {
            second_scales,
            ..model
        })
    }

    /// `NAME.scale` beside `NAME.weight`, one value per matrix.
    fn read_second_scales(&self) -> Result<BTreeMap<String, Vec<f32>>> {
        let mut scales = BTreeMap::new();
        for tensor in self.tensors.iter().filter(|t| t.ty == GgmlType::NVFP4) {
            let stem = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
            let name = format!("{stem}.{}", SECOND_SCALE.name);
            let Some(scale) = self.tensor(&name) else {
                continue;
            };
            if scale.weights() != tensor.matrices as u64 || scale.ty != GgmlType::F32 {
                let what = format!("must be {} values of F32", tensor.matrices);
                return Err(self.fault(what, &name));
            }
            let mut values = vec![0.0; tensor.matrices];
            self.dequantize_rows(scale, 0, 0, &mut Vec::new(), &mut values)?;
            scales.insert(tensor.name.clone(), values);
        }
        Ok(scales)
    }

    fn open_checkpoint(path: &Path, widen: bool) -> Result<Self> {
        let storage = CheckpointStorage::open(path, widen)?;
        let tensors = storage.tensors();
        let config = storage.config();
        let inputs = storage.inputs()?;
        let storage = Storage::Checkpoint(Box::new(storage));
        let model = Self::new(path, config, tensors, storage)?;
        Ok(Self { inputs, ..model })
    }

    /// A model of tensors in memory, which may be a part of one: not every tensor of the architecture has to be there.
    /// `path` is what errors name: where the values come from.
    ///
    /// # Errors
    /// The bytes of a tensor are not those of its shape.
    pub fn in_memory(
        path: &Path,
        config: NemotronHConfig,
        tensors: Vec<MemoryTensor>,
    ) -> Result<Self> {
        let storage =
            MemoryStorage::new(tensors).map_err(|fault| Error::Model(fault.in_file(path)))?;
        let tensors = storage.tensors();
        let storage = Storage::Memory(storage);
        Ok(Self::unchecked(path, config, tensors, storage))
    }

    fn new(
        path: &Path,
        config: NemotronHConfig,
        tensors: Vec<StoredTensor>,
        storage: Storage,
    ) -> Result<Self> {
        let model = Self::unchecked(path, config, tensors, storage);
        model.check_tensors()?;
        Ok(model)
    }

    fn unchecked(
        path: &Path,
        config: NemotronHConfig,
        tensors: Vec<StoredTensor>,
        storage: Storage,
    ) -> Self {
        let names = tensors.iter().enumerate();
        let by_name = names.map(|(index, t)| (t.name.clone(), index)).collect();
        Self {
            path: path.to_owned(),
            config,
            tensors,
            by_name,
            inputs: BTreeMap::new(),
            second_scales: BTreeMap::new(),
            storage,
        }
    }

    /// Where the model was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds a matrix, as far as it is one.
    pub fn file_of(&self, tensor: &StoredTensor, matrix: usize) -> &Path {
        match &self.storage {
            Storage::Checkpoint(storage) => storage.file_of(tensor, matrix),
            Storage::Gguf(_) | Storage::Memory(_) => &self.path,
        }
    }

    /// What it is stored in.
    pub fn container(&self) -> Container {
        match self.storage {
            Storage::Checkpoint(_) => Container::Checkpoint,
            Storage::Gguf(_) => Container::Gguf,
            Storage::Memory(_) => Container::Memory,
        }
    }

    /// Sizes of the network, as stored (a widened file has its widened sizes).
    pub fn config(&self) -> &NemotronHConfig {
        &self.config
    }

    /// Tensors in file order.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// The tensor of a GGUF name.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// Keys of a GGUF file.
    pub fn metadata(&self) -> Option<&Metadata> {
        match &self.storage {
            Storage::Gguf(storage) => Some(storage.metadata()),
            Storage::Checkpoint(_) | Storage::Memory(_) => None,
        }
    }

    /// The files of a GGUF model, the first part first.
    pub fn parts(&self) -> &[Gguf] {
        match &self.storage {
            Storage::Gguf(storage) => storage.parts(),
            Storage::Checkpoint(_) | Storage::Memory(_) => &[],
        }
    }

    /// The Hugging Face checkpoint, if it is one.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.storage {
            Storage::Checkpoint(storage) => Some(storage.checkpoint()),
            Storage::Gguf(_) | Storage::Memory(_) => None,
        }
    }

    /// What the configuration of a packed checkpoint declares of inputs beyond what [`Activation`] knows.
    pub fn inputs_not_followed(&self) -> Option<&str> {
        self.tensors
            .iter()
            .find_map(|tensor| match &self.scheme(tensor)?.inputs {
                Inputs::Other(what) => Some(what.as_str()),
                _ => None,
            })
    }

    /// Bytes of all tensors in their files.
    pub fn weight_bytes(&self) -> u64 {
        let tensors = self.tensors.iter();
        tensors.map(|tensor| self.stored_bytes(tensor)).sum()
    }

    /// Bytes of all tensors in the types they are read in: of packed ones more than their files hold.
    pub fn decoded_bytes(&self) -> u64 {
        self.tensors.iter().map(StoredTensor::bytes).sum()
    }

    /// What a tensor is stored as, in words.
    pub fn stored_as(&self, tensor: &StoredTensor) -> String {
        match self.scheme(tensor) {
            Some(scheme) => format!("{scheme:#}"),
            None => tensor.ty.name().to_owned(),
        }
    }

    /// Bytes of a tensor in its files: of a packed one those of codes and scales.
    pub fn stored_bytes(&self, tensor: &StoredTensor) -> u64 {
        match &self.storage {
            Storage::Checkpoint(storage) => storage.stored_bytes(tensor),
            Storage::Gguf(_) | Storage::Memory(_) => tensor.bytes(),
        }
    }

    /// How a tensor is packed; `None` for what is stored as it is read.
    pub fn scheme(&self, tensor: &StoredTensor) -> Option<&Scheme> {
        match &self.storage {
            Storage::Checkpoint(storage) => storage.scheme(tensor),
            Storage::Gguf(_) | Storage::Memory(_) => None,
        }
    }

    /// What rows of a matrix are decoded from, where a packed checkpoint holds it.
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub fn packed_matrix(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
    ) -> Result<Option<PackedMatrix<'_>>> {
        match &self.storage {
            Storage::Checkpoint(storage) => storage.packed_matrix(tensor, matrix),
            Storage::Gguf(_) | Storage::Memory(_) => Ok(None),
        }
    }

    /// How a packed checkpoint declares that the inputs of its tensors are taken, by GGUF name; empty where they stay as
    /// they are.
    pub fn declared_inputs(&self) -> &BTreeMap<String, Activation> {
        &self.inputs
    }

    /// Rows of one matrix where they lie in the file, if the file holds them as they are.
    ///
    /// Touching them makes them resident; [`Self::read_rows`] does not.
    pub fn mapped_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        rows: usize,
    ) -> Option<&[u8]> {
        match &self.storage {
            Storage::Checkpoint(storage) => storage.mapped_rows(tensor, matrix, first_row, rows),
            Storage::Gguf(storage) => storage.mapped_rows(tensor, matrix, first_row, rows),
            Storage::Memory(storage) => storage.rows(tensor, matrix, first_row, rows),
        }
    }

    /// Fills `bytes` with whole rows of one matrix from `first_row` on, in the stored type; see [`Self::second_scale`].
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        bytes: &mut [u8],
    ) -> Result<()> {
        match &self.storage {
            Storage::Checkpoint(storage) => storage.read_rows(tensor, matrix, first_row, bytes),
            Storage::Gguf(storage) => storage.read_rows(tensor, matrix, first_row, bytes),
            Storage::Memory(storage) => {
                let rows = bytes.len() / tensor.row_bytes().max(1);
                let stored = storage.rows(tensor, matrix, first_row, rows);
                let stored = stored.ok_or_else(|| self.fault("has no such rows", &tensor.name))?;
                bytes.copy_from_slice(stored);
                Ok(())
            }
        }
    }

    /// Fills `values` with dequantized rows of one matrix from `first_row` on; `bytes` is the caller's buffer.
    ///
    /// # Errors
    /// The file cannot be read, or the type cannot be decoded.
    pub fn dequantize_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        first_row: usize,
        bytes: &mut Vec<u8>,
        values: &mut [f32],
    ) -> Result<()> {
        bytes.resize(values.len() / tensor.columns * tensor.row_bytes(), 0);
        self.read_rows(tensor, matrix, first_row, bytes)?;
        block::dequantize(tensor.ty, bytes, values)
            .map_err(|error| error.in_tensor(&tensor.name).in_file(&self.path))?;
        if let Some(scale) = self.second_scale(tensor, matrix) {
            values.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(())
    }

    /// What every decoded value of a matrix is multiplied with beyond its blocks: NVFP4 in GGUF has such a scale.
    pub fn second_scale(&self, tensor: &StoredTensor, matrix: usize) -> Option<f32> {
        self.second_scales.get(&tensor.name)?.get(matrix).copied()
    }

    /// Where a row begins in the file that holds it; `None` for a checkpoint, whose rows are made, and in memory.
    pub fn file_offset(&self, tensor: &StoredTensor, matrix: usize, row: usize) -> Option<u64> {
        match self.storage {
            Storage::Checkpoint(_) | Storage::Memory(_) => None,
            Storage::Gguf(_) => Some(gguf::row_offset(tensor, matrix, row)),
        }
    }

    /// Every tensor that the architecture requires is there, with its shape.
    fn check_tensors(&self) -> Result<()> {
        let widths = Widths::of(&self.config);
        for expected in expected_tensors(&self.config, false) {
            let Some(tensor) = self.tensor(&expected.name) else {
                if expected.rule.presence == Presence::Required {
                    return Err(self.fault("is missing", &expected.name));
                }
                continue;
            };
            let dims = expected.rule.reshape.unwrap_or(expected.rule.shape);
            let sizes: Vec<_> = dims
                .iter()
                .map(|dim| dim.size(&self.config, &widths))
                .collect();
            let (columns, rows) = match sizes.split_last() {
                Some((columns, rest)) if sizes.len() > 1 => (*columns, rest.iter().product()),
                _ => (sizes.iter().product(), 1),
            };
            let matrices = expected.sources.len();
            let found = [tensor.matrices, tensor.rows, tensor.columns];
            if found != [matrices, rows, columns] {
                let what =
                    format!("has shape {found:?}, the sizes imply [{matrices}, {rows}, {columns}]");
                return Err(self.fault(what, &expected.name));
            }
        }
        Ok(())
    }

    fn fault(&self, what: impl Into<String>, tensor: &str) -> Error {
        Error::Model(Fault::new(what).in_tensor(tensor).in_file(&self.path))
    }
}

/// A path, or where the hub's cache holds `org/name[@revision]`.
///
/// # Errors
/// The cache does not hold it.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    let hub_id = !path.exists() && model.split('/').count() == 2 && !model.starts_with(['.', '/']);
    Ok(if hub_id && !model.ends_with(".gguf") {
        resolve_hub_id(model)?
    } else {
        path.to_path_buf()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_reads_as_its_gguf_tensors() {
        let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
        assert_eq!(model.container(), Container::Checkpoint);
        let tensor = model.tensor("blk.0.ssm_in.weight").unwrap();
        assert_eq!((tensor.ty, tensor.columns), (GgmlType::BF16, 256));
        let mut rows = vec![0; 2 * tensor.row_bytes()];
        model.read_rows(tensor, 0, 3, &mut rows).unwrap();
        assert_eq!(model.mapped_rows(tensor, 0, 3, 2).unwrap(), rows);
        let a = model.tensor("blk.0.ssm_a").unwrap();
        let mut values = vec![0.0; a.rows];
        model
            .dequantize_rows(a, 0, 0, &mut Vec::new(), &mut values)
            .unwrap();
        assert!(values.iter().all(|a| *a < 0.0), "{values:?}");
    }

    #[test]
    fn a_part_of_a_model_in_memory_reads_as_it_was_given() {
        let nano = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
        let stack = MemoryTensor::of_f32("stack", [2, 1, 2], &[1.0, 2.0, 3.0, 4.0]);
        let in_memory = |tensor: MemoryTensor| {
            StoredModel::in_memory(nano.path(), nano.config().clone(), vec![tensor])
        };
        let model = in_memory(stack.clone()).unwrap();
        assert_eq!(model.container(), Container::Memory);
        let tensor = model.tensor("stack").unwrap();
        let mut values = [0.0; 2];
        model
            .dequantize_rows(tensor, 1, 0, &mut Vec::new(), &mut values)
            .unwrap();
        assert_eq!(values, [3.0, 4.0]);
        assert_eq!(model.mapped_rows(tensor, 0, 0, 1).unwrap().len(), 8);
        assert_eq!(model.mapped_rows(tensor, 1, 1, 1), None);
        let short = MemoryTensor { rows: 2, ..stack };
        let error = in_memory(short).unwrap_err().to_string();
        assert!(error.contains("`stack`: 16 bytes are not F32"), "{error}");
    }

    #[test]
    fn what_is_no_model_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("absent.gguf");
        let error = StoredModel::open(path.to_str().unwrap()).unwrap_err();
        assert_eq!(error.place().unwrap().path, Some(path));
    }
}
