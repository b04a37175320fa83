//! The network on a device: weights as they are stored, decoded and multiplied there.
//!
//! Enters: stored weights, f32 rows. Leaves: f32 rows. Weights lie on the device while they fit; the others are sent tile by
//! tile whenever they are multiplied.

mod minima;
mod mixing;
mod packed;
mod rounding;
mod sums;

use std::ops::Range;
use std::sync::Arc;

use super::activation::Activation;
use super::cpu::{Cpu, CpuWeight};
use super::tally::Tally;
use super::{
    AttentionArithmetic, AttentionShape, Backend, Exponentials, KeyValues, KlDivergence, LogitRows,
    ProductSums, ScanShape, ScanWeights, Segment, SoftmaxSums, default_bodies,
};
use crate::artifact::StoredTensor;
use crate::backend::ExpertRows;
use crate::error::{Error, Result};
use crate::quantize::feedback::RowProducts;
use minima::BlockSums;
use mixing::HeldMatrices;
use nemoconv_device::{
    Array, AttentionLayout, Bytes, ConvLayout, Device, DeviceError, Family, MatmulLayout, Packed,
    Packing, Rounding, ScanLayout, can_dequantize, has_minima,
};
use nemoconv_formats::GgmlType;
use sums::{CrossGramOnDevice, GramOnDevice};

/// Bytes of decoded weights that are multiplied at a time.
const TILE_BYTES: usize = 64 << 20;
/// Bytes that are sent at a time.
const SENT_BYTES: usize = 32 << 20;
/// The part of memory that weights leave to activations.
const RESERVE: u64 = 4;
/// The part of free memory that decoded weights may take.
const TILES: u64 = 8;
/// Where matrices of a stack begin: multiples of this.
const MATRIX_ALIGNMENT: u64 = 256;

/// A device that backends share.
pub struct OpenDevice {
    device: Device,
    tally: Tally,
    matrices: HeldMatrices,
}

impl OpenDevice {
    /// Shares a device.
    pub fn new(device: Device) -> Self {
        Self {
            device,
            tally: Tally::default(),
            matrices: HeldMatrices::default(),
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Which operations ran where.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }
}

/// A device with a model's weights.
pub struct OnDevice {
    open: Arc<OpenDevice>,
    host: Cpu,
}

/// A weight for a device.
pub struct DeviceWeight {
    host: CpuWeight,
    resident: Resident,
}

/// What of a weight lies on the device.
enum Resident {
    /// Nothing: rows, of a packed checkpoint a matrix, are sent when they are multiplied.
    No,
    /// All matrices in the stored type.
    Rows(Bytes),
    /// As a packed checkpoint has it, by matrix.
    Packed(Vec<packed::Matrix>),
}

impl DeviceWeight {
    fn tensor(&self) -> &StoredTensor {
        self.host.tensor()
    }
}

/// Bytes from one matrix of a stack to the next.
fn matrix_stride(tensor: &StoredTensor) -> u64 {
    (tensor.row_bytes() as u64 * tensor.rows as u64).next_multiple_of(MATRIX_ALIGNMENT)
}

/// What was sent; nothing where there was no room for it.
fn or_no_room<T>(sent: Result<T>) -> Result<Option<T>> {
    match sent {
        Err(Error::Device(DeviceError::OutOfMemory { .. })) => Ok(None),
        sent => sent.map(Some),
    }
}

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

/// What the device's package says of a row.
fn sums_of(row: nemoconv_device::SoftmaxSums) -> SoftmaxSums {
    let nemoconv_device::SoftmaxSums { max, best, sum } = row;
    SoftmaxSums { max, best, sum }
}

impl OnDevice {
    /// A backend for the weights that `host` reads.
    pub fn new(open: Arc<OpenDevice>, host: Cpu) -> Self {
        Self { open, host }
    }

    fn device(&self) -> &Device {
        &self.open.device
    }

