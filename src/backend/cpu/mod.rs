//! The CPU backend: the definition of correct, and fast.
//!
//! Enters: mapped or streamed weights, f32 rows. Leaves: f32 rows. One file per operation; threads are those of the
//! current rayon pool.

mod attention;
mod columns;
mod conv1d;
mod elementwise;
pub mod gram;
mod input;
pub mod kernels;
pub(crate) use elementwise::{dot, softplus, sum_of_squares};
pub use elementwise::{exp, exp_f64, largest};
pub use softmax::{exact_kl_divergence, exact_softmax_sums, softmax_sums};
mod matmul;
mod matvec;
pub(crate) mod multiversion;
mod panel;
mod rms_norm;
mod route;
mod selective_scan;
pub(crate) mod shared_rows;
mod softmax;
#[cfg(test)]
mod tests;
mod unpack;

use std::ops::Range;
use std::sync::Arc;

use nemoconv_formats::block;

use super::activation::Activation;
use super::magnitudes::Magnitudes;
use super::{
    AttentionShape, Backend, ColumnSums, ExpertRows, Exponentials, KeyValues, KlDivergence,
    LogitRows, RouteShape, ScanShape, ScanWeights, Segment, SoftmaxSums,
};
use crate::artifact::{PackedMatrix, StoredModel, StoredTensor};
use crate::error::Result;
use crate::parallel;
use kernels::Isa;

/// Where weights are while they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residence {
    /// In the mapped file: pages come when they are touched and stay while there is room.
    Mapped,
    /// In the file: tiles are read into a worker's buffer each time, so that memory stays bounded.
    Streamed,
}

/// The machine this program runs on.
#[derive(Debug)]
pub struct Cpu {
    model: Arc<StoredModel>,
    residence: Residence,
    isa: Isa,
}

/// A weight in its file.
#[derive(Debug)]
pub struct CpuWeight {
    model: Arc<StoredModel>,
    tensor: StoredTensor,
    residence: Residence,
    /// All rows, where the file does not hold them as they are and they are few.
    kept: Option<Vec<u8>>,
}

/// Bytes of a matrix up to which its rows are kept once they were computed.
const KEPT_BYTES: u64 = 4 << 20;

impl CpuWeight {
    fn open(model: &Arc<StoredModel>, tensor: &StoredTensor, residence: Residence) -> Result<Self> {
        let is_mapped = || model.mapped_rows(tensor, 0, 0, tensor.rows).is_some();
        let is_single = residence == Residence::Mapped && tensor.matrices == 1;
        let kept = if is_single && tensor.bytes() <= KEPT_BYTES && !is_mapped() {
            let mut bytes = vec![0; tensor.bytes() as usize];
            model.read_rows(tensor, 0, 0, &mut bytes)?;
            Some(bytes)
        } else {
            None
        };
        Ok(Self {
            model: Arc::clone(model),
            tensor: tensor.clone(),
            residence,
            kept,
        })
    }

    /// What it is.
    pub fn tensor(&self) -> &StoredTensor {
        &self.tensor
    }

    /// What rows of a matrix are decoded from, where a packed checkpoint holds it.
    ///
    /// # Errors
    /// The checkpoint is damaged.
    pub fn packed(&self, matrix: usize) -> Result<Option<PackedMatrix<'_>>> {
        self.model.packed_matrix(&self.tensor, matrix)
    }

    /// Whole rows in the stored type: mapped, or read into `buffer`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn rows<'a>(
        &'a self,
        matrix: usize,
        first: usize,
        count: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        if let Some(kept) = &self.kept {
            let row_bytes = self.tensor.row_bytes();
            return Ok(&kept[first * row_bytes..(first + count) * row_bytes]);
        }
        if self.residence == Residence::Mapped
            && let Some(bytes) = self.model.mapped_rows(&self.tensor, matrix, first, count)
        {
            return Ok(bytes);
        }
        let bytes = count * self.tensor.row_bytes();
        buffer.resize(buffer.len().max(bytes), 0);
        let buffer = &mut buffer[..bytes];
        self.model.read_rows(&self.tensor, matrix, first, buffer)?;
        Ok(buffer)
    }
}

impl Cpu {
    /// A backend for the weights of `model`.
    pub fn new(model: Arc<StoredModel>, residence: Residence) -> Self {
        Self {
            model,
            residence,
            isa: Isa::detect(),
        }
    }

