//! What minima of weights add to products where runtimes take inputs in Q8_1.
//!
//! Enters: inputs, stored weights. Leaves: sums beside those of rounded inputs with decoded weights. Knows no rounding.

use nemoconv_device::{Array, Bytes, Device, MatmulLayout};
use nemoconv_formats::GgmlType;

use crate::backend::activation::Q8_0_BLOCK;
use crate::error::Result;

/// Sums of blocks that Q8_1 rounds to F16: what they have more than the sums of rounded values, times minima.
pub(super) struct BlockSums {
    /// Of every block of inputs, `[rows, blocks]`.
    remainders: Array,
    /// Blocks of a row.
    blocks: usize,
    /// Minima of the weights that were decoded last, `[rows of a tile, blocks]`.
    minima: Array,
}

impl BlockSums {
    /// For inputs in rows of `columns`, and weights of which `tile` rows are decoded at a time.
    pub(super) fn new(device: &Device, input: &Array, columns: usize, tile: usize) -> Result<Self> {
        let blocks = columns / Q8_0_BLOCK;
        Ok(Self {
            remainders: device.q8_1_remainders(input)?,
            blocks,
            minima: device.uninitialized(tile * blocks)?,
        })
    }

    /// Takes the minima of so many values that begin at `first_byte`.
    pub(super) fn decode_minima(
        &mut self,
        device: &Device,
        ty: GgmlType,
        bytes: &Bytes,
        first_byte: u64,
        values: usize,
    ) -> Result<()> {
        let blocks = values / Q8_0_BLOCK;
        Ok(device.block_minima(ty, bytes, first_byte, blocks, &mut self.minima)?)
    }

    /// Adds to a product of the same inputs with the weights whose minima were taken.
    pub(super) fn add(
        &self,
        device: &Device,
        product: &MatmulLayout,
        out: &mut Array,
    ) -> Result<()> {
        let layout = MatmulLayout {
            inner: self.blocks,
            a: [0, self.blocks, 1],
            b: [0, 1, self.blocks],
            beta: 1.0,
            ..*product
        };
        Ok(device.matmul(&layout, &self.remainders, &self.minima, out)?)
    }
}