    fn counted(&self, operation: &'static str) -> &Device {
        self.open.tally.device(operation);
        self.device()
    }

    /// Whether so many more bytes leave enough to activations.
    fn has_room(&self, bytes: u64) -> bool {
        let (free, total) = (self.device().free_bytes(), self.device().total_bytes());
        bytes + total / RESERVE <= free
    }

    /// Sends a weight, unless it would not fit.
    fn make_resident(&self, weight: &CpuWeight) -> Result<Resident> {
        if weight.tensor().is_packed {
            let matrices = self.send_packed(weight);
            if let Some(matrices) = or_no_room(matrices)?.flatten() {
                return Ok(Resident::Packed(matrices));
            }
        }
        let tensor = weight.tensor();
        let bytes = matrix_stride(tensor) * tensor.matrices as u64;
        let limits = self.device().description().limits;
        if !self.has_room(bytes) || bytes > limits.allocation_bytes {
            return Ok(Resident::No);
        }
        let rows = or_no_room(self.send_rows(weight, bytes))?;
        Ok(rows.map_or(Resident::No, Resident::Rows))
    }

    /// Sends a packed weight as its checkpoint has it; `None` where a matrix is something else, or there is no room.
    fn send_packed(&self, weight: &CpuWeight) -> Result<Option<Vec<packed::Matrix>>> {
        let matrices = 0..weight.tensor().matrices;
        let send = |matrix| self.send_matrix(weight, matrix, |bytes| self.has_room(bytes));
        matrices.map(send).collect()
    }

    /// A packed matrix for one product, where the whole weight has no place.
    fn send_for_now(&self, weight: &DeviceWeight, matrix: usize) -> Result<Option<packed::Matrix>> {
        if !weight.tensor().is_packed || !matches!(weight.resident, Resident::No) {
            return Ok(None);
        }
        let fits = |bytes| bytes <= self.device().free_bytes() / TILES;
        Ok(or_no_room(self.send_matrix(&weight.host, matrix, fits))?.flatten())
    }

    fn send_matrix(
        &self,
        weight: &CpuWeight,
        matrix: usize,
        fits: impl Fn(u64) -> bool,
    ) -> Result<Option<packed::Matrix>> {
        let Some(stored) = weight.packed(matrix)? else {
            return Ok(None);
        };
        let limits = self.device().description().limits;
        if !fits(stored.linear.bytes() as u64)
            || packed::bytes_in_a_view(&stored.linear) > limits.view_bytes
        {
            return Ok(None);
        }
        let columns = weight.tensor().columns;
        packed::Matrix::send(self.device(), &stored, columns).map(Some)
    }

    fn send_rows(&self, weight: &CpuWeight, bytes: u64) -> Result<Bytes> {
        let tensor = weight.tensor();
        let mut resident = self.device().reserve_bytes(bytes)?;
        // Whole words: every fourth row ends with one.
        let tile = (SENT_BYTES / tensor.row_bytes()).next_multiple_of(4).max(4);
        let mut buffer = Vec::new();
        for matrix in 0..tensor.matrices {
            for first in (0..tensor.rows).step_by(tile) {
                let count = tile.min(tensor.rows - first);
                let rows = weight.rows(matrix, first, count, &mut buffer)?;
                let at =
                    matrix as u64 * matrix_stride(tensor) + (first * tensor.row_bytes()) as u64;
                self.device().write_bytes(&mut resident, at, rows)?;
            }
        }
        Ok(resident)
    }

    /// Rows of a matrix as they are stored: where they lie on the device, sent to `sent` if they are not there.
    fn stored<'a>(
        &self,
        weight: &'a DeviceWeight,
        matrix: usize,
        rows: Range<usize>,
        sent: &'a mut Option<Bytes>,
    ) -> Result<(&'a Bytes, u64)> {
        let tensor = weight.tensor();
        if let Resident::Rows(resident) = &weight.resident {
            let row = (rows.start * tensor.row_bytes()) as u64;
            return Ok((resident, matrix as u64 * matrix_stride(tensor) + row));
        }
        let mut buffer = Vec::new();
        let stored = weight
            .host
            .rows(matrix, rows.start, rows.len(), &mut buffer)?;
        Ok((sent.insert(self.device().upload_bytes(stored)?), 0))
    }

