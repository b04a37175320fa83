//! What the network needs from a machine: about twenty coarse operations on f32 arrays and stored weights.
//!
//! Enters: activations, weights in their stored types. Leaves: activations. The CPU backend defines correct; another
//! backend agrees with it within its named tolerance, and leaves to the CPU what it has no kernel for. Knows no layer
//! order and no files beyond the weights it is given.

pub mod activation;
pub mod cpu;
mod default_bodies;
#[cfg(feature = "device")]
pub mod device;
mod machine;
pub mod magnitudes;
pub mod tally;

pub use machine::{Machine, MachineBuffer, MachineWeight, Machines, SIDE_BY_SIDE};

use std::ops::Range;

use crate::artifact::StoredTensor;
use crate::error::Result;
use crate::quantize::feedback::RowProducts;
use activation::Activation;
use cpu::{Cpu, CpuWeight};
use magnitudes::Magnitudes;

/// One sequence's share of a batch, with the state that an operation reads and advances.
///
/// Rows of a batch are `[token, channel]`, row-major, sequences one after the other.
#[derive(Debug)]
pub struct Segment<'a, B> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Tokens that the state has seen before.
    pub position: usize,
    /// The state.
    pub state: &'a mut B,
}

/// Sizes of a Mamba-2 mixer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScanShape {
    /// `mamba_num_heads`.
    pub heads: usize,
    /// `mamba_head_dim`.
    pub head_dim: usize,
    /// `n_groups`: consecutive heads of a group share B and C.
    pub groups: usize,
    /// `ssm_state_size`.
    pub state_size: usize,
    /// Bounds of the time step after softplus.
    pub time_step: (f32, f32),
}

impl ScanShape {
    /// `heads * head_dim`.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of x, B and C.
    pub fn conv_dim(&self) -> usize {
        self.inner() + 2 * self.groups * self.state_size
    }

    /// Values of one SSM state: `[head, state, channel of the head]`.
    pub fn state_len(&self) -> usize {
        self.inner() * self.state_size
    }
}

/// Parameters of a scan, one value per head.
#[derive(Debug)]
pub struct ScanWeights<'a, B> {
    /// A, negative.
    pub a: &'a B,
    /// D, the skip.
    pub d: &'a B,
    /// `dt_bias`.
    pub dt_bias: &'a B,
}

/// Sizes of grouped-query attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; `heads / key_value_heads` consecutive query heads share one.
    pub key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What is rounded on the way.
    pub arithmetic: AttentionArithmetic,
}

/// In what attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionArithmetic {
    /// As it is defined.
    F32,
    /// As llama.cpp's flash attention on CPU: queries, keys and values in F16, and sums of values too.
    F16,
}

/// Keys and values of one sequence, `[position, key-value head, channel]` each.
#[derive(Debug, Clone, Default)]
pub struct KeyValues<B> {
    /// Keys.
    pub keys: B,
    /// Values.
    pub values: B,
}

/// How a MoE block chooses experts.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RouteShape {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub chosen: usize,
    /// Groups of consecutive experts.
    pub groups: usize,
    /// Groups that stay in the choice.
    pub chosen_groups: usize,
    /// Divide the weights by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// One expert's share of a batch: which rows it serves and with what weight.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExpertRows {
    /// Rows of the batch, ascending.
    pub rows: Vec<u32>,
    /// The weight of the expert's output for each.
    pub weights: Vec<f32>,
}

/// What softmax needs of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftmaxSums {
    /// The largest; NaN is passed over.
    pub max: f32,
    /// Index of the first largest.
    pub best: usize,
    /// `sum e^(logit - max)`; NaN where a logit is, or is +infinity.
    pub sum: f64,
}

/// Whose exponentials the CPU takes where it compares distributions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exponentials {
    /// Its own, in f32: the same on every machine, for what is decided by them.
    Own,
    /// The system's, in f64: for what is only reported.
    System,
}

/// Two rows of logits as distributions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KlDivergence {
    /// The first row.
    pub reference: SoftmaxSums,
    /// The second row.
    pub other: SoftmaxSums,
    /// KL(reference || other), nats; NaN where a logit is.
    pub kl_divergence: f64,
}

/// Rows of logits of which the first values count.
#[derive(Debug)]
pub struct LogitRows<'a, B> {
    /// `[rows, stride]`.
    pub logits: &'a B,
    /// Values from one row to the next.
    pub stride: usize,
}

/// What the columns of some rows come to.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnSums {
    /// Sums of values.
    pub sums: Vec<f64>,
    /// Sums of squares.
    pub squares: Vec<f64>,
    /// Largest magnitudes; NaN is passed over.
    pub max_abs: Vec<f32>,
}

