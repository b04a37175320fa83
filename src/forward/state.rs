//! What a sequence leaves behind: convolution rows, SSM states, keys and values. Saved by forking.

use crate::backend::{Backend, KeyValues, ScanShape};
use crate::error::Result;
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
    fn empty(
        kind: BlockKind,
        backend: &B,
        config: &NemotronHConfig,
        scan: &ScanShape,
    ) -> Result<Self> {
        Ok(match kind {
            BlockKind::Mamba => Self::Mamba {
                conv: backend.zeros((config.conv_kernel - 1) * scan.conv_dim())?,
                ssm: backend.zeros(scan.state_len())?,
            },
            BlockKind::Attention => Self::Attention(KeyValues {
                keys: backend.zeros(0)?,
                values: backend.zeros(0)?,
            }),
            BlockKind::Mlp | BlockKind::Moe => Self::Stateless,
        })
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
    ///
    /// # Errors
    /// The machine fails.
    pub fn empty(backend: &B, config: &NemotronHConfig, scan: &ScanShape) -> Result<Self> {
        let kinds = config.pattern.kinds().iter();
        Ok(Self {
            position: 0,
            blocks: kinds
                .map(|kind| BlockState::empty(*kind, backend, config, scan))
                .collect::<Result<_>>()?,
        })
    }

    /// The same where block `block` alone will be run.
    ///
    /// # Errors
    /// The machine fails.
    pub fn of_block(
        backend: &B,
        config: &NemotronHConfig,
        scan: &ScanShape,
        block: usize,
    ) -> Result<Self> {
        let mut blocks: Vec<_> = (0..block).map(|_| BlockState::Stateless).collect();
        let kind = config.pattern.kinds()[block];
        blocks.push(BlockState::empty(kind, backend, config, scan)?);
        Ok(Self {
            position: 0,
            blocks,
        })
    }

    /// An independent copy: whatever is run from it leaves this one as it is.
    ///
    /// # Errors
    /// The machine fails.
    pub fn fork(&self, backend: &B) -> Result<Self> {
        let block = |block: &BlockState<B>| -> Result<_> {
            Ok(match block {
                BlockState::Mamba { conv, ssm } => BlockState::Mamba {
                    conv: backend.duplicate(conv)?,
                    ssm: backend.duplicate(ssm)?,
                },
                BlockState::Attention(cache) => BlockState::Attention(KeyValues {
                    keys: backend.duplicate(&cache.keys)?,
                    values: backend.duplicate(&cache.values)?,
                }),
                BlockState::Stateless => BlockState::Stateless,
            })
        };
        Ok(Self {
            position: self.position,
            blocks: self.blocks.iter().map(block).collect::<Result<_>>()?,
        })
    }

    /// `count` states like this one, of which the last is it.
    ///
    /// # Errors
    /// The machine fails.
    pub fn into_forks(self, backend: &B, count: usize) -> Result<Vec<Self>> {
        let forks = (1..count).map(|_| self.fork(backend));
        let mut forks = forks.collect::<Result<Vec<_>>>()?;
        forks.extend((count > 0).then_some(self));
        Ok(forks)
    }
}