    /// Decodes rows of a matrix to the first values of `out`, and their minima where `sums` will be multiplied with them;
    /// `for_now` is what [`Self::send_for_now`] sent of it.
    fn decode(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
        for_now: Option<&packed::Matrix>,
        rows: Range<usize>,
        out: &mut Array,
        sums: Option<&mut BlockSums>,
    ) -> Result<()> {
        let packed = match &weight.resident {
            Resident::Packed(matrices) => Some(&matrices[matrix]),
            Resident::No | Resident::Rows(_) => for_now,
        };
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
        let mut sent = None;
        let (bytes, first) = self.stored(weight, matrix, rows, &mut sent)?;
        if let Some(sums) = sums {
            sums.decode_minima(self.device(), tensor.ty, bytes, first, values)?;
        }
        Ok(self
            .device()
            .dequantize(tensor.ty, bytes, first, values, out)?)
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
        let tile = match weight.resident {
            Resident::Rows(_) => tensor.rows,
            _ => SENT_BYTES / tensor.row_bytes(),
        };
        let tile = tile.max(1);
        for first in (0..tensor.rows).step_by(tile) {
            let count = tile.min(tensor.rows - first);
            let mut sent = None;
            let (bytes, at) = self.stored(weight, matrix, first..first + count, &mut sent)?;
            let place = [first, tensor.rows];
            device.matmul_stored(&packed, bytes, at, count, place, &mut out)?;
        }
        Ok(out)
    }

    /// Rows of a weight that are decoded together.
    fn tile_rows(&self, tensor: &StoredTensor) -> usize {
        let limit = self.device().description().limits.view_bytes / 2;
        let free = self.device().free_bytes() / TILES;
        let bytes = (TILE_BYTES as u64).min(limit).min(free) as usize;
        (bytes / (4 * tensor.columns)).clamp(1, tensor.rows.max(1))
    }
}

impl Backend for OnDevice {
    type Buffer = Array;
    type Weight = DeviceWeight;

    fn host(&self) -> &Cpu {
        &self.host
    }

