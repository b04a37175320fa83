//! FP8 and NVFP4 of packed checkpoints as values.

use std::ops::Range;

use nemoconv_formats::Dtype;
use nemoconv_formats::packed::{FloatCodes, SecondScale};

use super::packed::{scale_type, stored_items, whole_heads};
use super::{groups_of, word};
use crate::array::{Array, Bytes, Device};
use crate::error::Result;
use crate::kernels;

/// Floats of a packed checkpoint: how rows of codes and scales lie in their bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FloatLayout {
    /// How codes are stored.
    pub codes: FloatCodes,
    /// Codes of a row, an even number where two are in a byte.
    pub columns: usize,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
    /// BF16, F16, F32 or F8_E4M3.
    pub scales: Dtype,
    /// The scale above all scales.
    pub second_scale: SecondScale,
    /// Rows of a head whose halves are to be interleaved; 0 where rows stay in their order.
    pub head_rows: usize,
}

impl FloatLayout {
    /// Bits of a code.
    fn bits(&self) -> usize {
        match self.codes {
            FloatCodes::E4M3 => 8,
            FloatCodes::E2M1 => 4,
        }
    }

    /// Bytes of a row of codes.
    fn row_bytes(&self) -> usize {
        self.columns * self.bits() / 8
    }

    /// Scales of a row of blocks.
    fn blocks(&self) -> usize {
        self.columns.div_ceil(self.block[1])
    }

    /// The scales that these rows need.
    fn scales_of(&self, rows: &Range<usize>) -> Range<usize> {
        let [block_rows, _] = self.block;
        rows.start / block_rows * self.blocks()..rows.end.div_ceil(block_rows) * self.blocks()
    }

    /// The second scale, and whether it divides.
    fn second(&self) -> (f32, u32) {
        match self.second_scale {
            SecondScale::Factor(factor) => (factor, 0),
            SecondScale::Divisor(divisor) => (divisor, 1),
        }
    }
}

impl Device {
    /// Values of some rows of floats, `code * scale` times or through the second scale, to the first values of `out`.
    /// `codes` and `scales` hold rows from the first on, as a checkpoint stores them.
    ///
    /// # Errors
    /// Device lost; the values or bytes of these rows are more than a view may span.
    ///
    /// # Panics
    /// The rows are not all there or do not fit `out`, or scales are of another type.
    pub fn dequantize_floats(
        &self,
        layout: &FloatLayout,
        codes: &Bytes,
        scales: &Bytes,
        rows: Range<usize>,
        out: &mut Array,
    ) -> Result<()> {
        let count = rows.len() * layout.columns;
        assert!(
            count <= out.len(),
            "{rows:?} of {layout:?} do not fit {} values",
            out.len()
        );
        if count == 0 {
            return Ok(());
        }
        let heads = whole_heads(&rows, layout.head_rows);
        let row_bytes = layout.row_bytes();
        let (codes, first_code) = stored_items(codes, heads.clone(), row_bytes);
        let of_rows = layout.scales_of(&heads);
        let (scales, first_scale) = stored_items(scales, of_rows, layout.scales.bytes());
        let [block_rows, block_columns] = layout.block;
        let sizes = [
            count,
            layout.columns,
            layout.bits(),
            first_code,
            row_bytes,
            rows.start - heads.start,
            layout.head_rows,
            block_rows,
            block_columns,
            heads.start % block_rows,
            layout.blocks(),
            scale_type(layout.scales),
            first_scale,
        ]
        .map(word);
        let (second, divides) = layout.second();
        let parameters = [&sizes[..], &[second.to_bits(), divides]].concat();
        let kernel = &kernels::DEQUANTIZE_FLOATS;
        let views = [codes, scales, out.part(0..count).0];
        self.launch(
            kernel,
            groups_of(count, kernel.threads),
            &views,
            &parameters,
        )
    }
}
