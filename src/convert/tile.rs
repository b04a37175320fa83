//! One tile: consecutive stored rows of one matrix, small enough to stay in the cache.
//!
//! Enters: source bytes, read into the worker's own buffers. Leaves: the bytes to store. Knows nothing of files and threads.

use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv_formats::packed::{PackedLinear, RowBuffers};
use nemoconv_formats::{Dtype, GgmlType, float};

use super::exact::CodedRow;
use crate::backend::cpu::exp_f64;
use crate::error::{Error, Fault, Result};
use crate::model::nemotron_h::ValueRule;
use crate::plan::packing::keeps_codes;
use crate::plan::sources::Piece;
use crate::plan::{Plan, PlannedTensor};
use crate::quantize::quantize_rows;

/// Weights of a tile: 1 MiB as f32, so that a tile and its blocks stay in a core's second-level cache.
const TILE_WEIGHTS: usize = 1 << 18;

/// Rows `row..row + rows` of one piece of a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Tile {
    /// Index into [`Plan::tensors`].
    pub tensor: usize,
    /// Which matrix of it.
    piece: usize,
    /// First stored row.
    row: usize,
    /// Stored rows.
    pub rows: usize,
}

/// Buffers that a worker keeps.
#[derive(Debug, Default)]
pub struct Scratch {
    values: Vec<f32>,
    out: Vec<u8>,
    packed: RowBuffers,
    /// Rows of a packed linear, as they lie in it.
    decoded: Vec<f32>,
}

/// What became of a tile.
pub struct Made<'a> {
    /// The bytes to store.
    pub bytes: &'a [u8],
    /// NaN and infinite weights.
    pub nonfinite: u64,
    /// Values or scales too large for F16.
    pub overflows: u64,
    /// Rows that should have gone over code by code but have a scale that F16 does not hold, and were rounded.
    pub rounded_rows: u64,
}

/// All tiles of a plan, in file order.
pub fn tiles(plan: &Plan) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (index, tensor) in plan.tensors.iter().enumerate() {
        let step = rows_per_tile(tensor);
        for piece in 0..tensor.pieces.len() {
            for row in (0..tensor.stored.rows).step_by(step) {
                let rows = step.min(tensor.stored.rows - row);
                tiles.push(Tile {
                    tensor: index,
                    piece,
                    row,
                    rows,
                });
            }
        }
    }
    tiles
}

fn rows_per_tile(tensor: &PlannedTensor) -> usize {
    (TILE_WEIGHTS / tensor.stored.columns.max(1)).clamp(1, tensor.stored.rows.max(1))
}

impl Scratch {
    /// Bytes that tiles of `tensor` need.
    pub fn bytes_for(tensor: &PlannedTensor) -> usize {
        let rows = rows_per_tile(tensor);
        let is_packed = tensor.pieces.iter().any(|p| matches!(p, Piece::Packed(_)));
        // Values as f32, and the larger of source bytes (at most f32 too) and stored bytes; of packed linears codes, their
        // bytes, scales and values once more.
        rows * tensor.stored.columns * if is_packed { 18 } else { 8 }
    }

    /// A buffer of `count` bytes with unspecified content: source bytes, then stored bytes.
    pub fn bytes(&mut self, count: usize) -> &mut [u8] {
        grown(&mut self.out, count)
    }
}

/// The first `count` elements of a buffer that grows to hold them, their content unspecified.
pub fn grown<T: Copy + Default>(buffer: &mut Vec<T>, count: usize) -> &mut [T] {
    buffer.resize(buffer.len().max(count), T::default());
    &mut buffer[..count]
}

impl Tile {
    /// Rows `row..row + rows` of one piece of the tensor with index `tensor`.
    pub fn new(tensor: usize, piece: usize, row: usize, rows: usize) -> Self {
        Self {
            tensor,
            piece,
            row,
            rows,
        }
    }

