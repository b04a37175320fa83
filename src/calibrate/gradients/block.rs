//! One block backwards: `x + mixer(norm(x))`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::attention::Attention;
use super::mamba::Mamba2;
use super::matrix::Matrix;
use super::mlp::Mlp;
use super::moe::Moe;
use super::vjp;
use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::cpu::{Cpu, Residence};
use crate::backend::{Backend, Segment};
use crate::error::Result;
use crate::forward::required;
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;

/// Told the gradient at the output of every matrix, with what the matrix read.
pub trait OutputObserver {
    /// `input [rows, in_features]`, `gradient [rows, out_features]`; `index` counts experts.
    fn output(&mut self, matrix: &Matrix, index: usize, input: &[f32], gradient: &[f32]);
}

/// Where the weights of a block are.
pub struct BlockWeights {
    /// The machine.
    pub backend: Cpu,
    model: Arc<StoredModel>,
    prefix: String,
}

impl BlockWeights {
    /// A matrix of the block, by the stem of its GGUF name.
    pub fn matrix(&self, stem: &str) -> Result<Matrix> {
        let stem = format!("{}{stem}", self.prefix);
        Matrix::open(&self.backend, &self.model, &stem)
    }

    /// A vector of the block, by its GGUF name.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let name = format!("{}{name}", self.prefix);
        self.backend.vector(required(&self.model, &name)?)
    }

    /// Sizes of the network.
    pub fn config(&self) -> &NemotronHConfig {
        self.model.config()
    }
}

/// What a mixer is given besides its weights.
pub struct Pass<'a> {
    /// The machine.
    pub backend: &'a Cpu,
    /// Rows of each sequence, one after the other.
    pub sequences: &'a [Range<usize>],
    /// Who looks on.
    pub observer: &'a mut dyn OutputObserver,
}

impl Pass<'_> {
    /// A state for every sequence, as it is before the first token.
    pub fn fresh<T: Clone>(&self, state: T) -> Vec<T> {
        vec![state; self.sequences.len()]
    }

    /// Shows `gradient`, which is at the output of a matrix, and gives that at its input.
    pub fn back(
        &mut self,
        matrix: &Matrix,
        index: usize,
        input: &[f32],
        gradient: &[f32],
    ) -> Result<Vec<f32>> {
        self.observer.output(matrix, index, input, gradient);
        matrix.back(index, gradient)
    }
}

/// The sequences with their states.
pub fn segments<'a, T>(sequences: &[Range<usize>], states: &'a mut [T]) -> Vec<Segment<'a, T>> {
    let segment = |(rows, state): (&Range<usize>, &'a mut T)| Segment {
        rows: rows.clone(),
        position: 0,
        state,
    };
    sequences.iter().zip(states).map(segment).collect()
}

enum Mixer {
    Mamba(Box<Mamba2>),
    Attention(Box<Attention>),
    Mlp(Box<Mlp>),
    Moe(Box<Moe>),
}

/// A block with all its weights in memory.
pub struct Block {
    weights: BlockWeights,
    norm: Vec<f32>,
    eps: f32,
    mixer: Mixer,
}

impl Block {
    /// Opens block `index` of the network that `config` describes, with the weights given.
    ///
    /// # Errors
    /// A tensor of the block is missing or has a wrong shape.
    pub fn open(
        config: &NemotronHConfig,
        index: usize,
        tensors: Vec<MemoryTensor>,
    ) -> Result<Self> {
        let path = format!("block {index}");
        let model = StoredModel::in_memory(Path::new(&path), config.clone(), tensors)?;
        let model = Arc::new(model);
        let weights = BlockWeights {
            backend: Cpu::new(Arc::clone(&model), Residence::Mapped),
            model,
            prefix: format!("blk.{index}."),
        };
        let mixer = match config.pattern.kinds()[index] {
            BlockKind::Mamba => Mixer::Mamba(Box::new(Mamba2::open(&weights)?)),
            BlockKind::Attention => Mixer::Attention(Box::new(Attention::open(&weights)?)),
            BlockKind::Mlp => Mixer::Mlp(Box::new(Mlp::open(&weights, "ffn_up", "ffn_down")?)),
            BlockKind::Moe => Mixer::Moe(Box::new(Moe::open(&weights)?)),
        };
        Ok(Self {
            norm: weights.vector("attn_norm.weight")?,
            eps: config.norm_epsilon(),
            weights,
            mixer,
        })
    }

    /// From the gradient at the stream behind the block to the one at the stream before it, `[rows, hidden]` both;
    /// `residual` is the stream before it.
    ///
    /// # Errors
    /// A weight cannot be read.
    pub fn back(
        &self,
        residual: &Vec<f32>,
        sequences: &[Range<usize>],
        mut gradient: Vec<f32>,
        observer: &mut dyn OutputObserver,
    ) -> Result<Vec<f32>> {
        let backend = &self.weights.backend;
        let normed = backend.rms_norm(residual, &self.norm, self.eps)?;
        let pass = Pass {
            backend,
            sequences,
            observer,
        };
        let at_normed = match &self.mixer {
            Mixer::Mamba(mixer) => mixer.back(pass, &normed, &gradient)?,
            Mixer::Attention(mixer) => mixer.back(pass, &normed, &gradient)?,
            Mixer::Mlp(mixer) => mixer.back(pass, 0, &normed, &gradient)?,
            Mixer::Moe(mixer) => mixer.back(pass, &normed, &gradient)?,
        };
        let through_norm = vjp::rms_norm(residual, &self.norm, self.eps, &at_normed);
        backend.add(&mut gradient, &through_norm)?;
        Ok(gradient)
    }
}
