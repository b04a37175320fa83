//! What the network needs from a machine: about a dozen coarse operations on f32 arrays and stored weights.
//!
//! Enters: activations, weights in their stored types. Leaves: activations. The CPU backend defines correct; another
//! backend agrees with it within its named tolerance. Knows no layer order and no files beyond the weights it is given.

pub mod activation;
pub mod cpu;

use std::ops::Range;

use crate::artifact::StoredTensor;
use crate::error::Result;
use activation::Activation;

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

/// A machine that runs the network.
///
/// Buffers are f32 arrays; lengths are in values. Weight matrices are `[out_features, in_features]` in their stored
/// type. Every operation is a function of each row (or sequence) alone: results do not depend on what else is in the
/// batch, nor on the number of threads.
pub trait Backend: Sync {
    /// An f32 array on the machine.
    type Buffer: Send + Sync;
    /// A stored tensor that the machine can multiply with.
    type Weight: Send + Sync;

    /// Makes a stored tensor usable; reads it or leaves it to be streamed.
    ///
    /// # Errors
    /// The type cannot be decoded, or the file cannot be read.
    fn weight(&self, tensor: &StoredTensor) -> Result<Self::Weight>;

    /// A stored vector or small matrix as f32 values.
    ///
    /// # Errors
    /// As [`Self::weight`].
    fn vector(&self, tensor: &StoredTensor) -> Result<Self::Buffer>;

    /// An array of zeros.
    fn zeros(&self, len: usize) -> Self::Buffer;

    /// A copy of a buffer.
    fn duplicate(&self, buffer: &Self::Buffer) -> Self::Buffer;

    /// Copies values to the machine.
    fn upload(&self, values: &[f32]) -> Self::Buffer;

    /// Values of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;

    /// Copies a part of a buffer back.
    fn download(&self, buffer: &Self::Buffer, part: Range<usize>) -> Vec<f32>;

    /// All values of a buffer that is no longer needed.
    fn download_all(&self, buffer: Self::Buffer) -> Vec<f32>;

    /// Rows `tokens` of an embedding matrix, `[tokens, columns]`.
    ///
    /// # Errors
    /// The file cannot be read.
    fn embed(&self, embedding: &Self::Weight, tokens: &[u32]) -> Result<Self::Buffer>;

    /// `x W^T` for matrix `matrix` of a stack: `input [rows, in_features]` to `[rows, out_features]`, activations taken
    /// as `activation` says.
    ///
    /// # Errors
    /// The file cannot be read.
    fn matmul(
        &self,
        weight: &Self::Weight,
        matrix: usize,
        input: &Self::Buffer,
        rows: usize,
        activation: Activation,
    ) -> Result<Self::Buffer>;

    /// `x / sqrt(mean(x^2) + eps) * weight` per row of `weight`'s length.
    fn rms_norm(&self, input: &Self::Buffer, weight: &Self::Buffer, eps: f32) -> Self::Buffer;

    /// `y * silu(z)`, then RMS norm in `groups` groups per row, then `weight`: `y` is `[rows, inner]`, `z` the first
    /// `inner` of each `z_stride` values.
    fn gated_rms_norm(
        &self,
        y: Self::Buffer,
        z: &Self::Buffer,
        z_stride: usize,
        weight: &Self::Buffer,
        groups: usize,
        eps: f32,
    ) -> Self::Buffer;

    /// Causal depthwise convolution over time, plus bias, then SiLU.
    ///
    /// Reads channels `first..first + channels` of rows of `stride` values; `weight [channels, taps]`, oldest tap first.
    /// A state holds the last `taps - 1` raw rows, `[taps - 1, channels]`. Gives `[rows, channels]`.
    fn conv1d_silu(
        &self,
        input: &Self::Buffer,
        stride: usize,
        first: usize,
        weight: &Self::Buffer,
        bias: &Self::Buffer,
        segments: &mut [Segment<'_, Self::Buffer>],
    ) -> Self::Buffer;

    /// Mamba-2 selective scan: per head `S = exp(dt A) S + dt x B^T`, `y = S C + D x` with `dt = softplus(dt + bias)`.
    ///
    /// `xbc [rows, conv_dim]`; the dt of a row are the last `heads` of each `dt_stride` values of `dt`. Gives
    /// `[rows, inner]`.
    fn selective_scan(
        &self,
        xbc: &Self::Buffer,
        dt: &Self::Buffer,
        dt_stride: usize,
        weights: ScanWeights<'_, Self::Buffer>,
        shape: ScanShape,
        segments: &mut [Segment<'_, Self::Buffer>],
    ) -> Self::Buffer;

    /// Causal grouped-query attention without positions, scale `1 / sqrt(head_dim)`; appends to the caches.
    fn attention(
        &self,
        query: &Self::Buffer,
        keys: &Self::Buffer,
        values: &Self::Buffer,
        shape: AttentionShape,
        segments: &mut [Segment<'_, KeyValues<Self::Buffer>>],
    ) -> Self::Buffer;

    /// `max(x, 0)^2`, in place.
    fn relu_squared(&self, values: &mut Self::Buffer);

    /// Multiplies every value, in place.
    fn scale(&self, values: &mut Self::Buffer, factor: f32);

    /// Adds one row of values to every row, in place.
    fn add_bias(&self, rows: &mut Self::Buffer, bias: &Self::Buffer);

    /// Whether no value is NaN or infinite.
    fn is_finite(&self, values: &Self::Buffer) -> bool;

    /// `sum += values`.
    fn add(&self, sum: &mut Self::Buffer, values: &Self::Buffer);

    /// Chooses experts from router logits `[rows, experts]`: one entry per expert.
    fn route(
        &self,
        logits: &Self::Buffer,
        bias: &Self::Buffer,
        shape: RouteShape,
    ) -> Vec<ExpertRows>;

    /// The given rows of `width` values each.
    fn gather(&self, input: &Self::Buffer, width: usize, rows: &[u32]) -> Self::Buffer;

    /// `sum[row] += weight * values[i]` for the i-th of `rows`.
    fn scatter_add(
        &self,
        sum: &mut Self::Buffer,
        width: usize,
        values: &Self::Buffer,
        rows: &ExpertRows,
    );
}