    /// The same without vector instructions: slow, and what machines that have none compute. Sums are rounded in another
    /// order, so results differ as those of two machines do.
    pub fn portable(model: Arc<StoredModel>, residence: Residence) -> Self {
        Self {
            isa: Isa::Portable,
            ..Self::new(model, residence)
        }
    }

    /// The same with instructions that this machine has, though it may have better ones.
    #[cfg(test)]
    pub fn with_isa(self, isa: Isa) -> Self {
        assert!(Isa::all().contains(&isa));
        Self { isa, ..self }
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Weight = CpuWeight;

    fn host(&self) -> &Cpu {
        self
    }

    fn host_weight<'a>(&self, weight: &'a CpuWeight) -> &'a CpuWeight {
        weight
    }

    fn shares_buffers(&self, _: &Self) -> bool {
        true
    }

    fn on_host(&self, _: &'static str) {}

    fn weight(&self, tensor: &StoredTensor) -> Result<CpuWeight> {
        let mut block = vec![0.0; tensor.ty.block_elements()];
        let bytes = vec![0; tensor.ty.block_bytes()];
        block::dequantize(tensor.ty, &bytes, &mut block)
            .map_err(|error| error.in_tensor(&tensor.name).in_file(self.model.path()))?;
        CpuWeight::open(&self.model, tensor, self.residence)
    }

    fn vector(&self, tensor: &StoredTensor) -> Result<Vec<f32>> {
        let mut values = vec![0.0; tensor.weights() as usize];
        self.model
            .dequantize_rows(tensor, 0, 0, &mut Vec::new(), &mut values)?;
        Ok(values)
    }

    fn duplicate(&self, buffer: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(buffer.clone())
    }

    fn upload(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn len(&self, buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn download(&self, buffer: &Vec<f32>, part: Range<usize>) -> Result<Vec<f32>> {
        Ok(buffer[part].to_vec())
    }

    fn download_all(&self, buffer: Vec<f32>) -> Result<Vec<f32>> {
        Ok(buffer)
    }

    fn embed(&self, embedding: &CpuWeight, tokens: &[u32]) -> Result<Vec<f32>> {
        let columns = embedding.tensor.columns;
        let mut rows = vec![0.0; tokens.len() * columns];
        let mut bytes = Vec::new();
        for (row, token) in rows.chunks_exact_mut(columns).zip(tokens) {
            let stored = embedding.rows(0, *token as usize, 1, &mut bytes)?;
            block::dequantize(embedding.tensor.ty, stored, row)?;
        }
        Ok(rows)
    }

    fn matmul(
        &self,
        weight: &CpuWeight,
        matrix: usize,
        input: &Vec<f32>,
        rows: usize,
        activation: Activation,
    ) -> Result<Vec<f32>> {
        let input = &input[..rows * weight.tensor.columns];
        matmul::matmul(self.isa, weight, matrix, input, activation)
    }

    fn rms_norm(&self, input: &Vec<f32>, weight: &Vec<f32>, eps: f32) -> Result<Vec<f32>> {
        Ok(rms_norm::rms_norm(self.isa, input, weight, eps))
    }

    fn gated_rms_norm(
        &self,
        y: Vec<f32>,
        z: &Vec<f32>,
        z_stride: usize,
        weight: &Vec<f32>,
        groups: usize,
        eps: f32,
    ) -> Result<Vec<f32>> {
        Ok(rms_norm::gated_rms_norm(
            self.isa, y, z, z_stride, weight, groups, eps,
        ))
    }

    fn conv1d_silu(
        &self,
        input: &Vec<f32>,
        stride: usize,
        first: usize,
        weight: &Vec<f32>,
        bias: &Vec<f32>,
        segments: &mut [Segment<'_, Vec<f32>>],
    ) -> Result<Vec<f32>> {
        let source = conv1d::Channels {
            values: input,
            stride,
            first,
        };
        Ok(conv1d::conv1d_silu(
            self.isa, source, weight, bias, segments,
        ))
    }

    fn selective_scan(
        &self,
        xbc: &Vec<f32>,
        dt: &Vec<f32>,
        dt_stride: usize,
        weights: ScanWeights<'_, Vec<f32>>,
        shape: ScanShape,
        segments: &mut [Segment<'_, Vec<f32>>],
    ) -> Result<Vec<f32>> {
        Ok(selective_scan::selective_scan(
            self.isa, xbc, dt, dt_stride, weights, shape, segments,
        ))
    }

    fn attention(
        &self,
        query: &Vec<f32>,
        keys: &Vec<f32>,
        values: &Vec<f32>,
        shape: AttentionShape,
        segments: &mut [Segment<'_, KeyValues<Vec<f32>>>],
    ) -> Result<Vec<f32>> {
        Ok(attention::attention(
            self.isa, query, keys, values, shape, segments,
        ))
    }

    fn relu_squared(&self, values: &mut Vec<f32>) -> Result<()> {
        elementwise::relu_squared(self.isa, values);
        Ok(())
    }

    fn scale(&self, values: &mut Vec<f32>, factor: f32) -> Result<()> {
        values.iter_mut().for_each(|value| *value *= factor);
        Ok(())
    }

    fn add_bias(&self, rows: &mut Vec<f32>, bias: &Vec<f32>) -> Result<()> {
        for row in rows.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        Ok(())
    }

    fn is_finite(&self, values: &Vec<f32>) -> Result<bool> {
        Ok(elementwise::is_finite(self.isa, values))
    }

    fn add(&self, sum: &mut Vec<f32>, values: &Vec<f32>) -> Result<()> {
        elementwise::add(self.isa, sum, values);
        Ok(())
    }

    fn route(
        &self,
        logits: &Vec<f32>,
        bias: &Vec<f32>,
        shape: RouteShape,
    ) -> Result<Vec<ExpertRows>> {
        Ok(route::route(logits, bias, shape))
    }

    fn gather(&self, input: &Vec<f32>, width: usize, rows: &[u32]) -> Result<Vec<f32>> {
        let mut gathered = Vec::with_capacity(rows.len() * width);
        for row in rows {
            gathered.extend_from_slice(&input[*row as usize * width..][..width]);
        }
        Ok(gathered)
    }

    fn scatter_add(
        &self,
        sum: &mut Vec<f32>,
        width: usize,
        values: &Vec<f32>,
        rows: &ExpertRows,
    ) -> Result<()> {
        let entries = rows.rows.iter().zip(&rows.weights);
        for ((row, weight), values) in entries.zip(values.chunks_exact(width)) {
            let sum = &mut sum[*row as usize * width..][..width];
            sum.iter_mut()
                .zip(values)
                .for_each(|(s, v)| *s += weight * v);
        }
        Ok(())
    }

    fn softmax_sums(&self, logits: &Vec<f32>, width: usize) -> Result<Vec<SoftmaxSums>> {
        let rows = logits.chunks_exact(width);
        Ok(parallel::map(rows, |logits| {
            softmax::softmax_sums(self.isa, logits)
        }))
    }

    fn kl_divergence(
        &self,
        reference: LogitRows<'_, Vec<f32>>,
        other: LogitRows<'_, Vec<f32>>,
        width: usize,
        exponentials: Exponentials,
    ) -> Result<Vec<KlDivergence>> {
        let rows = reference.logits.chunks_exact(reference.stride);
        let rows = rows.zip(other.logits.chunks_exact(other.stride));
        Ok(parallel::map(rows, |(x, y)| match exponentials {
            Exponentials::Own => softmax::kl_divergence(self.isa, &x[..width], &y[..width]),
            Exponentials::System => {
                softmax::exact_kl_divergence(self.isa, &x[..width], &y[..width])
            }
        }))
    }

    fn scale_rows(&self, rows: &Vec<f32>, width: usize, factors: &[f32]) -> Result<Vec<f32>> {
        Ok(elementwise::scale_rows(rows, width, factors))
    }

    fn column_sums(&self, rows: &Vec<f32>, n: usize) -> Result<ColumnSums> {
        Ok(columns::column_sums(rows, n))
    }

    fn magnitudes(&self, values: &Vec<f32>) -> Result<Magnitudes> {
        Ok(columns::magnitudes(values))
    }

    fn gram(&self, rows: &Vec<f32>, n: usize, sums: &mut [f64]) -> Result<()> {
        gram::second_moments(self.isa, rows, n, sums);
        Ok(())
    }

    fn cross_gram(
        &self,
        (v, width): (&Vec<f32>, usize),
        (u, n): (&Vec<f32>, usize),
        sums: &mut [f64],
    ) -> Result<()> {
        gram::cross_moments(self.isa, (v, width), (u, n), sums);
        Ok(())
    }
}
