//! Where the way back begins: the gradient of `-log p(y)` at the stream behind the last block, with y drawn from the
//! model's own predictions.
//!
//! The vocabulary is read in chunks, all cells for each, twice: what a prediction is normalized with must be known before
//! its gradient.

use std::ops::Range;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::matrix::Matrix;
use super::vjp;
use super::walk::Walk;
use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::Backend;
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::{Cpu, Residence, exp, exp_f64, largest};
use crate::calibrate::stream::Streams;
use crate::error::{Error, Fault, Result};
use crate::parallel;

/// Rows of the head in memory at once.
const CHUNK: usize = 4096;

/// What is predicted behind one token.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// The largest logit so far.
    max: f32,
    /// `sum of e^(logit - max)`.
    sum: f64,
    /// y.
    pub token: usize,
}

impl Prediction {
    /// Before any logit.
    const NONE: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
        token: 0,
    };

    /// Sees the next logits, of tokens from `first` on. With `uniform` evenly distributed in [0, 1), new for every call,
    /// each token seen so far is y with its share of the sum seen so far.
    fn see(&mut self, first: usize, logits: &[f32], uniform: f64) {
        let max = largest(Isa::detect(), logits);
        if max > self.max {
            self.sum *= exp_f64(f64::from(self.max) - f64::from(max));
            self.max = max;
        }
        let share = |logit: &f32| f64::from(exp(logit - self.max));
        let new: f64 = logits.iter().map(share).sum();
        self.sum += new;
        let mut rest = uniform * self.sum;
        if rest >= new {
            return;
        }
        let found = logits.iter().position(|logit| {
            rest -= share(logit);
            rest < 0.0
        });
        self.token = first + found.unwrap_or(logits.len() - 1);
    }

    /// Turns logits of tokens from `first` on into the gradient of `-log p(y)` at them: `p - [y]`.
    fn gradient(&self, first: usize, logits: &mut [f32]) {
        let per_sum = 1.0 / self.sum;
        for logit in logits.iter_mut() {
            *logit = (f64::from(exp(*logit - self.max)) * per_sum) as f32;
        }
        let chosen = self.token.checked_sub(first);
        if let Some(share) = chosen.and_then(|at| logits.get_mut(at)) {
            *share -= 1.0;
        }
    }
}

/// The final norm and the head.
pub struct Loss<'a> {
    walk: &'a Walk<'a>,
    norm: Vec<f32>,
    eps: f32,
    /// The head, or the embedding that serves as one.
    head: &'static str,
    vocabulary: usize,
    seed: u64,
}

impl<'a> Loss<'a> {
    /// Reads the norm; `seed` decides what is drawn.
    ///
    /// # Errors
    /// It is missing.
    pub fn new(walk: &'a Walk<'a>, seed: u64) -> Result<Self> {
        let config = walk.config();
        let is_tied = walk.weights.stored().tensor("output.weight").is_none();
        Ok(Self {
            walk,
            norm: walk.weights.matrix("output_norm.weight", 0)?,
            eps: config.norm_epsilon(),
            head: if is_tied {
                "token_embd.weight"
            } else {
                "output.weight"
            },
            vocabulary: config.vocab_size,
            seed,
        })
    }

    /// The gradient at the streams `last` behind the last block.
    ///
    /// # Errors
    /// A logit is not finite, a weight or stream cannot be read, whatever the walk's watch returns.
    pub fn gradient(&self, last: &Streams) -> Result<Streams> {
        let normed = self.normed(last)?;
        let predictions = self.predictions(&normed)?;
        let mut gradients = self.at_normed(&normed, &predictions)?;
        for cell in 0..self.walk.cells.len() {
            let (stream, gradient) = (last.read(cell)?, gradients.read(cell)?);
            let before = vjp::rms_norm(&stream, &self.norm, self.eps, &gradient);
            gradients.write(cell, before)?;
        }
        Ok(gradients)
    }

    /// The streams behind the final norm.
    pub fn normed(&self, last: &Streams) -> Result<Streams> {
        let backend = self.walk.backend()?;
        let mut normed = self.walk.streams()?;
        for cell in 0..self.walk.cells.len() {
            let rows = backend.rms_norm(&last.read(cell)?, &self.norm, self.eps)?;
            normed.write(cell, rows)?;
        }
        Ok(normed)
    }

