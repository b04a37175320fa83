//! A stored model after its rewrites.
//!
//! Enters: the stored model and its rewrites. Leaves: values of any tensor in f32, computed in f64 from the stored ones.
//! Memory holds the matrix that was asked for.

use std::sync::Arc;

use super::Rewrites;
use super::map::{AxisMap, StoredRows, apply};
use super::mixer::Mixer;
use super::table::{Change, Columns};
use crate::artifact::{MemoryTensor, StoredModel, StoredTensor};
use crate::error::{Error, Fault, Result};

/// Weights that are dequantized at once.
const TILE_WEIGHTS: usize = 1 << 20;

/// A model whose tensors are those of the stored one after the rewrites: the same names and shapes, the same function.
#[derive(Clone)]
pub struct RewrittenModel {
    stored: Arc<StoredModel>,
    rewrites: Arc<Rewrites>,
    mixer: Option<Arc<dyn Mixer>>,
}

impl RewrittenModel {
    /// The rewrites must be those of this model ([`Rewrites::check`]); if they are not, reading a tensor that they do not
    /// fit is an error.
    pub fn new(stored: Arc<StoredModel>, rewrites: Arc<Rewrites>) -> Self {
        Self {
            stored,
            rewrites,
            mixer: None,
        }
    }

    /// The same with rows and columns mixed by a machine, if there is one; the bits stay the same.
    pub fn mixed_by(self, mixer: Option<Arc<dyn Mixer>>) -> Self {
        Self { mixer, ..self }
    }

    /// The model before the rewrites.
    pub fn stored(&self) -> &Arc<StoredModel> {
        &self.stored
    }

    /// The rewrites.
    pub fn rewrites(&self) -> &Rewrites {
        &self.rewrites
    }

    /// All rows of one matrix of a tensor, `[rows, columns]`, row-major f32; a vector is one row. Runs in rayon's current
    /// pool.
    ///
    /// # Errors
    /// The model has no such matrix, a file cannot be read, a value is not finite, or the rewrites are not those of this
    /// model.
    pub fn matrix(&self, tensor: &str, matrix: usize) -> Result<Vec<f32>> {
        let rows = self.view().tensor(tensor)?.rows;
        self.rows(tensor, matrix, 0, rows)
    }

    /// Rows `first..first + count` of one matrix, `[count, columns]`. Where rows are not mixed with others (embedding,
    /// head, most readers) nothing but these rows is read. A rotation is laid out anew for every call: ask for hundreds of
    /// rows at a time.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn rows(
        &self,
        tensor: &str,
        matrix: usize,
        first: usize,
        count: usize,
    ) -> Result<Vec<f32>> {
        let wanted: Vec<usize> = (first..first.saturating_add(count)).collect();
        let rows = self
            .view()
            .rows(tensor, matrix, &wanted, |value| value as f32)?;
        self.check_finite(tensor, matrix, &rows)?;
        Ok(rows)
    }

    /// The whole tensor in memory, as F32.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn in_memory(&self, tensor: &str) -> Result<MemoryTensor> {
        let StoredTensor {
            name,
            matrices,
            rows,
            columns,
            ..
        } = self.view().tensor(tensor)?;
        let mut values = Vec::new();
        for matrix in 0..*matrices {
            values.append(&mut self.matrix(name, matrix)?);
        }
        let shape = [*matrices, *rows, *columns];
        Ok(MemoryTensor::of_f32(name.clone(), shape, &values))
    }

    /// What is not a number is said before the network computes with it.
    fn check_finite(&self, tensor: &str, matrix: usize, values: &[f32]) -> Result<()> {
        let odd = values.iter().filter(|value| !value.is_finite()).count();
        if odd == 0 {
            return Ok(());
        }
        let of = match self.view().tensor(tensor)?.matrices {
            1 => String::new(),
            _ => format!(" in matrix {matrix}"),
        };
        let weights = if odd == 1 {
            "weight that is"
        } else {
            "weights that are"
        };
        let fault = Fault::new(format!("has {odd} {weights} not finite{of}"));
        let file = self.stored.file_of(self.view().tensor(tensor)?, matrix);
        let hint =
            "a network cannot read samples with such weights; `nemoconv validate` lists them all";
        Err(Error::Weights(
            fault.in_tensor(tensor).in_file(file).hint(hint),
        ))
    }

    /// All tensors in memory: a model that can be run.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn materialize(&self) -> Result<StoredModel> {
        let tensors = self.stored.tensors().iter();
        let tensors: Result<Vec<_>> = tensors.map(|tensor| self.in_memory(&tensor.name)).collect();
        StoredModel::in_memory(self.stored.path(), self.stored.config().clone(), tensors?)
    }

    /// The same, borrowed.
    fn view(&self) -> Rewritten<'_> {
        Rewritten {
            stored: &self.stored,
            rewrites: &self.rewrites,
            mixer: self.mixer.as_deref(),
        }
    }
}

/// A model and rewrites of it, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Rewritten<'a> {
    /// The model before the rewrites.
    pub stored: &'a StoredModel,
    /// Rewrites of it.
    pub rewrites: &'a Rewrites,
    /// Who mixes rows and columns, if not this computer.
    pub mixer: Option<&'a dyn Mixer>,
}