/// Products of rows, summed up on a machine that holds them as `B`.
pub trait ProductSums<B>: Sync {
    /// Sums up the products of as many rows `v [_, width]` and `u [_, n]`; of second moments `u` alone is read.
    ///
    /// # Errors
    /// The machine fails.
    fn add(&mut self, v: &B, u: &B) -> Result<()>;

    /// Adds what was summed up to `sums [width, n]`.
    ///
    /// # Errors
    /// The machine fails.
    fn finish(&self, sums: &mut [f64]) -> Result<()>;
}

/// A machine that runs the network.
///
/// Buffers are f32 arrays; lengths are in values. Weight matrices are `[out_features, in_features]` in their stored
/// type. Every operation is a function of each row (or sequence) alone: results do not depend on what else is in the
/// batch, nor on the number of threads.
///
/// What a machine has no kernel for it leaves as it is here: buffers are brought to the [host](Backend::host), computed
/// there and brought back. All operations fail where the machine does: out of memory, lost.
pub trait Backend: Sync {
    /// An f32 array on the machine.
    type Buffer: Send + Sync;
    /// A stored tensor that the machine can multiply with.
    type Weight: Send + Sync;

    /// The CPU beside the machine.
    fn host(&self) -> &Cpu;

    /// The weight as the host has it.
    fn host_weight<'a>(&self, weight: &'a Self::Weight) -> &'a CpuWeight;

    /// Whether it takes buffers of the other as its own.
    fn shares_buffers(&self, other: &Self) -> bool;

    /// Told that the host computes an operation in the machine's place.
    fn on_host(&self, operation: &'static str);

    /// Makes a stored tensor usable; reads it or leaves it to be streamed.
    ///
    /// # Errors
    /// The type cannot be decoded, or the file cannot be read.
    fn weight(&self, tensor: &StoredTensor) -> Result<Self::Weight>;

    /// Copies values to the machine.
    ///
    /// # Errors
    /// The machine fails.
    fn upload(&self, values: Vec<f32>) -> Result<Self::Buffer>;

    /// Values of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;

    /// Copies a part of a buffer back.
    ///
    /// # Errors
    /// The machine fails.
    fn download(&self, buffer: &Self::Buffer, part: Range<usize>) -> Result<Vec<f32>>;

    /// All values of a buffer that is no longer needed.
    ///
    /// # Errors
    /// The machine fails.
    fn download_all(&self, buffer: Self::Buffer) -> Result<Vec<f32>> {
        self.download(&buffer, 0..self.len(&buffer))
    }

    /// A stored vector or small matrix as f32 values.
    ///
    /// # Errors
    /// The type cannot be decoded, or the file cannot be read.
    fn vector(&self, tensor: &StoredTensor) -> Result<Self::Buffer> {
        self.upload(self.host().vector(tensor)?)
    }

    /// An array of zeros.
    ///
    /// # Errors
    /// The machine fails.
    fn zeros(&self, len: usize) -> Result<Self::Buffer> {
        self.upload(vec![0.0; len])
    }

    /// Arrays of zeros, of these lengths, that lie on the machine as long as the work takes; `None` where that is the
    /// business of this computer's memory, or there is no room for them beside the work.
    ///
    /// # Errors
    /// The machine fails.
    fn kept_zeros(&self, lengths: &[usize]) -> Result<Option<Vec<Self::Buffer>>> {
        let _ = lengths;
        Ok(None)
    }

    /// A copy of a buffer that is kept beside what is computed; `None` where the machine has no room for it.
    ///
    /// # Errors
    /// The machine fails.
    fn kept_copy(&self, buffer: &Self::Buffer) -> Result<Option<Self::Buffer>> {
        self.duplicate(buffer).map(Some)
    }

    /// A copy of a buffer.
    ///
    /// # Errors
    /// The machine fails.
    fn duplicate(&self, buffer: &Self::Buffer) -> Result<Self::Buffer> {
        default_bodies::duplicate(self, buffer)
    }

    /// Rows `tokens` of an embedding matrix, `[tokens, columns]`.
    ///
    /// # Errors
    /// The file cannot be read.
    fn embed(&self, embedding: &Self::Weight, tokens: &[u32]) -> Result<Self::Buffer> {
        default_bodies::embed(self, embedding, tokens)
    }

    /// `x W^T` for matrix `matrix` of a stack: `input [rows, in_features]` to `[rows, out_features]`, activations taken
    /// as `activation` says.
    ///
    /// # Errors
    /// The file cannot be read, or the machine fails.
    fn matmul(
        &self,
        weight: &Self::Weight,
        matrix: usize,
        input: &Self::Buffer,
        rows: usize,
        activation: Activation,
    ) -> Result<Self::Buffer> {
        default_bodies::matmul(self, weight, matrix, input, rows, activation)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` per row of `weight`'s length.
    ///
    /// # Errors
    /// The machine fails.
    fn rms_norm(
        &self,
        input: &Self::Buffer,
        weight: &Self::Buffer,
        eps: f32,
    ) -> Result<Self::Buffer> {
        default_bodies::rms_norm(self, input, weight, eps)
    }

    /// `y * silu(z)`, then RMS norm in `groups` groups per row, then `weight`: `y` is `[rows, inner]`, `z` the first
    /// `inner` of each `z_stride` values.
    ///
    /// # Errors
    /// The machine fails.
    fn gated_rms_norm(
        &self,
        y: Self::Buffer,
        z: &Self::Buffer,
        z_stride: usize,
        weight: &Self::Buffer,
        groups: usize,
        eps: f32,
    ) -> Result<Self::Buffer> {
        default_bodies::gated_rms_norm(self, y, z, z_stride, weight, groups, eps)
    }

    /// Causal depthwise convolution over time, plus bias, then SiLU.
    ///
    /// Reads channels `first..first + channels` of rows of `stride` values; `weight [channels, taps]`, oldest tap first.
    /// A state holds the last `taps - 1` raw rows, `[taps - 1, channels]`. Gives `[rows, channels]`.
    ///
    /// # Errors
    /// The machine fails.
    fn conv1d_silu(
        &self,
        input: &Self::Buffer,
        stride: usize,
        first: usize,
        weight: &Self::Buffer,
        bias: &Self::Buffer,
        segments: &mut [Segment<'_, Self::Buffer>],
    ) -> Result<Self::Buffer> {
        default_bodies::conv1d_silu(self, input, stride, first, weight, bias, segments)
    }

    /// Mamba-2 selective scan: per head `S = exp(dt A) S + dt x B^T`, `y = S C + D x` with `dt = softplus(dt + bias)`.
    ///
    /// `xbc [rows, conv_dim]`; the dt of a row are the last `heads` of each `dt_stride` values of `dt`. Gives
    /// `[rows, inner]`.
    ///
    /// # Errors
    /// The machine fails.
    fn selective_scan(
        &self,
        xbc: &Self::Buffer,
        dt: &Self::Buffer,
        dt_stride: usize,
        weights: ScanWeights<'_, Self::Buffer>,
        shape: ScanShape,
        segments: &mut [Segment<'_, Self::Buffer>],
    ) -> Result<Self::Buffer> {
        default_bodies::selective_scan(self, xbc, dt, dt_stride, weights, shape, segments)
    }

    /// Causal grouped-query attention without positions, scale `1 / sqrt(head_dim)`; appends to the caches.
    ///
    /// # Errors
    /// The machine fails.
    fn attention(
        &self,
        query: &Self::Buffer,
        keys: &Self::Buffer,
        values: &Self::Buffer,
        shape: AttentionShape,
        segments: &mut [Segment<'_, KeyValues<Self::Buffer>>],
    ) -> Result<Self::Buffer> {
        default_bodies::attention(self, query, keys, values, shape, segments)
    }

    /// `max(x, 0)^2`, in place.
    ///
    /// # Errors
    /// The machine fails.
    fn relu_squared(&self, values: &mut Self::Buffer) -> Result<()> {
        default_bodies::relu_squared(self, values)
    }

    /// Multiplies every value, in place.
    ///
    /// # Errors
    /// The machine fails.
    fn scale(&self, values: &mut Self::Buffer, factor: f32) -> Result<()> {
        default_bodies::scale(self, values, factor)
    }

    /// Adds one row of values to every row, in place.
    ///
    /// # Errors
    /// The machine fails.
    fn add_bias(&self, rows: &mut Self::Buffer, bias: &Self::Buffer) -> Result<()> {
        default_bodies::add_bias(self, rows, bias)
    }

    /// Whether no value is NaN or infinite.
    ///
    /// # Errors
    /// The machine fails.
    fn is_finite(&self, values: &Self::Buffer) -> Result<bool> {
        default_bodies::is_finite(self, values)
    }

    /// `sum += values`.
    ///
    /// # Errors
    /// The machine fails.
    fn add(&self, sum: &mut Self::Buffer, values: &Self::Buffer) -> Result<()> {
        default_bodies::add(self, sum, values)
    }

    /// Chooses experts from router logits `[rows, experts]`: one entry per expert. The choice is made in f64, so that ties
    /// of scores in f32 are none.
    ///
    /// # Errors
    /// The machine fails.
    fn route(
        &self,
        logits: &Self::Buffer,
        bias: &Self::Buffer,
        shape: RouteShape,
    ) -> Result<Vec<ExpertRows>> {
        default_bodies::route(self, logits, bias, shape)
    }

    /// The given rows of `width` values each.
    ///
    /// # Errors
    /// The machine fails.
    fn gather(&self, input: &Self::Buffer, width: usize, rows: &[u32]) -> Result<Self::Buffer> {
        default_bodies::gather(self, input, width, rows)
    }

    /// `sum[row] += weight * values[i]` for the i-th of `rows`.
    ///
    /// # Errors
    /// The machine fails.
    fn scatter_add(
        &self,
        sum: &mut Self::Buffer,
        width: usize,
        values: &Self::Buffer,
        rows: &ExpertRows,
    ) -> Result<()> {
        default_bodies::scatter_add(self, sum, width, values, rows)
    }

    /// What softmax needs of every row of `width` logits.
    ///
    /// # Errors
    /// The machine fails.
    fn softmax_sums(&self, logits: &Self::Buffer, width: usize) -> Result<Vec<SoftmaxSums>> {
        default_bodies::softmax_sums(self, logits, width)
    }

    /// The KL divergence of each row of `reference` and that of `other`, of both of which `width` logits count. Another
    /// machine than the CPU takes its own exponentials, and may give NaN where logits are beyond 1e30.
    ///
    /// # Errors
    /// The machine fails.
    fn kl_divergence(
        &self,
        reference: LogitRows<'_, Self::Buffer>,
        other: LogitRows<'_, Self::Buffer>,
        width: usize,
        exponentials: Exponentials,
    ) -> Result<Vec<KlDivergence>> {
        default_bodies::kl_divergence(self, reference, other, width, exponentials)
    }

    /// Rows of `width` values, each times its factor.
    ///
    /// # Errors
    /// The machine fails.
    fn scale_rows(
        &self,
        rows: &Self::Buffer,
        width: usize,
        factors: &[f32],
    ) -> Result<Self::Buffer> {
        default_bodies::scale_rows(self, rows, width, factors)
    }

    /// What the columns of `rows [_, n]` come to; on a device squares are rounded to f32 before they are summed up.
    ///
    /// # Errors
    /// The machine fails.
    fn column_sums(&self, rows: &Self::Buffer, n: usize) -> Result<ColumnSums> {
        default_bodies::column_sums(self, rows, n)
    }

    /// How large values are.
    ///
    /// # Errors
    /// The machine fails.
    fn magnitudes(&self, values: &Self::Buffer) -> Result<Magnitudes> {
        default_bodies::magnitudes(self, values)
    }

    /// `sums += X^T X` for `rows [_, n]`, `sums [n, n]`; columns from about the row on are meant.
    ///
    /// # Errors
    /// The machine fails.
    fn gram(&self, rows: &Self::Buffer, n: usize, sums: &mut [f64]) -> Result<()> {
        default_bodies::gram(self, rows, n, sums)
    }

    /// `sums += V^T U` for as many rows of both, `v [_, width]`, `u [_, n]`: `sums [width, n]`.
    ///
    /// # Errors
    /// The machine fails.
    fn cross_gram(
        &self,
        v: (&Self::Buffer, usize),
        u: (&Self::Buffer, usize),
        sums: &mut [f64],
    ) -> Result<()> {
        default_bodies::cross_gram(self, v, u, sums)
    }

    /// Sums as those of [`Self::gram`] that stay on the machine between calls; `None` where they are best summed here, or
    /// there is no room for them.
    ///
    /// # Errors
    /// The machine fails.
    fn gram_sums(&self, n: usize) -> Result<Option<Box<dyn ProductSums<Self::Buffer> + '_>>> {
        let _ = n;
        Ok(None)
    }

    /// The same for [`Self::cross_gram`].
    ///
    /// # Errors
    /// The machine fails.
    fn cross_gram_sums(
        &self,
        width: usize,
        n: usize,
    ) -> Result<Option<Box<dyn ProductSums<Self::Buffer> + '_>>> {
        let _ = (width, n);
        Ok(None)
    }

    /// Who multiplies errors, factors and targets while matrices are rounded, if not the CPU.
    fn row_products(&self) -> Option<&dyn RowProducts> {
        None
    }
}