    /// What is predicted behind every token of every cell.
    pub fn predictions(&self, normed: &Streams) -> Result<Vec<Vec<Prediction>>> {
        let tokens = self.walk.cells.iter().map(|cell| rows_of(cell));
        let mut all: Vec<Vec<Prediction>> = tokens
            .map(|tokens| vec![Prediction::NONE; tokens])
            .collect();
        let seed = self.seed;
        self.logits(normed, |cell, first, _, logits| {
            let width = logits.len() / all[cell].len();
            let predictions = all[cell].iter_mut().enumerate();
            let rows = predictions.zip(logits.chunks(width));
            parallel::for_each(rows, |((row, prediction), logits)| {
                prediction.see(first, logits, uniform(seed, [cell, row, first]));
            });
            Ok(())
        })?;
        Ok(all)
    }

    fn at_normed(&self, normed: &Streams, predictions: &[Vec<Prediction>]) -> Result<Streams> {
        let mut gradients = self.walk.streams()?;
        self.logits(normed, |cell, first, matrix, mut logits| {
            let predictions = &predictions[cell];
            let width = logits.len() / predictions.len();
            let rows = logits.chunks_mut(width).zip(predictions);
            parallel::for_each(rows, |(logits, prediction)| {
                prediction.gradient(first, logits);
            });
            let mut sum = gradients.read(cell)?;
            let new = matrix.back(0, &logits)?;
            sum.iter_mut().zip(new).for_each(|(sum, new)| *sum += new);
            gradients.write(cell, sum)
        })?;
        Ok(gradients)
    }

    /// Calls `see` with every cell's logits `[rows, chunk]` of every chunk of the vocabulary: cell, first token of the
    /// chunk, the chunk's part of the head, logits.
    fn logits(
        &self,
        normed: &Streams,
        mut see: impl FnMut(usize, usize, &Matrix, Vec<f32>) -> Result<()>,
    ) -> Result<()> {
        let backend = self.walk.backend()?;
        for first in (0..self.vocabulary).step_by(CHUNK) {
            let matrix = self.chunk(first..self.vocabulary.min(first + CHUNK))?;
            for (cell, _) in self.walk.filled_cells() {
                (self.walk.watch)()?;
                let logits = matrix.apply(&backend, 0, &normed.read(cell)?)?;
                if !backend.is_finite(&logits)? {
                    let what = "the output head produced a value that is not finite";
                    return Err(Error::Run(Fault::new(what)));
                }
                see(cell, first, &matrix, logits)?;
            }
        }
        Ok(())
    }

    fn chunk(&self, rows: Range<usize>) -> Result<Matrix> {
        let weights = self.walk.weights;
        let values = weights.rows(self.head, 0, rows.start, rows.len())?;
        let shape = [1, rows.len(), self.norm.len()];
        let tensor = MemoryTensor::of_f32("output.weight", shape, &values);
        let (path, config) = (weights.stored().path(), self.walk.config().clone());
        let model = Arc::new(StoredModel::in_memory(path, config, vec![tensor])?);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        Matrix::open(&backend, &model, "output")
    }
}

/// A number in [0, 1) that depends on the seed and `place` alone.
fn uniform(seed: u64, place: [usize; 3]) -> f64 {
    let bytes = place.map(|part| (part as u64).to_le_bytes());
    let bits = xxh3_64_with_seed(bytes.as_flattened(), seed);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Rows of all sequences of a cell.
fn rows_of(sequences: &[Range<usize>]) -> usize {
    sequences.last().map_or(0, |last| last.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 7] = [0.5, -1.0, 2.0, 1.5, -3.0, 2.5, 0.0];

    fn shares() -> Vec<f64> {
        let all: Vec<f64> = LOGITS.iter().map(|logit| f64::from(*logit).exp()).collect();
        let sum: f64 = all.iter().sum();
        all.iter().map(|share| share / sum).collect()
    }

    /// In chunks of three tokens.
    fn drawn(seed: u64) -> Prediction {
        let mut prediction = Prediction::NONE;
        for (index, logits) in LOGITS.chunks(3).enumerate() {
            let bits = xxh3_64_with_seed(&[index as u8], seed);
            prediction.see(
                index * 3,
                logits,
                (bits >> 11) as f64 / (1_u64 << 53) as f64,
            );
        }
        prediction
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        const DRAWS: u64 = 20_000;
        let mut counts = [0.0; LOGITS.len()];
        (0..DRAWS).for_each(|seed| counts[drawn(seed).token] += 1.0 / DRAWS as f64);
        for (count, share) in counts.iter().zip(shares()) {
            assert!((count - share).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn the_gradient_is_the_prediction_less_what_was_drawn() {
        let prediction = drawn(1);
        let mut found = LOGITS;
        prediction.gradient(0, &mut found[..3]);
        prediction.gradient(3, &mut found[3..]);
        for (token, (found, share)) in found.iter().zip(shares()).enumerate() {
            let expected = share - f64::from(u8::from(token == prediction.token));
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{token}");
        }
    }
}