impl<'a> Rewritten<'a> {
    /// Any rows of one matrix, converted by `of`.
    pub fn rows<T: Copy + Default + Send>(
        &self,
        name: &str,
        matrix: usize,
        wanted: &[usize],
        of: impl Fn(f64) -> T + Sync,
    ) -> Result<Vec<T>> {
        let tensor = self.tensor(name)?;
        let inside = wanted.iter().all(|row| *row < tensor.rows);
        if matrix >= tensor.matrices || !inside {
            return Err(self.fault("has no such rows", name));
        }
        match self.change(tensor, matrix) {
            Change::Nothing => {
                let none = AxisMap::default;
                self.mapped(tensor, matrix, wanted, none(), none(), of)
            }
            Change::Replaced(values) if values.len() == tensor.columns * tensor.rows => {
                let rows = wanted.iter();
                let rows = rows.flat_map(|row| &values[row * tensor.columns..][..tensor.columns]);
                Ok(rows.map(|value| of(*value)).collect())
            }
            Change::Replaced(_) => Err(self.fault("is not what the rewrites are for", name)),
            Change::Matrix { rows, columns } => {
                let columns = self.columns(columns)?;
                self.mapped(tensor, matrix, wanted, rows, columns, of)
            }
            Change::Vector(map) => self.vector(tensor, wanted, &map, of),
        }
    }

    /// The whole tensor in memory, as F32.
    pub fn in_memory(&self, tensor: &str) -> Result<MemoryTensor> {
        let tensor = self.tensor(tensor)?;
        let all: Vec<usize> = (0..tensor.rows).collect();
        let mut values = Vec::new();
        for matrix in 0..tensor.matrices {
            values.append(&mut self.rows(&tensor.name, matrix, &all, |value| value as f32)?);
        }
        let shape = [tensor.matrices, tensor.rows, tensor.columns];
        Ok(MemoryTensor::of_f32(tensor.name.clone(), shape, &values))
    }

    /// A tensor of the stored model.
    pub fn tensor(&self, name: &str) -> Result<&'a StoredTensor> {
        self.stored
            .tensor(name)
            .ok_or_else(|| self.fault("is missing", name))
    }

    fn change(&self, tensor: &StoredTensor, matrix: usize) -> Change<'a> {
        self.rewrites
            .change(self.stored.config(), &tensor.name, matrix)
    }

    /// The map of columns with the weight of the norm before it.
    fn columns(&self, columns: Columns<'a>) -> Result<AxisMap<'a>> {
        let (norm, map) = match columns {
            Columns::Mapped(map) => return Ok(map),
            Columns::Reader { norm, map } => (norm, map),
        };
        let tensor = self.tensor(&format!("{norm}.weight"))?;
        let weight = self.stored_rows(tensor, 0, &[0])?;
        Ok(AxisMap {
            before: Some(weight.into_iter().map(f64::from).collect()),
            ..map
        })
    }

    fn mapped<T: Copy + Default + Send>(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        wanted: &[usize],
        rows: AxisMap,
        columns: AxisMap,
        of: impl Fn(f64) -> T + Sync,
    ) -> Result<Vec<T>> {
        if !rows.fits(tensor.rows) || !columns.fits(tensor.columns) {
            return Err(self.fault("is not what the rewrites are for", &tensor.name));
        }
        let indices = rows.needed(wanted);
        let values = self.stored_rows(tensor, matrix, &indices)?;
        if rows.is_identity() && columns.is_identity() && indices == wanted {
            return Ok(values
                .into_iter()
                .map(|value| of(f64::from(value)))
                .collect());
        }
        let stored = StoredRows {
            indices,
            columns: tensor.columns,
            values: &values,
        };
        apply(self.mixer, &stored, wanted, &rows, &columns, of)
    }

    /// A vector, or a norm in groups, under a map of its elements.
    fn vector<T: Copy + Default + Send>(
        &self,
        tensor: &StoredTensor,
        wanted: &[usize],
        map: &AxisMap,
        of: impl Fn(f64) -> T + Sync,
    ) -> Result<Vec<T>> {
        let len = tensor.rows * tensor.columns;
        if !map.fits(len) {
            return Err(self.fault("is not what the rewrites are for", &tensor.name));
        }
        let all: Vec<usize> = (0..tensor.rows).collect();
        let stored = StoredRows {
            indices: (0..len).collect(),
            columns: 1,
            values: &self.stored_rows(tensor, 0, &all)?,
        };
        let rows = wanted.iter();
        let elements: Vec<usize> = rows
            .flat_map(|row| row * tensor.columns..(row + 1) * tensor.columns)
            .collect();
        let columns = AxisMap::default();
        apply(self.mixer, &stored, &elements, map, &columns, of)
    }

    /// Stored rows as f32, `[indices, columns]`.
    pub fn stored_rows(
        &self,
        tensor: &StoredTensor,
        matrix: usize,
        indices: &[usize],
    ) -> Result<Vec<f32>> {
        let mut values = vec![0.0; indices.len() * tensor.columns];
        let mut bytes = Vec::new();
        let at_once = (TILE_WEIGHTS / tensor.columns.max(1)).max(1);
        let mut rest = &mut values[..];
        for run in indices.chunk_by(|a, b| a + 1 == *b) {
            for part in run.chunks(at_once) {
                let (tile, after) = rest.split_at_mut(part.len() * tensor.columns);
                self.stored
                    .dequantize_rows(tensor, matrix, part[0], &mut bytes, tile)?;
                rest = after;
            }
        }
        Ok(values)
    }

    fn fault(&self, what: &str, tensor: &str) -> Error {
        Error::Model(
            Fault::new(what)
                .in_tensor(tensor)
                .in_file(self.stored.path()),
        )
    }
}
