//! Products with weights as they are stored: multiplied as they are where the device can, else decoded tile by tile.
//!
//! Enters: weights on the device or on their way, f32 rows. Leaves: f32 rows. Inputs are rounded as the activation says; what
//! is F32 throughout is multiplied in parts on tensor cores where that pays.

use std::ops::Range;

use nemoconv_device::{
    Array, Family, MatmulLayout, Packed, Packing, Rounding, can_dequantize, has_minima,
};
use nemoconv_formats::GgmlType;

use super::minima::BlockSums;
use super::weights::{DeviceWeight, StoredRows};
use super::{OnDevice, SENT_BYTES, TILE_BYTES, TILES, packed};
use crate::artifact::StoredTensor;
use crate::backend::activation::Activation;
use crate::backend::{Backend, default_bodies};
use crate::error::Result;

/// The part of all memory that decoded weights take, however full it is.
const LEAST_TILES: u64 = 32;

/// How the device rounds inputs; `None` where they stay as they are.
fn rounding(activation: Activation) -> Option<Rounding> {
    match activation {
        Activation::None => None,
        Activation::Bf16 => Some(Rounding::Bf16),
        Activation::F16 => Some(Rounding::F16),
        // What Q8_1 has besides goes into products by itself: `BlockSums`.
        Activation::Q8_0 | Activation::Q8_1 => Some(Rounding::Q8_0),
        Activation::Q8K => Some(Rounding::Q8K),
        Activation::TokenInt8 => Some(Rounding::RowInt8),
        Activation::StaticInt8(scale) => Some(Rounding::StaticInt8(scale)),
        Activation::TokenFloat8 => Some(Rounding::RowFloat8),
        Activation::GroupFloat8(group) => Some(Rounding::BlockFloat8(group)),
        Activation::StaticFloat8(scale) => Some(Rounding::StaticFloat8(scale)),
        Activation::Nvfp4(unit) => Some(Rounding::Nvfp4(unit)),
    }
}

impl OnDevice {
    /// `x W^T`: see [`Backend::matmul`].
    pub(super) fn product(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
        input: &Array,
        rows: usize,
        activation: Activation,
    ) -> Result<Array> {
        let tensor = weight.tensor();
        if !can_dequantize(tensor.ty) {
            return default_bodies::matmul(self, weight, matrix, input, rows, activation);
        }
        match self.packing(tensor, rows, activation) {
            Some(packing) => self.matmul_stored(weight, matrix, input, rows, packing),
            None => self.matmul_decoded(weight, matrix, input, rows, activation),
        }
    }

    /// A product with decoded weights.
    fn matmul_decoded(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
        input: &Array,
        rows: usize,
        activation: Activation,
    ) -> Result<Array> {
        let tensor = weight.tensor();
        let device = self.counted("matmul");
        let rounded = match rounding(activation) {
            Some(rounding) => Some(device.round_activation(input, tensor.columns, rounding)?),
            None => None,
        };
        let rounded = rounded.as_ref().unwrap_or(input);
        let mut out = device.uninitialized(rows * tensor.rows)?;
        let tile = self.tile_rows(tensor);
        let parts = self.in_parts(tensor, rounded, rows)?;
        let mut decoded = device.uninitialized(tile * tensor.columns)?;
        let mut sums = match has_minima(tensor.ty) && activation == Activation::Q8_1 {
            true => Some(BlockSums::new(device, input, tensor.columns, tile)?),
            false => None,
        };
        let (resident, for_now) = match weight.packed() {
            Some(matrices) => (Some(matrices), None),
            None => (None, self.send_for_now(weight, matrix)?),
        };
        let packed = resident.as_ref().map(|matrices| &matrices[matrix]);
        let packed = packed.or(for_now.as_ref());
        for first in (0..tensor.rows).step_by(tile) {
            let count = tile.min(tensor.rows - first);
            let part = first..first + count;
            let decoded = &mut decoded;
            self.decode(weight, matrix, packed, part, decoded, sums.as_mut())?;
            let layout = MatmulLayout::linear(rows, tensor.columns, count, first, tensor.rows);
            let input = (rounded, parts.as_ref());
            self.multiply_decoded(&layout, input, decoded, &mut out)?;
            if let Some(sums) = &sums {
                sums.add(device, &layout, &mut out)?;
            }
        }
        Ok(out)
    }