    fn host_weight<'a>(&self, weight: &'a DeviceWeight) -> &'a CpuWeight {
        &weight.host
    }

    fn shares_buffers(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.open, &other.open)
    }

    fn on_host(&self, operation: &'static str) {
        self.open.tally.host(operation);
    }

    fn weight(&self, tensor: &StoredTensor) -> Result<DeviceWeight> {
        let host = self.host.weight(tensor)?;
        let resident = match can_dequantize(tensor.ty) {
            true => self.make_resident(&host)?,
            false => Resident::No,
        };
        Ok(DeviceWeight { host, resident })
    }

    fn upload(&self, values: Vec<f32>) -> Result<Array> {
        Ok(self.device().upload(&values)?)
    }

    fn len(&self, buffer: &Array) -> usize {
        buffer.len()
    }

    fn download(&self, buffer: &Array, part: Range<usize>) -> Result<Vec<f32>> {
        Ok(self.device().download(buffer, part)?)
    }

    fn zeros(&self, len: usize) -> Result<Array> {
        Ok(self.device().zeros(len)?)
    }

    fn duplicate(&self, buffer: &Array) -> Result<Array> {
        Ok(self.device().duplicate(buffer)?)
    }

    fn matmul(
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
        if let Some(packing) = self.packing(tensor, rows, activation) {
            return self.matmul_stored(weight, matrix, input, rows, packing);
        }
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
        let for_now = self.send_for_now(weight, matrix)?;
        for first in (0..tensor.rows).step_by(tile) {
            let count = tile.min(tensor.rows - first);
            let part = first..first + count;
            let (for_now, decoded) = (for_now.as_ref(), &mut decoded);
            self.decode(weight, matrix, for_now, part, decoded, sums.as_mut())?;
            let layout = MatmulLayout::linear(rows, tensor.columns, count, first, tensor.rows);
            let input = (rounded, parts.as_ref());
            self.multiply_decoded(&layout, input, decoded, &mut out)?;
            if let Some(sums) = &sums {
                sums.add(device, &layout, &mut out)?;
            }
        }
        Ok(out)
    }

    fn rms_norm(&self, input: &Array, weight: &Array, eps: f32) -> Result<Array> {
        Ok(self.counted("rms_norm").rms_norm(input, weight, eps)?)
    }

    fn gated_rms_norm(
        &self,
        mut y: Array,
        z: &Array,
        z_stride: usize,
        weight: &Array,
        groups: usize,
        eps: f32,
    ) -> Result<Array> {
        let device = self.counted("gated_rms_norm");
        device.gated_rms_norm(&mut y, z, z_stride, weight, groups, eps)?;
        Ok(y)
    }

    fn conv1d_silu(
        &self,
        input: &Array,
        stride: usize,
        first: usize,
        weight: &Array,
        bias: &Array,
        segments: &mut [Segment<'_, Array>],
    ) -> Result<Array> {
        let device = self.counted("conv1d_silu");
        let channels = bias.len();
        let layout = ConvLayout {
            stride,
            first,
            channels,
            taps: weight.len() / channels,
        };
        let mut out = device.uninitialized(input.len() / stride * channels)?;
        for segment in segments {
            let rows = segment.rows.clone();
            device.conv1d_silu(layout, rows, input, segment.state, weight, bias, &mut out)?;
        }
        Ok(out)
    }

    fn selective_scan(
        &self,
        xbc: &Array,
        dt: &Array,
        dt_stride: usize,
        weights: ScanWeights<'_, Array>,
        shape: ScanShape,
        segments: &mut [Segment<'_, Array>],
    ) -> Result<Array> {
        let device = self.counted("selective_scan");
        let layout = ScanLayout {
            heads: shape.heads,
            head_dim: shape.head_dim,
            groups: shape.groups,
            state_size: shape.state_size,
            dt_stride,
            time_step: shape.time_step,
        };
        let inputs = [xbc, dt, weights.a, weights.d, weights.dt_bias];
        let mut out = device.uninitialized(xbc.len() / shape.conv_dim() * shape.inner())?;
        for segment in segments {
            let rows = segment.rows.clone();
            device.selective_scan(layout, rows, inputs, segment.state, &mut out)?;
        }
        Ok(out)
    }

    fn attention(
        &self,
        query: &Array,
        keys: &Array,
        values: &Array,
        shape: AttentionShape,
        segments: &mut [Segment<'_, KeyValues<Array>>],
    ) -> Result<Array> {
        if shape.head_dim > AttentionLayout::MAX_HEAD_DIM {
            return default_bodies::attention(self, query, keys, values, shape, segments);
        }
        let device = self.counted("attention");
        let is_f16 = shape.arithmetic == AttentionArithmetic::F16;
        let layout = AttentionLayout {
            heads: shape.heads,
            key_value_heads: shape.key_value_heads,
            head_dim: shape.head_dim,
            is_f16,
        };
        let width = shape.key_value_heads * shape.head_dim;
        let rounded = |cached: &Array| match is_f16 {
            true => Ok(Some(device.round_activation(
                cached,
                width,
                Rounding::F16,
            )?)),
            false => Ok::<_, Error>(None),
        };
        let (f16_keys, f16_values) = (rounded(keys)?, rounded(values)?);
        let (keys, values) = (
            f16_keys.as_ref().unwrap_or(keys),
            f16_values.as_ref().unwrap_or(values),
        );
        let mut out = device.uninitialized(query.len())?;
        for segment in segments {
            let rows = segment.rows.clone();
            let cached = rows.start * width..rows.end * width;
            let cache = &mut *segment.state;
            device.append(&mut cache.keys, keys, cached.clone())?;
            device.append(&mut cache.values, values, cached)?;
            let inputs = [query, &cache.keys, &cache.values];
            device.attention(layout, rows, segment.position, inputs, &mut out)?;
        }
        Ok(out)
    }

    fn relu_squared(&self, values: &mut Array) -> Result<()> {
        Ok(self.counted("relu_squared").relu_squared(values)?)
    }

    fn scale(&self, values: &mut Array, factor: f32) -> Result<()> {
        Ok(self.counted("scale").scale(values, factor)?)
    }

    fn add_bias(&self, rows: &mut Array, bias: &Array) -> Result<()> {
        Ok(self.counted("add_bias").add_bias(rows, bias)?)
    }

    fn is_finite(&self, values: &Array) -> Result<bool> {
        Ok(self.counted("is_finite").is_finite(values)?)
    }

    fn add(&self, sum: &mut Array, values: &Array) -> Result<()> {
        Ok(self.counted("add").add(sum, values)?)
    }

    fn gather(&self, input: &Array, width: usize, rows: &[u32]) -> Result<Array> {
        Ok(self.counted("gather").gather(input, width, rows)?)
    }

    fn scatter_add(
        &self,
        sum: &mut Array,
        width: usize,
        values: &Array,
        rows: &ExpertRows,
    ) -> Result<()> {
        let device = self.counted("scatter_add");
        Ok(device.scatter_add(sum, width, values, &rows.rows, &rows.weights)?)
    }

    fn softmax_sums(&self, logits: &Array, width: usize) -> Result<Vec<SoftmaxSums>> {
        let rows = self.counted("softmax_sums").softmax_sums(logits, width)?;
        Ok(rows.into_iter().map(sums_of).collect())
    }

    fn kl_divergence(
        &self,
        reference: LogitRows<'_, Array>,
        other: LogitRows<'_, Array>,
        width: usize,
        _: Exponentials,
    ) -> Result<Vec<KlDivergence>> {
        let device = self.counted("kl_divergence");
        let [reference, other] = [reference, other].map(|rows| nemoconv_device::LogitRows {
            logits: rows.logits,
            stride: rows.stride,
        });
        let rows = device.kl_divergence(reference, other, width)?;
        let divergence = |row: nemoconv_device::KlDivergence| KlDivergence {
            reference: sums_of(row.reference),
            other: sums_of(row.other),
            kl_divergence: row.kl_divergence,
        };
        Ok(rows.into_iter().map(divergence).collect())
    }

    fn gram(&self, rows: &[f32], n: usize, sums: &mut [f64]) -> Result<()> {
        let mut own = GramOnDevice::new(self, n)?;
        own.add(rows, rows)?;
        own.finish(sums)
    }

    fn cross_gram(
        &self,
        (v, width): (&[f32], usize),
        (u, n): (&[f32], usize),
        sums: &mut [f64],
    ) -> Result<()> {
        let mut own = CrossGramOnDevice::new(self, width, n)?;
        own.add(v, u)?;
        own.finish(sums)
    }

    fn gram_sums(&self, n: usize) -> Result<Option<Box<dyn ProductSums + '_>>> {
        if !self.has_room(8 * (n * n) as u64) {
            return Ok(None);
        }
        let sums = or_no_room(GramOnDevice::new(self, n))?;
        Ok(sums.map(|sums| Box::new(sums) as _))
    }

    fn cross_gram_sums(&self, width: usize, n: usize) -> Result<Option<Box<dyn ProductSums + '_>>> {
        if !self.has_room(4 * (width * n) as u64) {
            return Ok(None);
        }
        let sums = or_no_room(CrossGramOnDevice::new(self, width, n))?;
        Ok(sums.map(|sums| Box::new(sums) as _))
    }

    fn row_products(&self) -> Option<&dyn RowProducts> {
        Some(self)
    }
}
