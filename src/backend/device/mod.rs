//! The network on a device: weights as they are stored, decoded and multiplied there.
//!
//! Enters: stored weights, f32 rows. Leaves: f32 rows. Weights lie on the device while they fit; the others are sent tile by
//! tile whenever they are multiplied.

mod minima;
mod mixing;
mod packed;
mod product;
mod rounding;
mod sums;
mod weights;

use std::ops::Range;
use std::sync::Arc;

use super::activation::Activation;
use super::cpu::{Cpu, CpuWeight};
use super::magnitudes::{self, Magnitudes};
use super::tally::Tally;
use super::{
    AttentionArithmetic, AttentionShape, Backend, ColumnSums, Exponentials, KeyValues,
    KlDivergence, LogitRows, ProductSums, ScanShape, ScanWeights, Segment, SoftmaxSums,
    default_bodies,
};
use crate::artifact::StoredTensor;
use crate::backend::ExpertRows;
use crate::error::{Error, Result};
use crate::quantize::feedback::RowProducts;
use mixing::HeldMatrices;
use nemoconv_device::{
    Array, AttentionLayout, ConvLayout, Device, DeviceError, MagnitudeBins, Rounding, ScanLayout,
    can_dequantize,
};
use sums::{CrossGramOnDevice, GramOnDevice};
pub use weights::DeviceWeight;
use weights::Resident;

/// Bytes of decoded weights that are multiplied at a time.
const TILE_BYTES: usize = 64 << 20;
/// Bytes that are sent at a time.
const SENT_BYTES: usize = 32 << 20;
/// The part of free memory that decoded weights may take.
const TILES: u64 = 8;
/// The part of free memory that streams which stay on the device may take.
const KEPT: u64 = 4;

/// Sums that stay on the device.
type SumsOnDevice<'a> = Box<dyn ProductSums<Array> + 'a>;

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

/// What was sent; nothing where there was no room for it.
fn or_no_room<T>(sent: Result<T>) -> Result<Option<T>> {
    match sent {
        Err(Error::Device(DeviceError::OutOfMemory { .. })) => Ok(None),
        sent => sent.map(Some),
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

    fn kept_zeros(&self, lengths: &[usize]) -> Result<Option<Vec<Array>>> {
        let bytes = lengths.iter().map(|len| 4 * *len as u64).sum::<u64>();
        if bytes > self.device().free_bytes() / KEPT || !self.has_room(bytes) {
            return Ok(None);
        }
        let zeros = lengths.iter().map(|len| self.device().zeros(*len));
        or_no_room(
            zeros
                .collect::<std::result::Result<_, _>>()
                .map_err(Error::from),
        )
    }

    fn kept_copy(&self, buffer: &Array) -> Result<Option<Array>> {
        or_no_room(self.duplicate(buffer))
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
        self.product(weight, matrix, input, rows, activation)
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

    fn scale_rows(&self, rows: &Array, width: usize, factors: &[f32]) -> Result<Array> {
        let device = self.counted("scale_rows");
        let mut scaled = device.zeros(factors.len() * width)?;
        let each: Vec<u32> = (0..).take(factors.len()).collect();
        device.scatter_add(&mut scaled, width, rows, &each, factors)?;
        Ok(scaled)
    }

    fn column_sums(&self, rows: &Array, n: usize) -> Result<ColumnSums> {
        let found = self.counted("column_sums").column_sums(rows, n)?;
        Ok(ColumnSums {
            sums: found.sums,
            squares: found.squares,
            max_abs: found.max_abs,
        })
    }

    fn magnitudes(&self, values: &Array) -> Result<Magnitudes> {
        let bins = MagnitudeBins {
            shift: magnitudes::SHIFT,
            least: magnitudes::LEAST,
        };
        let counts = self.counted("magnitudes").magnitude_counts(values, bins)?;
        Ok(Magnitudes::of_counts(counts))
    }

    fn gram(&self, rows: &Array, n: usize, sums: &mut [f64]) -> Result<()> {
        let Some(mut own) = or_no_room(GramOnDevice::new(self, n))? else {
            return default_bodies::gram(self, rows, n, sums);
        };
        own.add(rows, rows)?;
        own.finish(sums)
    }

    fn cross_gram(
        &self,
        (v, width): (&Array, usize),
        (u, n): (&Array, usize),
        sums: &mut [f64],
    ) -> Result<()> {
        let Some(mut own) = or_no_room(CrossGramOnDevice::new(self, width, n))? else {
            return default_bodies::cross_gram(self, (v, width), (u, n), sums);
        };
        own.add(v, u)?;
        own.finish(sums)
    }

    fn gram_sums(&self, n: usize) -> Result<Option<SumsOnDevice<'_>>> {
        if !self.has_room(8 * (n * n) as u64) {
            return Ok(None);
        }
        let sums = or_no_room(GramOnDevice::new(self, n))?;
        Ok(sums.map(|sums| Box::new(sums) as _))
    }

    fn cross_gram_sums(&self, width: usize, n: usize) -> Result<Option<SumsOnDevice<'_>>> {
        if !self.has_room(8 * (width * n) as u64) {
            return Ok(None);
        }
        let sums = or_no_room(CrossGramOnDevice::new(self, width, n))?;
        Ok(sums.map(|sums| Box::new(sums) as _))
    }

    fn row_products(&self) -> Option<&dyn RowProducts> {
        Some(self)
    }
}
