//! Products with weights as they are stored, in the arithmetic of runtimes: on tensor cores where a device has them.

use std::ops::Range;

use nemoconv_formats::GgmlType;

use super::rows::Rounding;
use super::{groups_of, word};
use crate::array::{Array, Bytes, Device};
use crate::error::Result;
use crate::kernels::{self, Kernel};

/// What becomes of the inputs of a product, so that they can be multiplied with stored weights of the same type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Rounded to BF16.
    Bf16,
    /// Rounded to F16.
    F16,
    /// Quantized to blocks of Q8_0.
    Q8_0,
}

/// Rows of inputs that were packed.
pub struct Packed {
    packing: Packing,
    rows: usize,
    width: usize,
    /// Halves in rows of whole multiples of [`DEPTH`], or codes.
    words: Bytes,
    /// Of each block of Q8_0.
    scales: Option<Array>,
}

/// Rows and columns of outputs that a group of threads computes.
const TILE: usize = 128;
/// Values that are multiplied at a time, and those of a block of Q8_0.
const DEPTH: usize = 32;

impl Packing {
    /// Inputs rounded so, times weights of this type; `None` where that is no product of two packed operands.
    pub fn of(ty: GgmlType, rounding: Rounding) -> Option<Self> {
        match (ty, rounding) {
            (GgmlType::BF16, Rounding::Bf16) => Some(Self::Bf16),
            (GgmlType::F16, Rounding::F16) => Some(Self::F16),
            (GgmlType::Q8_0, Rounding::Q8_0) => Some(Self::Q8_0),
            _ => None,
        }
    }

    fn kernel(self) -> &'static Kernel {
        match self {
            Self::Bf16 => &kernels::MATMUL_BF16,
            Self::F16 => &kernels::MATMUL_F16,
            Self::Q8_0 => &kernels::MATMUL_Q8_0,
        }
    }

    /// Bytes of a row of packed inputs.
    fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 => width.next_multiple_of(DEPTH) * 2,
            Self::Q8_0 => width,
        }
    }

    /// Bytes of a row of stored weights.
    fn weight_bytes(self, width: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 => width * 2,
            Self::Q8_0 => width / DEPTH * GgmlType::Q8_0.block_bytes(),
        }
    }
}

impl Device {
    /// Packs the first `rows` rows of `width` values.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// Rows are not there, or not whole blocks of Q8_0.
    pub fn pack(
        &self,
        input: &Array,
        rows: usize,
        width: usize,
        packing: Packing,
    ) -> Result<Packed> {
        assert!(rows * width <= input.len(), "rows are missing");
        let bytes = rows * packing.row_bytes(width);
        let words = self.reserve_bytes(bytes as u64)?;
        let scales = match packing {
            Packing::Bf16 | Packing::F16 => {
                let kernel = &kernels::PACK_HALVES;
                let count = bytes / 4;
                let row_words = packing.row_bytes(width) / 4;
                let mode = u32::from(packing == Packing::F16);
                let parameters = [word(count), word(width), word(row_words), mode];
                let views = [input.view(), words.view()];
                self.launch(
                    kernel,
                    groups_of(count, kernel.threads),
                    &views,
                    &parameters,
                )?;
                None
            }
            Packing::Q8_0 => {
                assert!(width.is_multiple_of(DEPTH), "whole blocks");
                let kernel = &kernels::QUANTIZE_Q8_0;
                let blocks = rows * width / DEPTH;
                let scales = self.uninitialized(blocks)?;
                let views = [input.view(), words.view(), scales.view()];
                let groups = groups_of(blocks, kernel.threads);
                self.launch(kernel, groups, &views, &[word(blocks)])?;
                Some(scales)
            }
        };
        Ok(Packed {
            packing,
            rows,
            width,
            words,
            scales,
        })
    }

    /// `x W^T`: `x` packed, `W [columns, width]` as stored from `first_byte` on, written to columns `first_column..` of
    /// rows of `out_row` values.
    ///
    /// BF16 and F16: exact products, summed 32 at a time and in order. Q8_0: for each block the dot of its codes in integers,
    /// times both scales, summed in order.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// The weights are not all there, or the result does not fit `out`.
    pub fn matmul_stored(
        &self,
        x: &Packed,
        weights: &Bytes,
        first_byte: u64,
        columns: usize,
        [first_column, out_row]: [usize; 2],
        out: &mut Array,
    ) -> Result<()> {
        if x.rows == 0 || columns == 0 {
            return Ok(());
        }
        let stored = x.packing.weight_bytes(x.width);
        assert!(
            first_byte + (columns * stored) as u64 <= weights.len(),
            "the weights are too short"
        );
        assert!(
            first_column + columns <= out_row,
            "a row of the result is too short"
        );
        assert!(x.rows * out_row <= out.len(), "the result is too short");
        let (row_step, column_step) = self.parts_of_views(x, out_row);
        for first in (0..columns).step_by(column_step) {
            let part = first..columns.min(first + column_step);
            let begin = first_byte + (part.start * stored) as u64;
            let bytes = begin..first_byte + (part.end * stored) as u64;
            for first in (0..x.rows).step_by(row_step) {
                let rows = first..x.rows.min(first + row_step);
                let at = [first_column + part.start, out_row];
                self.stored_part(x, rows, weights, bytes.clone(), part.len(), at, out)?;
            }
        }
        Ok(())
    }

    /// Rows of inputs and results, and rows of weights, that fit views.
    fn parts_of_views(&self, x: &Packed, out_row: usize) -> (usize, usize) {
        let limits = self.description().limits;
        // Views begin at most an alignment before what they show.
        let bytes = (limits.view_bytes - limits.view_alignment) as usize;
        let row = x.packing.row_bytes(x.width).max(4 * out_row).max(1);
        let stored = x.packing.weight_bytes(x.width).max(1);
        ((bytes / row).max(1), (bytes / stored).max(1))
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one part of a product, by its three operands"
    )]
    fn stored_part(
        &self,
        x: &Packed,
        rows: Range<usize>,
        weights: &Bytes,
        bytes: Range<u64>,
        columns: usize,
        [first_column, out_row]: [usize; 2],
        out: &Array,
    ) -> Result<()> {
        let row_bytes = x.packing.row_bytes(x.width) as u64;
        let (weights, first_byte) = weights.part(bytes);
        let (words, x_first) = x
            .words
            .part(rows.start as u64 * row_bytes..rows.end as u64 * row_bytes);
        let first = rows.start * out_row + first_column;
        let end = (rows.end - 1) * out_row + first_column + columns;
        let (out, out_first) = out.part(first..end);
        let mut parameters = [rows.len(), columns, x.width].map(word).to_vec();
        parameters.extend([word(first_byte as usize), word(x_first as usize / 4)]);
        let mut views = vec![weights, words];
        if let Some(scales) = &x.scales {
            let blocks = x.width / DEPTH;
            let (view, first) = scales.part(rows.start * blocks..rows.end * blocks);
            views.push(view);
            parameters.push(first);
        }
        views.push(out);
        parameters.extend([out_first, word(out_row)]);
        let groups = rows.len().div_ceil(TILE) * columns.div_ceil(TILE);
        self.launch(x.packing.kernel(), word(groups), &views, &parameters)
    }
}