    /// The checkpoint tensor and its first row, where the source bytes already are what is stored.
    pub fn source_rows<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        tensor: &PlannedTensor,
    ) -> Option<(&'a TensorEntry, usize)> {
        let rows = self.unchanged(checkpoint, tensor)?;
        Some((&checkpoint.tensors()[rows.source], rows.first))
    }

    /// Offset from the start of the tensor's data, bytes.
    pub fn offset(&self, tensor: &PlannedTensor) -> u64 {
        ((self.piece * tensor.stored.rows + self.row) * tensor.row_bytes()) as u64
    }

    /// Computes the stored bytes.
    ///
    /// # Errors
    /// The checkpoint cannot be read.
    pub fn make<'a>(
        &self,
        checkpoint: &Checkpoint,
        tensor: &PlannedTensor,
        scratch: &'a mut Scratch,
    ) -> Result<Made<'a>> {
        if let Some(source) = self.unchanged(checkpoint, tensor) {
            return self.copy(checkpoint, tensor, source, scratch);
        }
        // Rows that go over code by code are done.
        let left = match &tensor.pieces[self.piece] {
            Piece::Packed(linear) if keeps_codes(tensor) => {
                Some(self.keep_codes(checkpoint, tensor, linear, scratch)?)
            }
            _ => None,
        };
        if left.as_ref().is_some_and(Vec::is_empty) {
            return Ok(Made {
                bytes: &scratch.out[..self.rows * tensor.row_bytes()],
                nonfinite: 0,
                overflows: 0,
                rounded_rows: 0,
            });
        }
        if tensor.ty == GgmlType::NVFP4 {
            let what =
                "has scales that are negative or no numbers, which blocks of NVFP4 do not hold";
            return Err(Error::Weights(Fault::new(what).in_tensor(&tensor.name)));
        }
        let count = self.rows * tensor.stored.columns;
        let mut values = std::mem::take(&mut scratch.values);
        let read = self.read(checkpoint, tensor, grown(&mut values, count), scratch);
        scratch.values = values;
        read?;
        let values = &mut scratch.values[..count];
        let nonfinite = nonfinite_in(Dtype::F32, bytemuck::cast_slice(values));
        if tensor.rule.value == ValueRule::NegExp {
            // Not the system's `expf`: each rounds some values in its own way.
            let negated = |value: f32| -(exp_f64(f64::from(value)) as f32);
            values.iter_mut().for_each(|value| *value = negated(*value));
        }
        if tensor.factor != 1.0 {
            values.iter_mut().for_each(|value| *value *= tensor.factor);
        }
        let bytes = self.rows * tensor.row_bytes();
        let out = grown(&mut scratch.out, bytes);
        let columns = tensor.stored.columns;
        let importance = tensor
            .importance
            .as_ref()
            .map(|all| &all[self.piece * columns..][..columns]);
        let overflows = match &left {
            None => quantize_rows(tensor.ty, columns, values, importance, out).0,
            Some(rows) => {
                let of_row = |row: &usize| {
                    let values = &values[row * columns..][..columns];
                    let row_bytes = tensor.row_bytes();
                    let out = &mut out[row * row_bytes..][..row_bytes];
                    quantize_rows(tensor.ty, columns, values, importance, out).0
                };
                rows.iter().map(of_row).sum()
            }
        };
        Ok(Made {
            bytes: out,
            nonfinite,
            overflows,
            rounded_rows: left.map_or(0, |rows| rows.len() as u64),
        })
    }

    /// Takes codes over as they are; gives the rows for which that is impossible.
    fn keep_codes(
        &self,
        checkpoint: &Checkpoint,
        tensor: &PlannedTensor,
        linear: &PackedLinear,
        scratch: &mut Scratch,
    ) -> Result<Vec<usize>> {
        let (first, rows) = self.whole_heads(tensor);
        let buffers = &mut scratch.packed;
        linear.read_codes(checkpoint, first, rows, buffers)?;
        let groups = buffers.scales.len() / rows.max(1);
        let columns = linear.columns();
        let row_bytes = tensor.row_bytes();
        let bytes = self.rows * row_bytes;
        let mut left = Vec::new();
        let out = grown(&mut scratch.out, bytes);
        for (index, bytes) in out.chunks_exact_mut(row_bytes).enumerate() {
            let from = interleaved(self.row + index, interleaved_rows(tensor)) - first;
            let of_row = from * groups..(from + 1) * groups;
            let row = CodedRow {
                codes: &buffers.codes[from * columns..][..columns],
                scales: &buffers.scales[of_row.clone()],
                zeros: buffers.zeros.get(of_row).unwrap_or_default(),
            };
            if row.pack(tensor.ty, bytes).is_none() {
                left.push(index);
            }
        }
        Ok(left)
    }

    /// First row and number of source rows that a tile is made of: all of each head where heads are interleaved.
    fn whole_heads(&self, tensor: &PlannedTensor) -> (usize, usize) {
        let end = (self.row + self.rows).min(tensor.source.rows);
        match interleaved_rows(tensor) {
            Some(d) => {
                let first = self.row / d * d;
                (
                    first,
                    end.next_multiple_of(d).min(tensor.source.rows) - first,
                )
            }
            None => (self.row, end.saturating_sub(self.row)),
        }
    }

    /// The first source row, where the source bytes already are what is stored.
    fn unchanged(&self, checkpoint: &Checkpoint, tensor: &PlannedTensor) -> Option<Rows> {
        let Piece::Tensor {
            source, first_row, ..
        } = tensor.pieces[self.piece]
        else {
            return None;
        };
        let same_type = matches!(
            (checkpoint.tensors()[source].dtype, tensor.ty),
            (Dtype::Bf16, GgmlType::BF16)
                | (Dtype::F16, GgmlType::F16)
                | (Dtype::F32, GgmlType::F32)
        );
        let same_place = tensor.source == tensor.stored && tensor.rule.value == ValueRule::Copy;
        (same_type && same_place && tensor.factor == 1.0).then_some(Rows {
            source,
            first: first_row + self.row,
        })
    }

    fn copy<'a>(
        &self,
        checkpoint: &Checkpoint,
        tensor: &PlannedTensor,
        rows: Rows,
        scratch: &'a mut Scratch,
    ) -> Result<Made<'a>> {
        let entry = &checkpoint.tensors()[rows.source];
        let row_bytes = tensor.row_bytes();
        let bytes = scratch.bytes(self.rows * row_bytes);
        checkpoint.read_at(entry, rows.first * row_bytes, bytes)?;
        Ok(Made {
            nonfinite: nonfinite_in(entry.dtype, bytes),
            bytes,
            overflows: 0,
            rounded_rows: 0,
        })
    }

    /// Fills `values` with the stored rows: gathered, scaled, padded with zeros.
    fn read(
        &self,
        checkpoint: &Checkpoint,
        tensor: &PlannedTensor,
        values: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let inside = self.rows.min(tensor.source.rows.saturating_sub(self.row));
        let (filled, rest) = values.split_at_mut(inside * tensor.stored.columns);
        rest.fill(0.0);
        if inside == 0 {
            return Ok(());
        }
        match &tensor.pieces[self.piece] {
            Piece::Zeros => filled.fill(0.0),
            Piece::SecondScale(linear) => filled.fill(linear.second_scale(checkpoint)?.factor()),
            Piece::Packed(linear) => {
                self.read_packed(checkpoint, tensor, linear, filled, scratch)?;
            }
            Piece::Tensor { source, first_row } => {
                let entry = &checkpoint.tensors()[*source];
                self.read_plain(checkpoint, tensor, (entry, *first_row), filled, scratch)?;
            }
        }
        Ok(())
    }

    fn read_plain(
        &self,
        checkpoint: &Checkpoint,
        tensor: &PlannedTensor,
        (entry, first_row): (&TensorEntry, usize),
        values: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let interleave = interleaved_rows(tensor);
        let row_bytes = tensor.source.columns * entry.dtype.bytes();
        let rows = values.len() / tensor.stored.columns.max(1);
        let bytes = scratch.bytes(rows * row_bytes);
        match interleave {
            None => checkpoint.read_at(entry, (first_row + self.row) * row_bytes, bytes)?,
            Some(_) => {
                for (index, row) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                    let from = first_row + interleaved(self.row + index, interleave);
                    checkpoint.read_at(entry, from * row_bytes, row)?;
                }
            }
        }
        if tensor.source.columns == tensor.stored.columns {
            return Ok(float::to_f32(entry.dtype, bytes, values)?);
        }
        let rows = values.chunks_exact_mut(tensor.stored.columns);
        for (row, bytes) in rows.zip(bytes.chunks_exact(row_bytes)) {
            let (data, padding) = row.split_at_mut(tensor.source.columns);
            float::to_f32(entry.dtype, bytes, data)?;
            padding.fill(0.0);
        }
        Ok(())
    }

    fn read_packed(
        &self,
        checkpoint: &Checkpoint,
        tensor: &PlannedTensor,
        linear: &PackedLinear,
        values: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let columns = tensor.source.columns;
        let (first, rows) = self.whole_heads(tensor);
        let Scratch {
            packed, decoded, ..
        } = scratch;
        decoded.resize(rows * columns, 0.0);
        linear.dequantize(checkpoint, first, packed, decoded)?;
        let stored_rows = values.chunks_exact_mut(tensor.stored.columns);
        for (index, row) in stored_rows.enumerate() {
            let from = interleaved(self.row + index, interleaved_rows(tensor)) - first;
            let (data, padding) = row.split_at_mut(columns);
            data.copy_from_slice(&decoded[from * columns..][..columns]);
            padding.fill(0.0);
        }
        Ok(())
    }
}

