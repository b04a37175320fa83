//! One packed linear of a checkpoint: its tensors found and checked, its rows read.
//!
//! Enters: a checkpoint, a module's name, its scheme and size. Leaves: codes with their scales, or exact f32 values, any
//! rows at a time. Only the bytes of those rows are read.

mod rows;
mod stored;

use super::layout::{FLOAT8_BLOCK, Role, TensorSpec};
use super::scheme::{Group, Inputs, Layout, Nvfp4Names, Scheme};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::{Dtype, Error, Result, float};
use rows::Reader;
pub use stored::{FloatCodes, IntegerCodes, StoredFloats, StoredIntegers, StoredLinear};

/// A packed weight `[rows, columns]`, which is `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub struct PackedLinear {
    module: String,
    rows: usize,
    columns: usize,
    scheme: Scheme,
    /// Position in [`Checkpoint::tensors`] of what is there.
    parts: Vec<(Role, usize)>,
    grid: Grid,
}

/// Which scale belongs to which weight.
#[derive(Debug, Clone, Copy)]
struct Grid {
    /// Scales per row of scales.
    columns: usize,
    /// Weight rows that share a row of scales.
    block_rows: usize,
    /// Weight columns that share a scale.
    block_columns: usize,
}

/// Buffers that a caller keeps, and what [`PackedLinear::read_codes`] leaves in them.
#[derive(Debug, Default)]
pub struct RowBuffers {
    /// `[rows, columns]`: signed codes of integers; bytes of F8_E4M3; E2M1 codes from 0 to 15 for
    /// NVFP4.
    pub codes: Vec<i8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]` in the terms of signed codes; empty where the layout has none.
    pub zeros: Vec<f32>,
    bytes: Vec<u8>,
    wide: Vec<f32>,
    narrow: Vec<i8>,
}

impl PackedLinear {
    /// Finds the tensors of `module`, a name as the checkpoint spells it.
    ///
    /// # Errors
    /// A tensor that is missing or has another type or shape than the scheme implies, a `weight_shape` of another size,
    /// columns in another order than they are stored; with file, tensor and offset.
    pub fn resolve(
        checkpoint: &Checkpoint,
        module: &str,
        scheme: &Scheme,
        rows: usize,
        columns: usize,
    ) -> Result<Self> {
        let specs = scheme
            .tensors(rows, columns)
            .map_err(|e| e.in_tensor(module).in_file(checkpoint.folder()))?;
        let mut parts = Vec::new();
        for spec in &specs {
            match checkpoint.position(&format!("{module}.{}", spec.suffix)) {
                Some(position) => {
                    check(checkpoint, position, spec)?;
                    parts.push((spec.role, position));
                }
                None if spec.required => return Err(missing(checkpoint, module, spec, scheme)),
                None => {}
            }
        }
        let mut linear = Self {
            module: module.to_owned(),
            rows,
            columns,
            scheme: scheme.clone(),
            parts,
            grid: Grid::of_group(scheme.layout.group(), rows, columns),
        };
        if scheme.layout.group().is_none() {
            linear.grid =
                Grid::of_shape(&linear.entry(checkpoint, Role::Scale)?.shape, rows, columns);
        }
        linear.check_shape(checkpoint)?;
        linear.check_order(checkpoint)?;
        Ok(linear)
    }

    /// The module, spelled as in the checkpoint.
    pub fn module(&self) -> &str {
        &self.module
    }

    /// `out_features`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `in_features`.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How it is stored.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// Positions in [`Checkpoint::tensors`] of every tensor it is made of.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().map(|(_, position)| *position)
    }

    /// Bytes of all its tensors.
    pub fn bytes(&self, checkpoint: &Checkpoint) -> u64 {
        let tensors = checkpoint.tensors();
        let entries = self
            .positions()
            .filter_map(|position| tensors.get(position));
        entries
            .map(|entry| entry.bytes)
            .fold(0, u64::saturating_add)
    }

    /// The scale above all scales of NVFP4, a factor; 1 in other layouts.
    ///
    /// # Errors
    /// The tensor cannot be read.
    pub fn second_scale(&self, checkpoint: &Checkpoint) -> Result<SecondScale> {
        let Some(scale) = self.scalar(checkpoint, Role::SecondScale)? else {
            return Ok(SecondScale::Factor(1.0));
        };
        Ok(match self.scheme.layout {
            Layout::Nvfp4(Nvfp4Names::CompressedTensors) => SecondScale::Divisor(scale),
            _ => SecondScale::Factor(scale),
        })
    }

    /// The fixed scale of the inputs, a factor, where the scheme has one.
    ///
    /// # Errors
    /// The tensor cannot be read.
    pub fn input_scale(&self, checkpoint: &Checkpoint) -> Result<Option<f32>> {
        match self.scheme.inputs {
            Inputs::Int8PerTensor | Inputs::Float8PerTensor | Inputs::Nvfp4 => {
                let scale = self.scalar(checkpoint, Role::InputScale)?;
                let divides = matches!(
                    self.scheme.layout,
                    Layout::Nvfp4(Nvfp4Names::CompressedTensors)
                );
                Ok(scale.map(|scale| if divides { 1.0 / scale } else { scale }))
            }
            _ => Ok(None),
        }
    }

    /// Fills `buffers` with codes, scales and zero points of `rows` rows from `first_row` on.
    ///
    /// # Errors
    /// There are no such rows, or the checkpoint cannot be read.
    pub fn read_codes(
        &self,
        checkpoint: &Checkpoint,
        first_row: usize,
        rows: usize,
        buffers: &mut RowBuffers,
    ) -> Result<()> {
        let end = first_row.saturating_add(rows);
        if end > self.rows {
            let what = format!("has {} rows, rows up to {end} were asked for", self.rows);
            return Err(Error::malformed(what).in_tensor(&self.module));
        }
        let reader = Reader {
            linear: self,
            checkpoint,
            first_row,
            rows,
        };
        reader.codes(buffers)?;
        reader.scales(buffers)?;
        reader.zeros(buffers)
    }

    /// Fills `values` with whole rows from `first_row` on: `(code - zero) * scale` in f32, for NVFP4 the product of value
    /// and scale, which is exact, times or through the second scale.
    ///
    /// # Errors
    /// `values` holds no whole rows, there are no such rows, or the checkpoint cannot be read.
    pub fn dequantize(
        &self,
        checkpoint: &Checkpoint,
        first_row: usize,
        buffers: &mut RowBuffers,
        values: &mut [f32],
    ) -> Result<()> {
        let rows = values.len().checked_div(self.columns).unwrap_or_default();
        if rows.checked_mul(self.columns) != Some(values.len()) {
            let (found, columns) = (values.len(), self.columns);
            let what = format!("{found} values are no rows of {columns}");
            return Err(Error::malformed(what).in_tensor(&self.module));
        }
        self.read_codes(checkpoint, first_row, rows, buffers)?;
        self.fill(buffers, values)?;
        match self.second_scale(checkpoint)? {
            SecondScale::Factor(1.0) => {}
            SecondScale::Factor(factor) => values.iter_mut().for_each(|value| *value *= factor),
            SecondScale::Divisor(divisor) => values.iter_mut().for_each(|value| *value /= divisor),
        }
        Ok(())
    }

    /// Values of the codes with zero points and scales applied.
    fn fill(&self, buffers: &RowBuffers, values: &mut [f32]) -> Result<()> {
        let codes = &buffers.codes;
        match self.scheme.layout {
            Layout::Float8 { .. } => float::to_f32(Dtype::F8E4M3, &buffers.bytes, values)?,
            Layout::Nvfp4(_) => {
                for (value, code) in values.iter_mut().zip(codes) {
                    *value = e2m1(code.cast_unsigned());
                }
            }
            _ => values
                .iter_mut()
                .zip(codes)
                .for_each(|(value, code)| *value = f32::from(*code)),
        }
        let of_row = self.grid.columns.max(1);
        let block = self.grid.block_columns.max(1);
        // `chunks` wants no length of 0.
        let row = self.columns.max(1);
        if !buffers.zeros.is_empty() {
            for (values, zeros) in values.chunks_mut(row).zip(buffers.zeros.chunks(of_row)) {
                for (values, zero) in values.chunks_mut(block).zip(zeros) {
                    values.iter_mut().for_each(|value| *value -= zero);
                }
            }
        }
        for (values, scales) in values.chunks_mut(row).zip(buffers.scales.chunks(of_row)) {
            for (values, scale) in values.chunks_mut(block).zip(scales) {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
        Ok(())
    }

    fn position(&self, role: Role) -> Option<usize> {
        let part = self.parts.iter().find(|(found, _)| *found == role)?;
        Some(part.1)
    }

    fn entry<'a>(&self, checkpoint: &'a Checkpoint, role: Role) -> Result<&'a TensorEntry> {
        let entry = self
            .position(role)
            .and_then(|at| checkpoint.tensors().get(at));
        entry.ok_or_else(|| {
            Error::missing("is a packed linear of another checkpoint").in_tensor(&self.module)
        })
    }

    fn scalar(&self, checkpoint: &Checkpoint, role: Role) -> Result<Option<f32>> {
        if self.position(role).is_none() {
            return Ok(None);
        }
        let entry = self.entry(checkpoint, role)?;
        let mut value = [0.0];
        float::to_f32(entry.dtype, checkpoint.bytes(entry), &mut value)
            .map_err(|e| e.in_tensor(&entry.name))?;
        let [value] = value;
        Ok(Some(value))
    }

    /// `weight_shape` must say what the model's sizes imply: packed rows end in filling that only it tells from codes.
    fn check_shape(&self, checkpoint: &Checkpoint) -> Result<()> {
        if self.position(Role::Shape).is_none() {
            return Ok(());
        }
        let entry = self.entry(checkpoint, Role::Shape)?;
        let found: Vec<i64> = checkpoint
            .bytes(entry)
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect();
        let expected = [self.rows, self.columns];
        match found
            .iter()
            .copied()
            .map(usize::try_from)
            .eq(expected.map(Ok))
        {
            true => Ok(()),
            false => Err(at(
                checkpoint,
                entry,
                format!("says {found:?}, expected {expected:?}"),
            )),
        }
    }

    /// Column `k` must be in group `k / group_size`.
    fn check_order(&self, checkpoint: &Checkpoint) -> Result<()> {
        let actorder = format!("{}.weight_g_idx", self.module);
        if let Some(entry) = checkpoint.tensor(&actorder) {
            return Err(act_order(checkpoint, entry));
        }
        if self.position(Role::GroupIndex).is_none() {
            return Ok(());
        }
        let entry = self.entry(checkpoint, Role::GroupIndex)?;
        let found = checkpoint.bytes(entry).as_chunks().0.iter();
        let in_order = found.enumerate().all(|(column, bytes)| {
            let group = column.checked_div(self.grid.block_columns);
            usize::try_from(i32::from_le_bytes(*bytes)).ok() == group
        });
        match in_order {
            true => Ok(()),
            false => Err(act_order(checkpoint, entry)),
        }
    }
}

/// The scale above all scales of an NVFP4 linear.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SecondScale {
    /// Values are multiplied by it.
    Factor(f32),
    /// Values are divided by it.
    Divisor(f32),
}

impl SecondScale {
    /// As a factor; the inverse of a divisor is rounded.
    pub fn factor(self) -> f32 {
        match self {
            Self::Factor(factor) => factor,
            Self::Divisor(divisor) => 1.0 / divisor,
        }
    }
}

impl Grid {
    fn of_group(group: Option<Group>, rows: usize, columns: usize) -> Self {
        let (block_rows, block_columns) = match group {
            Some(Group::Columns(size)) => (1, size),
            Some(Group::Row) => (1, columns),
            Some(Group::Tensor) | None => (rows, columns),
        };
        Self {
            columns: columns.checked_div(block_columns).unwrap_or(1),
            block_rows,
            block_columns,
        }
    }

    /// Scales of FP8 weights: as many as rows, as blocks, or one.
    fn of_shape(shape: &[usize], rows: usize, columns: usize) -> Self {
        match *shape {
            [n] | [n, 1] if n == rows => Self::of_group(Some(Group::Row), rows, columns),
            [_, blocks] if shape != [1, 1] => Self {
                columns: blocks,
                block_rows: FLOAT8_BLOCK,
                block_columns: FLOAT8_BLOCK,
            },
            _ => Self::of_group(Some(Group::Tensor), rows, columns),
        }
    }
}

/// The value of an E2M1 code, 0 to 15; the upper half is negative, its first a negative zero.
///
/// Source: OCP Microscaling Formats 1.0, section 5.3.3.
fn e2m1(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES
        .get(usize::from(code & 7))
        .copied()
        .unwrap_or_default();
    match code & 8 {
        0 => magnitude,
        _ => -magnitude,
    }
}

fn check(checkpoint: &Checkpoint, position: usize, spec: &TensorSpec) -> Result<()> {
    let Some(entry) = checkpoint.tensors().get(position) else {
        return Ok(());
    };
    if !spec.dtypes.contains(&entry.dtype) {
        let names: Vec<_> = spec.dtypes.iter().map(|dtype| dtype.name()).collect();
        let expected = names.join(" or ");
        let what = format!("dtype must be {expected}, found {}", entry.dtype);
        return Err(at(checkpoint, entry, what));
    }
    let is_same = |shape: &Vec<usize>| without_ones(shape) == without_ones(&entry.shape);
    match spec.shapes.iter().any(is_same) {
        true => Ok(()),
        false => {
            let shapes: Vec<_> = spec
                .shapes
                .iter()
                .map(|shape| format!("{shape:?}"))
                .collect();
            let expected = shapes.join(" or ");
            let what = format!("shape must be {expected}, found {:?}", entry.shape);
            Err(at(checkpoint, entry, what))
        }
    }
}

/// A shape without the dimensions of 1 at its end: scalars are `[]`, `[1]` or `[1, 1]`, scales of rows `[n]` or `[n, 1]`.
fn without_ones(shape: &[usize]) -> &[usize] {
    match shape {
        [rest @ .., 1] => without_ones(rest),
        shape => shape,
    }
}

fn missing(checkpoint: &Checkpoint, module: &str, spec: &TensorSpec, scheme: &Scheme) -> Error {
    let what = format!(
        "has no `{}`, which its scheme needs ({scheme})",
        spec.suffix
    );
    Error::missing(what)
        .in_tensor(module)
        .in_file(checkpoint.folder())
        .hint("the download may be incomplete; or the module belongs into `ignore` of the configuration")
}

fn act_order(checkpoint: &Checkpoint, entry: &TensorEntry) -> Error {
    let what = "columns are quantized in the order of activations, which is not read".to_owned();
    at(checkpoint, entry, what)
        .hint("quantize again with desc_act false, as current runtimes want it too")
}

fn at(checkpoint: &Checkpoint, entry: &TensorEntry, what: String) -> Error {
    let error = Error::malformed(what)
        .in_tensor(&entry.name)
        .at(entry.offset);
    match checkpoint.shards().get(entry.shard) {
        Some(shard) => error.in_file(shard.path()),
        None => error,
    }
}

#[cfg(test)]
#[path = "tests/mod.rs"]
mod tests;
