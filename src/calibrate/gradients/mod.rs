//! The network backwards: how the predictions depend on what every matrix gives.
//!
//! Enters: rewritten weights, samples. Leaves: for every matrix W of a block the second moments of the gradient at its
//! output, `G = E[g g^T]` over tokens, with `g` the gradient of the loss at `W u`. The loss is the sum of `-log p(y)` over
//! all tokens, y drawn from the model's own predictions: so G is the output's half of the Fisher matrix, the Hessian of the
//! KL divergence from the original network. Decides nothing about rounding.
//!
//! The forward pass keeps the residual stream before every block. On the way back each block computes again, cell by
//! cell, what lies between. Memory holds one block's weights and one cell's activations, and the second moments.
//!
//! Source: YAQA, arXiv:2505.22988, which rounds with second moments of inputs and of gradients at outputs.

mod attention;
mod block;
mod loss;
mod mamba;
mod matrix;
mod mlp;
mod moe;
mod moments;
#[cfg(test)]
mod tests;
mod vjp;
mod walk;

use std::collections::BTreeMap;

use super::cells::CELLS;
use super::samples::Samples;
use crate::error::{Error, Fault, Result};
use crate::model::nemotron_h::{Storage, expected_tensors};
use crate::rewrite::RewrittenModel;
use loss::Loss;
use moments::{Collector, RowBlocks, bytes_of};
pub use moments::{MAX_BLOCK_ROWS, RowBlock};
use walk::Walk;

/// How much is read and held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientSettings {
    /// Sequences at most; of more, evenly spaced ones. Second moments of outputs settle with few.
    pub max_sequences: usize,
    /// Decides which tokens are drawn.
    pub seed: u64,
    /// Memory to stay within; the result does not depend on it.
    pub memory_bytes: u64,
}

impl Default for GradientSettings {
    fn default() -> Self {
        Self {
            max_sequences: 32,
            seed: 0,
            memory_bytes: u64::MAX,
        }
    }
}

/// Second moments of the gradients at the outputs of all matrices of all blocks; not of the embedding, the head, routers.
///
/// A gradient at an expert's output carries the router's weight for the token; only tokens that reached the expert count.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OutputMoments {
    by_tensor: BTreeMap<String, BTreeMap<usize, RowBlocks>>,
}

impl OutputMoments {
    /// Runs samples through the network and back. `watch` is called before every cell of every block, on both ways.
    ///
    /// The result depends on weights, samples, `max_sequences` and `seed` alone, not on threads or memory.
    ///
    /// # Errors
    /// The memory is too little, a token has no embedding, a value is not finite, a file cannot be read, whatever `watch`
    /// returns.
    pub fn collect(
        weights: &RewrittenModel,
        samples: &Samples,
        settings: &GradientSettings,
        watch: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let samples = evenly_spaced(samples, settings.max_sequences);
        let in_file = needs_file(weights, &samples, settings.memory_bytes)?;
        let walk = Walk::new(weights, &samples, in_file, watch);
        let mut streams = walk.forward(&samples)?;
        let last = streams.pop().expect("a walk begins with the embedding");
        let mut gradients = Loss::new(&walk, settings.seed)?.gradient(&last)?;
        let mut all = Self::default();
        for (block, before) in streams.iter().enumerate().rev() {
            let mut collector = Collector::default();
            walk.back(block, before, &mut gradients, &mut collector)?;
            for ((tensor, matrix), found) in collector.finish() {
                all.by_tensor
                    .entry(tensor)
                    .or_default()
                    .insert(matrix, found);
            }
        }
        Ok(all)
    }

    /// The smallest limit within which [`Self::collect`] can stay.
    pub fn least_bytes(weights: &RewrittenModel, samples: &Samples, max_sequences: usize) -> u64 {
        peak_bytes(weights, &evenly_spaced(samples, max_sequences), true)
    }

    /// Of one matrix, by GGUF name and number in its stack: one block of all rows, or several where there are more than
    /// [`MAX_BLOCK_ROWS`]. `None` where no token reached an expert.
    pub fn of(&self, tensor: &str, matrix: usize) -> Option<&[RowBlock]> {
        let blocks = self.by_tensor.get(tensor)?.get(&matrix)?;
        Some(&blocks.0)
    }
}

fn evenly_spaced(samples: &Samples, most: usize) -> Samples {
    let all = &samples.sequences;
    let count = all.len().min(most);
    let chosen = (0..count).map(|index| all[index * all.len() / count].clone());
    Samples {
        sequences: chosen.collect(),
    }
}

/// Whether residual streams must be kept in files to stay within `limit` bytes.
fn needs_file(weights: &RewrittenModel, samples: &Samples, limit: u64) -> Result<bool> {
    let needed = |in_file| peak_bytes(weights, samples, in_file);
    if needed(false) <= limit {
        return Ok(false);
    }
    if needed(true) <= limit {
        return Ok(true);
    }
    let needed = needed(true);
    let what = format!(
        "{limit} bytes of memory are too few: second moments of the gradients at all outputs and the weights of one block need {needed}"
    );
    let hint = format!("allow them with `--max-ram {needed}`");
    Err(Error::Plan(Fault::new(what).hint(hint)))
}

/// Bytes held at most: second moments of all matrices and those of one block on their way through the tree, weights of
/// the largest block, what a cell computes in it on both ways, streams.
fn peak_bytes(weights: &RewrittenModel, samples: &Samples, in_file: bool) -> u64 {
    const BASE_BYTES: u64 = 128 << 20;
    /// Arrays of a cell per input or output of a matrix: the value, its gradient, what is computed between.
    const ARRAYS: u64 = 4;
    let model = weights.stored();
    let config = model.config();
    let blocks = config.pattern.kinds().len();
    let expected = expected_tensors(config, false);
    let rounded = expected
        .iter()
        .filter(|tensor| tensor.rule.storage == Storage::OutType);
    let rounded: Vec<_> = rounded
        .filter_map(|tensor| model.tensor(&tensor.name))
        .collect();
    let of_block = |block: usize| {
        let prefix = format!("blk.{block}.");
        let tensors = rounded.iter().copied();
        tensors.filter(move |tensor| tensor.name.starts_with(&prefix))
    };
    let moments = |block: usize| {
        let bytes = of_block(block).map(|tensor| tensor.matrices as u64 * bytes_of(tensor.rows));
        bytes.sum::<u64>()
    };
    let tokens = samples.cells().map(|cell| cell.iter().map(Vec::len).sum());
    let cell_tokens = tokens.max().unwrap_or(0_usize) as u64;
    let visits = |matrices: usize| match &config.moe {
        Some(moe) if matrices > 1 => moe.num_experts_per_tok as u64,
        _ => 1,
    };
    let work = |block: usize| {
        let bytes = of_block(block).map(|tensor| {
            let widths = (tensor.columns + tensor.rows) as u64 * visits(tensor.matrices);
            4 * (tensor.weights() + ARRAYS * cell_tokens * widths)
        });
        bytes.sum::<u64>()
    };
    let levels = u64::from(CELLS.ilog2()) + 1;
    let largest = (0..blocks).map(|block| work(block) + levels * moments(block));
    let embedding = model.tensor("token_embd.weight");
    let embedding = embedding.map_or(0, |tensor| 4 * tensor.weights());
    let all: u64 = (0..blocks).map(moments).sum();
    let stream = 4 * (samples.tokens() * config.hidden_size) as u64;
    // Before every block, behind the last, normed, and the gradient.
    let streams = u64::from(!in_file) * (blocks as u64 + 3) * stream;
    BASE_BYTES + all + largest.max().unwrap_or(0).max(embedding) + streams
}
