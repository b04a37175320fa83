//! What a sequence leaves behind: convolution rows, SSM states, keys and values. Saved by forking.

use crate::backend::{Backend, KeyValues, ScanShape};
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;

/// The state of one block.
pub enum BlockState<B: Backend> {
    /// Of a Mamba-2 mixer.
    Mamba {
        /// The last raw rows of the convolution, `[taps - 1, channels]`.
        conv: B::Buffer,
        /// `[head, state, channel of the head]`.
        ssm: B::Buffer,
    },
    /// Of attention.
    Attention(KeyValues<B::Buffer>),
    /// MLP and MoE remember nothing.
    Stateless,
}

impl<B: Backend> BlockState<B> {
    fn empty(kind: BlockKind, backend: &B, config: &NemotronHConfig, scan: &ScanShape) -> Self {
        match kind {
            BlockKind::Mamba => Self::Mamba {
                conv: backend.zeros((config.conv_kernel - 1) * scan.conv_dim()),
                ssm: backend.zeros(scan.state_len()),
            },
            BlockKind::Attention => Self::Attention(KeyValues {
                keys: backend.zeros(0),
                values: backend.zeros(0),
            }),
            BlockKind::Mlp | BlockKind::Moe => Self::Stateless,
        }
    }
}

/// The state of one sequence after some tokens.
pub struct State<B: Backend> {
    /// Tokens seen.
    pub position: usize,
    /// One per block.
    pub blocks: Vec<BlockState<B>>,
}

impl<B: Backend> State<B> {
    /// Before the first token.
    pub fn empty(backend: &B, config: &NemotronHConfig, scan: &ScanShape) -> Self {
        let kinds = config.pattern.kinds().iter();
        Self {
            position: 0,
            blocks: kinds
                .map(|kind| BlockState::empty(*kind, backend, config, scan))
                .collect(),
        }
    }

    /// The same where block `block` alone will be run.
    pub fn of_block(backend: &B, config: &NemotronHConfig, scan: &ScanShape, block: usize) -> Self {
        let mut blocks: Vec<_> = (0..block).map(|_| BlockState::Stateless).collect();
        blocks.push(BlockState::empty(
            config.pattern.kinds()[block],
            backend,
            config,
            scan,
        ));
        Self {
            position: 0,
            blocks,
        }
    }

    /// An independent copy: whatever is run from it leaves this one as it is.
    pub fn fork(&self, backend: &B) -> Self {
        let block = |block: &BlockState<B>| match block {
            BlockState::Mamba { conv, ssm } => BlockState::Mamba {
                conv: backend.duplicate(conv),
                ssm: backend.duplicate(ssm),
            },
            BlockState::Attention(cache) => BlockState::Attention(KeyValues {
                keys: backend.duplicate(&cache.keys),
                values: backend.duplicate(&cache.values),
            }),
            BlockState::Stateless => BlockState::Stateless,
        };
        Self {
            position: self.position,
            blocks: self.blocks.iter().map(block).collect(),
        }
    }

    /// `count` states like this one, of which the last is it.
    pub fn into_forks(self, backend: &B, count: usize) -> Vec<Self> {
        let mut forks: Vec<_> = (1..count).map(|_| self.fork(backend)).collect();
        forks.extend((count > 0).then_some(self));
        forks
    }
}
