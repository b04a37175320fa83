//! One pre-norm residual block: `x + mixer(norm(x))`.

use super::linear::required;
use super::mixers::{Mixer, Pass, Turn, scan_shape};
use super::numerics::Numerics;
use super::observer::Observer;
use super::state::State;
use crate::artifact::StoredModel;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::hybrid_pattern::BlockKind;

/// A block that can be run, alone or as part of a [`super::network::Network`].
pub struct Block<B: Backend> {
    index: usize,
    kind: BlockKind,
    norm: B::Buffer,
    mixer: Mixer<B>,
    eps: f32,
}

impl<B: Backend> Block<B> {
    /// Opens the weights of block `index`; the model may hold no others.
    ///
    /// # Errors
    /// A tensor is missing, of a type that cannot be decoded, or cannot be read.
    pub fn open(
        model: &StoredModel,
        backend: &B,
        index: usize,
        numerics: &Numerics,
    ) -> Result<Self> {
        let kind = model.config().pattern.kinds()[index];
        let norm = required(model, &format!("blk.{index}.attn_norm.weight"))?;
        Ok(Self {
            index,
            kind,
            norm: backend.vector(norm)?,
            mixer: Mixer::open(backend, model, index, kind, numerics)?,
            eps: model.config().norm_epsilon(),
        })
    }

    /// What it is.
    pub fn kind(&self) -> BlockKind {
        self.kind
    }

    /// What the mixer reads: the stream after the block's norm.
    ///
    /// # Errors
    /// The machine fails.
    pub fn normed(&self, backend: &B, residual: &B::Buffer) -> Result<B::Buffer> {
        backend.rms_norm(residual, &self.norm, self.eps)
    }

    /// Adds what the mixer makes of `residual [rows, hidden]` to it; says whether every value is still a number.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn run(
        &self,
        backend: &B,
        residual: &mut B::Buffer,
        rows: usize,
        turns: &mut [Turn<'_, B>],
        observer: &mut dyn Observer<B>,
    ) -> Result<bool> {
        observer.residual(self.index, backend, residual, rows)?;
        let normed = self.normed(backend, residual)?;
        let pass = Pass {
            backend,
            block: self.index,
            rows,
            turns,
            observer,
        };
        let mixed = self.mixer.run(pass, &normed)?;
        backend.add(residual, &mixed)?;
        backend.is_finite(residual)
    }

    /// Runs fresh sequences of `lengths` tokens each, which lie one after the other in `residual`.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_fresh(
        &self,
        model: &StoredModel,
        backend: &B,
        residual: &mut B::Buffer,
        lengths: &[usize],
        numerics: &Numerics,
        observer: &mut dyn Observer<B>,
    ) -> Result<bool> {
        let scan = scan_shape(model.config(), numerics);
        let fresh = |_: &usize| State::of_block(backend, model.config(), &scan, self.index);
        let mut states = lengths.iter().map(fresh).collect::<Result<Vec<State<B>>>>()?;
        let mut first = 0;
        let mut turns = Vec::with_capacity(lengths.len());
        for (state, length) in states.iter_mut().zip(lengths) {
            turns.push(Turn {
                rows: first..first + length,
                state,
            });
            first += length;
        }
        self.run(backend, residual, first, &mut turns, observer)
    }
}
