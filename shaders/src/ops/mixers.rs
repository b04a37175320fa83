//! What mixes the tokens of a sequence: convolution, scan, attention. One launch per sequence, or per part of its rows.

use std::ops::Range;

use super::parts::RowPart;
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
        let row_bytes = [4 * layout.stride, 4 * layout.channels];
        for part in self.parts_of_rows(rows, &row_bytes) {
            self.conv1d_part(layout, &part, input, state, [weight, bias], out)?;
        }
        Ok(())
    }

    fn conv1d_part(
        &self,
        layout: ConvLayout,
        part: &RowPart,
        input: &Array,
        state: &mut Array,
        [weight, bias]: [&Array; 2],
        out: &Array,
    ) -> Result<()> {
        let ConvLayout {
            stride,
            first,
            channels,
            taps,
        } = layout;
        let rows = part.rows.len();
        let sizes = |last| {
            let [stride, first, channels, last] = [stride, first, channels, last].map(word);
            [word(rows), part.first_row(), stride, first, channels, last]
        };
        let input = part.view(input, stride);
        let views = [
            input,
            state.view(),
            weight.view(),
            bias.view(),
            part.view(out, channels),
        ];
        let kernel = &kernels::CONV1D_SILU;
        let groups = groups_of(rows * channels, kernel.threads);
        self.launch(kernel, groups, &views, &sizes(taps))?;
        let after = self.uninitialized(state.len())?;
        let kernel = &kernels::CONV1D_ADVANCE;
        let views = [input, state.view(), after.view()];
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
        let inner = heads * head_dim;
        let width = inner + 2 * groups * state_size;
        let sizes = [heads, head_dim, groups, state_size, dt_stride].map(word);
        let kernel = &kernels::SELECTIVE_SCAN;
        let thread_groups = groups_of(inner, kernel.threads);
        for part in self.parts_of_rows(rows, &[width, dt_stride, inner].map(|width| 4 * width)) {
            let views = [
                part.view(xbc, width),
                part.view(dt, dt_stride),
                a.view(),
                d.view(),
                dt_bias.view(),
                state.view(),
                part.view(out, inner),
            ];
            let rows = [word(part.rows.len()), part.first_row()];
            let bounds = [low.to_bits(), high.to_bits()];
            let parameters = [&rows[..], &sizes, &bounds].concat();
            self.launch(kernel, thread_groups, &views, &parameters)?;
        }
        Ok(())
    }

    /// Attention of one sequence, `rows` of the batch, whose keys and values, of `position` tokens before and of these
    /// rows, are in the caches. `out` as `query`, `[all rows, heads * head_dim]`.
    ///
    /// # Errors
    /// Device lost; the keys of the sequence are more than a view may span.
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
        let (width, cached) = (heads * head_dim, key_value_heads * head_dim);
        let positions = position + rows.len();
        assert!(head_dim <= AttentionLayout::MAX_HEAD_DIM);
        assert!(keys.len().min(values.len()) >= positions * cached);
        let sizes = [heads, key_value_heads, head_dim].map(word);
        for part in self.parts_of_rows(rows.clone(), &[4 * width]) {
            let before = position + part.rows.start - rows.start;
            let seen = 0..(before + part.rows.len()) * cached;
            let views = [
                part.view(query, width),
                keys.part(seen.clone()).0,
                values.part(seen).0,
                part.view(out, width),
            ];
            let rows = [word(part.rows.len()), part.first_row(), word(before)];
            let parameters = [&rows[..], &sizes, &[u32::from(is_f16)]].concat();
            let groups = word(part.rows.len() * heads);
            self.launch(&kernels::ATTENTION, groups, &views, &parameters)?;
        }
        Ok(())
    }
}