/// Consecutive rows of a checkpoint tensor.
#[derive(Debug, Clone, Copy)]
struct Rows {
    /// Index into [`Checkpoint::tensors`].
    source: usize,
    /// The first.
    first: usize,
}

/// The row of the checkpoint's matrix that is stored as row `row`.
pub fn source_row(tensor: &PlannedTensor, row: usize) -> usize {
    interleaved(row, interleaved_rows(tensor))
}

/// Rows per head where heads are interleaved; heads of odd width stay as they are.
pub fn interleaved_rows(tensor: &PlannedTensor) -> Option<usize> {
    match tensor.rule.value {
        ValueRule::InterleaveQueryHeads | ValueRule::InterleaveKeyHeads => {
            Some(tensor.head_dim).filter(|d| d % 2 == 0)
        }
        ValueRule::Copy | ValueRule::NegExp => None,
    }
}

/// The source row of a stored row: within a head, row `2 j + a` comes from `a d/2 + j`.
///
/// The runtime's layout for rotary positions; without positions it changes nothing, and is kept for equality with
/// the stock converter.
fn interleaved(row: usize, head_rows: Option<usize>) -> usize {
    match head_rows {
        Some(d) => {
            let (head, index) = (row / d, row % d);
            head * d + index % 2 * (d / 2) + index / 2
        }
        None => row,
    }
}

