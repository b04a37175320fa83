//! What a sequence leaves behind: convolution rows, SSM states, keys and values. Saved by forking.

use super::places::Places;
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

    fn fork(&self, backend: &B) -> Result<Self> {
        Ok(match self {
            Self::Mamba { conv, ssm } => Self::Mamba {
                conv: backend.duplicate(conv)?,
                ssm: backend.duplicate(ssm)?,
            },
            Self::Attention(cache) => Self::Attention(KeyValues {
                keys: backend.duplicate(&cache.keys)?,
                values: backend.duplicate(&cache.values)?,
            }),
            Self::Stateless => Self::Stateless,
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
    pub fn empty(places: &Places<B>, config: &NemotronHConfig, scan: &ScanShape) -> Result<Self> {
        let kinds = config.pattern.kinds().iter().enumerate();
        let empty = |(block, kind): (usize, &BlockKind)| {
            BlockState::empty(*kind, places.of(block), config, scan)
        };
        Ok(Self {
            position: 0,
            blocks: kinds.map(empty).collect::<Result<_>>()?,
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
    pub fn fork(&self, places: &Places<B>) -> Result<Self> {
        let fork = |(index, block): (usize, &BlockState<B>)| block.fork(places.of(index));
        let blocks = self.blocks.iter().enumerate();
        Ok(Self {
            position: self.position,
            blocks: blocks.map(fork).collect::<Result<_>>()?,
        })
    }
}
