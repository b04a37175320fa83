//! What mixes the tokens of a sequence: convolution, scan, attention. One launch per sequence.

use std::ops::Range;

use super::{groups_of, word};
use crate::array::{Array, Device};
use crate::error::Result;
use crate::kernels;

/// Where the channels of a convolution are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvLayout {
    /// Length of an input row.
    pub stride: usize,
    /// First channel in it.
    pub first: usize,
    /// Channels.
    pub channels: usize,
    /// Taps.
    pub taps: usize,
}

/// Sizes of a scan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScanLayout {
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Groups that share B and C.
    pub groups: usize,
    /// Length of a state.
    pub state_size: usize,
    /// Length of a row of time steps, of which the last `heads` are meant.
    pub dt_stride: usize,
    /// Bounds of the time step.
    pub time_step: (f32, f32),
}

/// Sizes of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionLayout {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub key_value_heads: usize,
    /// Channels of a head, at most [`MAX_HEAD_DIM`](AttentionLayout::MAX_HEAD_DIM).
    pub head_dim: usize,
    /// Queries and sums rounded to F16.
    pub is_f16: bool,
}

impl AttentionLayout {
    /// Widest head that the kernel takes: four channels per thread.
    pub const MAX_HEAD_DIM: usize = 256;
}

impl Device {
    /// Convolution of one sequence, `rows` of the batch; `state [taps - 1, channels]` is replaced. `out [all rows,
    /// channels]`.
    ///
    /// # Errors
    /// Out of memory, device lost.
    #[allow(
        clippy::too_many_arguments,
        reason = "what the kernel takes, and nothing else"
    )]
    pub fn conv1d_silu(
        &self,
        layout: ConvLayout,
        rows: Range<usize>,
        input: &Array,
        state: &mut Array,
        weight: &Array,
        bias: &Array,
        out: &mut Array,
    ) -> Result<()> {
        let ConvLayout {
            stride,
            first,
            channels,
            taps,
        } = layout;
        let sizes = |last| [rows.len(), rows.start, stride, first, channels, last].map(word);
        let views = [
            input.view(),
            state.view(),
            weight.view(),
            bias.view(),
            out.view(),
        ];
        let kernel = &kernels::CONV1D_SILU;
        let groups = groups_of(rows.len() * channels, kernel.threads);
        self.launch(kernel, groups, &views, &sizes(taps))?;
        let after = self.uninitialized(state.len())?;
        let kernel = &kernels::CONV1D_ADVANCE;
        let views = [input.view(), state.view(), after.view()];
        let groups = groups_of(state.len(), kernel.threads);
        self.launch(kernel, groups, &views, &sizes(taps - 1))?;
        *state = after;
        Ok(())
    }

    /// Selective scan of one sequence, `rows` of the batch; `state [heads, state_size, head_dim]` advances. `out [all
    /// rows, heads * head_dim]`.
    ///
    /// # Errors
    /// Device lost.
    pub fn selective_scan(
        &self,
        layout: ScanLayout,
        rows: Range<usize>,
        [xbc, dt, a, d, dt_bias]: [&Array; 5],
        state: &mut Array,
        out: &mut Array,
    ) -> Result<()> {
        let ScanLayout {
            heads,
            head_dim,
            groups,
            state_size,
            dt_stride,
            time_step: (low, high),
        } = layout;
        let inputs = [xbc, dt, a, d, dt_bias];
        let views: Vec<_> = inputs
            .into_iter()
            .chain([&*state, &*out])
            .map(Array::view)
            .collect();
        let sizes = [
            rows.len(),
            rows.start,
            heads,
            head_dim,
            groups,
            state_size,
            dt_stride,
        ]
        .map(word);
        let parameters = [&sizes[..], &[low.to_bits(), high.to_bits()]].concat();
        let kernel = &kernels::SELECTIVE_SCAN;
        let groups = groups_of(heads * head_dim, kernel.threads);
        self.launch(kernel, groups, &views, &parameters)
    }

    /// Attention of one sequence, `rows` of the batch, whose keys and values, of `position` tokens before and of these
    /// rows, are in the caches. `out` as `query`, `[all rows, heads * head_dim]`.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// Heads are too wide, or the caches too short.
    pub fn attention(
        &self,
        layout: AttentionLayout,
        rows: Range<usize>,
        position: usize,
        [query, keys, values]: [&Array; 3],
        out: &mut Array,
    ) -> Result<()> {
        let AttentionLayout {
            heads,
            key_value_heads,
            head_dim,
            is_f16,
        } = layout;
        let cached = (position + rows.len()) * key_value_heads * head_dim;
        assert!(head_dim <= AttentionLayout::MAX_HEAD_DIM);
        assert!(keys.len() >= cached && values.len() >= cached);
        let views = [query.view(), keys.view(), values.view(), out.view()];
        let sizes = [
            rows.len(),
            rows.start,
            position,
            heads,
            key_value_heads,
            head_dim,
        ]
        .map(word);
        let parameters = [&sizes[..], &[u32::from(is_f16)]].concat();
        let groups = word(rows.len() * heads);
        self.launch(&kernels::ATTENTION, groups, &views, &parameters)
    }
}