/// NaN and infinities among raw floats: all bits of the exponent set.
pub fn nonfinite_in(dtype: Dtype, bytes: &[u8]) -> u64 {
    let count16 = |mask: u16| {
        let (halves, _) = bytes.as_chunks::<2>();
        let is_nonfinite = |b: &[u8; 2]| u16::from(u16::from_le_bytes(*b) & mask == mask);
        // Sums of u16, in lanes of that width, as long as they hold them.
        halves
            .chunks(usize::from(u16::MAX))
            .map(|part| u64::from(part.iter().map(is_nonfinite).sum::<u16>()))
            .sum()
    };
    match dtype {
        Dtype::Bf16 => count16(0x7f80),
        Dtype::F16 => count16(0x7c00),
        _ => {
            let (words, _) = bytes.as_chunks::<4>();
            let mask = 0x7f80_0000;
            let is_nonfinite = |b: &[u8; 4]| u32::from(u32::from_le_bytes(*b) & mask == mask);
            words
                .chunks(1 << 31)
                .map(|part| u64::from(part.iter().map(is_nonfinite).sum::<u32>()))
                .sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_interleaved() {
        let rows: Vec<_> = (0..8).map(|row| interleaved(row, Some(4))).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(interleaved(5, None), 5);
    }

    #[test]
    fn nonfinite_values_are_counted_in_every_type() {
        let check =
            |dtype, bytes: &[u8], expected| assert_eq!(nonfinite_in(dtype, bytes), expected);
        check(Dtype::Bf16, &[0x80, 0x7f, 0xc0, 0xff, 0x7f, 0x7f], 2);
        check(Dtype::F16, &[0x00, 0x7c, 0xff, 0x7b], 1);
        check(
            Dtype::F32,
            bytemuck::bytes_of(&[f32::NAN, 1.0, f32::NEG_INFINITY]),
            2,
        );
    }
}
