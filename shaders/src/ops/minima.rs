//! What products of weights with minima take from inputs in Q8_1, beside what inputs in Q8_0 give.

use nemoconv_formats::GgmlType;

use super::{groups_of, word};
use crate::array::{Array, Bytes, Device};
use crate::error::Result;
use crate::kernels;

/// Values of a block, of inputs as of weights.
const BLOCK: usize = 32;

/// Whether blocks of a type have a minimum each that is multiplied with the sums of Q8_1.
pub fn has_minima(ty: GgmlType) -> bool {
    matches!(ty, GgmlType::Q4_1 | GgmlType::Q5_1)
}

impl Device {
    /// Of each block of 32 inputs: the F16 sum that Q8_1 keeps, less the sum of the values that Q8_0 rounds them to.
    ///
    /// # Errors
    /// Out of memory, device lost.
    ///
    /// # Panics
    /// Inputs are not whole blocks.
    pub fn q8_1_remainders(&self, input: &Array) -> Result<Array> {
        assert!(input.len().is_multiple_of(BLOCK), "whole blocks");
        let out = self.uninitialized(input.len() / BLOCK)?;
        let kernel = &kernels::Q8_1_REMAINDERS;
        for part in self.parts_of_rows(0..out.len(), &[4 * BLOCK, 4]) {
            let views = [part.view(input, BLOCK), part.view(&out, 1)];
            let groups = groups_of(part.rows.len(), kernel.threads);
            self.launch(kernel, groups, &views, &[word(part.rows.len())])?;
        }
        Ok(out)
    }

    /// Minima of `blocks` blocks of type `ty` that begin at `first_byte`, to the first values of `out`.
    ///
    /// # Errors
    /// Device lost; the bytes are more than a view may span.
    ///
    /// # Panics
    /// The type has none (see [`has_minima`]), the blocks are not all there or do not fit `out`.
    pub fn block_minima(
        &self,
        ty: GgmlType,
        bytes: &Bytes,
        first_byte: u64,
        blocks: usize,
        out: &mut Array,
    ) -> Result<()> {
        let stored = (blocks * ty.block_bytes()) as u64;
        assert!(has_minima(ty), "{ty} has no minima");
        assert!(
            blocks <= out.len() && first_byte + stored <= bytes.len(),
            "blocks end beyond their bytes"
        );
        if blocks == 0 {
            return Ok(());
        }
        let (view, first) = bytes.part(first_byte..first_byte + stored);
        let kernel = &kernels::BLOCK_MINIMA;
        let groups = groups_of(blocks, kernel.threads);
        let parameters = [blocks, first as usize, ty.block_bytes()].map(word);
        let views = [view, out.part(0..blocks).0];
        self.launch(kernel, groups, &views, &parameters)
    }
}