    /// Decodes rows of a matrix to the first values of `out`, and their minima where `sums` will be multiplied with them;
    /// `packed` is the matrix as a packed checkpoint has it.
    fn decode(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
        packed: Option<&packed::Matrix>,
        rows: Range<usize>,
        out: &mut Array,
        sums: Option<&mut BlockSums>,
    ) -> Result<()> {
        if let Some(packed) = packed {
            return packed.decode(self.counted("dequantize"), rows, out);
        }
        let tensor = weight.tensor();
        match tensor.is_packed {
            // Values that the CPU decodes are sent as F32.
            true => self.on_host("dequantize"),
            false => self.open.tally.device("dequantize"),
        }
        let values = rows.len() * tensor.columns;
        let StoredRows { bytes, first } = self.stored(weight, matrix, rows)?;
        if let Some(sums) = sums {
            sums.decode_minima(self.device(), tensor.ty, &bytes, first, values)?;
        }
        Ok(self
            .device()
            .dequantize(tensor.ty, &bytes, first, values, out)?)
    }

    /// How inputs are packed for a product with weights as they are stored; `None` where these are decoded before.
    fn packing(
        &self,
        tensor: &StoredTensor,
        rows: usize,
        activation: Activation,
    ) -> Option<Packing> {
        let device = self.device();
        let Some(rounding) = rounding(activation) else {
            let splits = device.splits_inputs(rows, tensor.rows, tensor.columns);
            return (splits && tensor.ty == GgmlType::BF16).then_some(Packing::Parts);
        };
        // The WGSL twins multiply without tiles and tensor cores: there decoded weights are multiplied.
        let has_tensor_cores = device.description().family == Family::Cuda;
        let packing = Packing::of(tensor.ty, rounding)?;
        (has_tensor_cores && activation.fits(tensor.columns)).then_some(packing)
    }

    /// Inputs of a product in parts, if it is one of parts.
    fn in_parts(
        &self,
        tensor: &StoredTensor,
        input: &Array,
        rows: usize,
    ) -> Result<Option<Packed>> {
        let (device, width) = (self.device(), tensor.columns);
        match device.splits(rows, tensor.rows, width) {
            true => Ok(device.try_split(input, [0, width, 1], rows, width)?),
            false => Ok(None),
        }
    }

    /// `x W^T` for some decoded rows of a weight.
    fn multiply_decoded(
        &self,
        layout: &MatmulLayout,
        (input, parts): (&Array, Option<&Packed>),
        decoded: &Array,
        out: &mut Array,
    ) -> Result<()> {
        let device = self.device();
        let weights = match parts {
            Some(_) => {
                device.try_split(decoded, [0, layout.inner, 1], layout.columns, layout.inner)?
            }
            None => None,
        };
        match parts.zip(weights) {
            Some((x, w)) => {
                let factors = [layout.alpha, layout.beta];
                device.matmul_split(x, 0..layout.rows, &w, factors, layout.out, out)?;
            }
            None => device.matmul(layout, input, decoded, out)?,
        }
        Ok(())
    }

    /// A product without decoded weights: in the arithmetic of runtimes, or of inputs in parts.
    fn matmul_stored(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
        input: &Array,
        rows: usize,
        packing: Packing,
    ) -> Result<Array> {
        let tensor = weight.tensor();
        let device = self.counted("matmul");
        let packed = device.pack(input, rows, tensor.columns, packing)?;
        let mut out = device.uninitialized(rows * tensor.rows)?;
        // Held, so that it does not give way to what is multiplied with it.
        let resident = weight.rows();
        let tile = match resident {
            Some(_) => tensor.rows,
            None => SENT_BYTES / tensor.row_bytes(),
        };
        let tile = tile.max(1);
        for first in (0..tensor.rows).step_by(tile) {
            let count = tile.min(tensor.rows - first);
            let rows = self.stored(weight, matrix, first..first + count)?;
            let place = [first, tensor.rows];
            device.matmul_stored(&packed, &rows.bytes, rows.first, count, place, &mut out)?;
        }
        Ok(out)
    }

    /// Rows of a weight that are decoded together.
    fn tile_rows(&self, tensor: &StoredTensor) -> usize {
        let limit = self.device().description().limits.view_bytes / 2;
        // Where memory is full weights give way: not to tiles of a row.
        let least = self.device().total_bytes() / LEAST_TILES;
        let room = (self.device().free_bytes() / TILES).max(least);
        let bytes = (TILE_BYTES as u64).min(limit).min(room) as usize;
        (bytes / (4 * tensor.columns)).clamp(1, tensor.rows.max(1))
    }
}
