//! Products with weights as they are stored, in the arithmetic of runtimes: on tensor cores where a device has them.

use std::ops::Range;

use nemoconv_formats::GgmlType;

use super::rows::Rounding;
use super::{groups_of, word};
use crate::array::{Array, Bytes, Device};
use crate::driver::View;
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
    /// Three parts of BF16 each, for weights in BF16 or for other rows in parts: inputs as they are.
    Parts,
}

/// Rows of inputs, or of weights in parts, that were packed.
pub struct Packed {
    packing: Packing,
    rows: usize,
    width: usize,
    /// Halves in rows or parts of rows of whole multiples of [`DEPTH`], or codes.
    words: Bytes,
    /// Of each block of Q8_0.
    scales: Option<Array>,
}

/// Rows and columns of outputs that a group of threads computes.
pub(super) const TILE: usize = 128;
/// Rows of halves are whole multiples of this; values of a block of Q8_0.
const DEPTH: usize = 32;
/// Parts of a value of F32.
pub(super) const PARTS: usize = 3;

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
            Self::Parts => &kernels::MATMUL_SPLIT_BF16,
        }
    }

    /// Bytes of a row of packed inputs.
    pub(super) fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 => width.next_multiple_of(DEPTH) * 2,
            Self::Q8_0 => width,
            Self::Parts => PARTS * width.next_multiple_of(DEPTH) * 2,
        }
    }

    /// Bytes of a row of stored weights.
    fn weight_bytes(self, width: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 | Self::Parts => width * 2,
            Self::Q8_0 => width / DEPTH * GgmlType::Q8_0.block_bytes(),
        }
    }
}

impl Packed {
    /// Rows without values in them yet.
    pub(super) fn reserve(
        device: &Device,
        rows: usize,
        width: usize,
        packing: Packing,
    ) -> Result<Self> {
        let bytes = rows * packing.row_bytes(width);
        Ok(Self {
            packing,
            rows,
            width,
            words: device.reserve_bytes(bytes as u64)?,
            scales: None,
        })
    }

    pub(super) fn packing(&self) -> Packing {
        self.packing
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.packing.row_bytes(self.width)
    }

    /// Some rows: the view, and their first word in it.
    pub(super) fn part(&self, rows: Range<usize>) -> (View, u32) {
        let row = self.row_bytes() as u64;
        let bytes = rows.start as u64 * row..rows.end as u64 * row;
        let (view, first) = self.words.part(bytes);
        (view, word(first as usize / 4))
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
        match packing {
            Packing::Bf16 | Packing::F16 => self.pack_halves(input, rows, width, packing),
            Packing::Q8_0 => self.quantize_q8_0(input, rows, width),
            Packing::Parts => self.split(input, [0, width, 1], rows, width),
        }
    }

    fn pack_halves(
        &self,
        input: &Array,
        rows: usize,
        width: usize,
        packing: Packing,
    ) -> Result<Packed> {
        let packed = Packed::reserve(self, rows, width, packing)?;
        let kernel = &kernels::PACK_HALVES;
        let row_bytes = packing.row_bytes(width);
        let mode = u32::from(packing == Packing::F16);
        for part in self.parts_of_rows(0..rows, &[4 * width, row_bytes]) {
            let count = part.rows.len() * row_bytes / 4;
            let parameters = [word(count), word(width), word(row_bytes / 4), mode];
            let views = [part.view(input, width), packed.part(part.rows).0];
            let groups = groups_of(count, kernel.threads);
            self.launch(kernel, groups, &views, &parameters)?;
        }
        Ok(packed)
    }

    fn quantize_q8_0(&self, input: &Array, rows: usize, width: usize) -> Result<Packed> {
        assert!(width.is_multiple_of(DEPTH), "whole blocks");
        let packed = Packed::reserve(self, rows, width, Packing::Q8_0)?;
        let kernel = &kernels::QUANTIZE_Q8_0;
        let blocks = rows * width / DEPTH;
        let scales = self.uninitialized(blocks)?;
        for part in self.parts_of_rows(0..blocks, &[4 * DEPTH, DEPTH, 4]) {
            let codes = (part.rows.start * DEPTH) as u64..(part.rows.end * DEPTH) as u64;
            let codes = packed.words.part(codes).0;
            let views = [part.view(input, DEPTH), codes, part.view(&scales, 1)];
            let groups = groups_of(part.rows.len(), kernel.threads);
            self.launch(kernel, groups, &views, &[word(part.rows.len())])?;
        }
        Ok(Packed {
            scales: Some(scales),
            ..packed
        })
    }

    /// `x W^T`: `x` packed, `W [columns, width]` as stored from `first_byte` on, written to columns `first_column..` of
    /// rows of `out_row` values.
    ///
    /// BF16 and F16: exact products, summed 32 at a time and in order. Parts: as F32 rounds, summed 16 at a time. Q8_0: for
    /// each block the dot of its codes in integers, times both scales, summed in order.
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
        let row_bytes = [x.row_bytes(), 4 * out_row];
        let column_step = (self.least_view() / stored.max(1)).max(1);
        for first in (0..columns).step_by(column_step) {
            let part = first..columns.min(first + column_step);
            let begin = first_byte + (part.start * stored) as u64;
            let bytes = begin..first_byte + (part.end * stored) as u64;
            for rows in self.rows_of_views(0..x.rows, row_bytes) {
                let at = [first_column + part.start, out_row];
                self.stored_part(x, rows, weights, bytes.clone(), part.len(), at, out)?;
            }
        }
        Ok(())
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
        let (weights, first_byte) = weights.part(bytes);
        let (words, x_first) = x.part(rows.clone());
        let first = rows.start * out_row + first_column;
        let end = (rows.end - 1) * out_row + first_column + columns;
        let (out, out_first) = out.part(first..end);
        let mut parameters = [rows.len(), columns, x.width].map(word).to_vec();
        parameters.extend([word(first_byte as usize), x_first]);
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
