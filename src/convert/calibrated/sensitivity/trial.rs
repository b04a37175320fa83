//! All groups rounded at once: what the types that were chosen do to the predictions, and which parts of it were foreseen.
//!
//! Enters: types by tensor. Leaves: the KL divergence on the probe's text, after the embedding, after every block and with
//! the head. Rounded as the probes are, with second moments of the original network.

use std::collections::BTreeMap;

use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;

use super::Measurement;
use super::batches::Batch;
use super::local_losses::memory_tensor;
use super::predictions::Head;
use super::probing::{Probing, SeenMoments};
use crate::artifact::MemoryTensor;
use crate::calibrate::capture::Capture;
use crate::calibrate::layer::Layer;
use crate::convert::calibrated::stages;
use crate::error::Result;
use crate::forward::required;
use crate::quantize::is_searched;

/// Share of the whole below which what was foreseen of a step says nothing of it.
const NOISE: f64 = 0.01;
/// Bounds of what a price is multiplied with.
const RESCALE: (f64, f64) = (0.25, 4.0);

/// Types to try, by GGUF name; a tensor without one stays as it is.
pub type Types = BTreeMap<String, GgmlType>;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// KL divergence after the embedding, after each block, and with the head: each with everything before it rounded.
    /// Only the last two where the steps were not asked for.
    pub steps: Vec<f64>,
}

impl Trial {
    /// KL divergence of the whole, nats.
    pub fn kl_divergence(&self) -> f64 {
        self.steps.last().copied().unwrap_or(0.0)
    }

    /// What the prices of each step's groups are to be multiplied with; `predicted`: what was foreseen of each step.
    pub fn rescale(&self, predicted: &[f64]) -> Vec<f64> {
        let all: f64 = predicted.iter().sum();
        let noise = NOISE * all.max(f64::MIN_POSITIVE);
        let ratio = self.kl_divergence() / all.max(f64::MIN_POSITIVE);
        let before = std::iter::once(&0.0).chain(&self.steps);
        let added = self
            .steps
            .iter()
            .zip(before)
            .map(|(after, before)| after - before);
        added
            .zip(predicted)
            .map(|(added, predicted)| {
                let factor = (added.max(0.0) + noise * ratio) / (predicted + noise);
                factor.clamp(RESCALE.0, RESCALE.1)
            })
            .collect()
    }
}

/// Which step a tensor belongs to, of a network of so many blocks: the embedding, its block, the head.
pub fn step_of(tensor: &str, blocks: usize) -> usize {
    let block = tensor
        .strip_prefix("blk.")
        .and_then(|rest| rest.split('.').next());
    match block.and_then(|block| block.parse::<usize>().ok()) {
        Some(block) => block + 1,
        None if tensor == "output.weight" => blocks + 1,
        None => 0,
    }
}

impl Measurement<'_> {
    /// Rounds the network with each of `wanted`; steps are measured for the first alone.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn try_types(&self, wanted: &[Types]) -> Result<Vec<Trial>> {
        let blocks = self.weights.stored().config().pattern.kinds().len();
        let bytes: Vec<u64> = (0..blocks).map(|block| self.block_bytes(block)).collect();
        self.progress.begin("checking", bytes.iter().sum());
        let mut probing = Probing::begin(self)?;
        let mut runs = Vec::new();
        for (index, types) in wanted.iter().enumerate() {
            runs.push(Run::begin(&probing, types, index == 0)?);
        }
        for (block, bytes) in bytes.into_iter().enumerate() {
            let prefix = format!("blk.{block}.");
            let originals = probing.originals(block)?;
            let layer = Layer::open(self.machines, probing.config(), block, originals.clone())?;
            let names = originals.iter().map(|tensor| tensor.name.as_str());
            let is_rounded = |name: &&str| runs.iter().any(|run| run.type_of(name).is_some());
            let names: Vec<&str> = names.filter(is_rounded).collect();
            let seen = probing.advance_moments(&layer, &names)?;
            for run in &mut runs {
                let names = run.types.keys().filter(|name| name.starts_with(&prefix));
                let names: Vec<String> = names.cloned().collect();
                let tensors = names
                    .iter()
                    .filter_map(|name| run.type_of(name).map(|ty| (name, ty)));
                let tensors = tensors.map(|(name, ty)| self.rounded(name, ty, &seen));
                let tensors = tensors.collect::<Result<Vec<_>>>()?;
                let layer = probing.replaced(block, &originals, tensors)?;
                run.block(&probing, block, &layer)?;
            }
            self.progress.advance(bytes);
        }
        let seen = probing.head_moments()?;
        let trials = runs.into_iter().map(|run| run.head(&probing, &seen));
        let trials = trials.collect();
        self.progress.end();
        trials
    }

    /// Bytes of a block as it is stored.
    fn block_bytes(&self, block: usize) -> u64 {
        let prefix = format!("blk.{block}.");
        let tensors = self.weights.stored().tensors().iter();
        let tensors = tensors.filter(|tensor| tensor.name.starts_with(&prefix));
        tensors.map(|tensor| tensor.bytes()).sum()
    }

    /// A tensor with every matrix rounded.
    fn rounded(&self, name: &str, ty: GgmlType, seen: &SeenMoments) -> Result<MemoryTensor> {
        let tensor = required(self.weights.stored(), name)?;
        let mut bytes = Vec::new();
        for matrix in 0..tensor.matrices {
            self.check_stop()?;
            let inputs = seen
                .get(&(stages::input_of(name), matrix))
                .and_then(|seen| self.inputs(seen));
            let values = self.weights.matrix(name, matrix)?;
            bytes.extend(self.round(ty, tensor.columns, &values, inputs.as_ref()));
        }
        Ok(memory_tensor(tensor, ty, bytes))
    }
}

/// A network with everything rounded so far.
struct Run<'a> {
    types: &'a Types,
    is_stepwise: bool,
    /// Rewritten streams of the probe's batches.
    streams: Vec<Vec<f32>>,
    /// Where the embedding is the head too, rounded.
    head: Option<Head>,
    steps: Vec<f64>,
}

impl<'a> Run<'a> {
    /// Behind the embedding.
    fn begin(probing: &Probing, types: &'a Types, is_stepwise: bool) -> Result<Self> {
        let name = "token_embd.weight";
        let mut run = Self {
            types,
            is_stepwise,
            streams: Vec::new(),
            head: None,
            steps: Vec::new(),
        };
        let tensor = required(probing.job.weights.stored(), name)?;
        for batch in &probing.probe_batches {
            let mut stream = batch.residual.clone();
            if let Some(ty) = run.type_of(name) {
                let bytes = probing.job.round(ty, tensor.columns, &batch.residual, None);
                dequantize(ty, &bytes, &mut stream)?;
            }
            run.streams.push(stream);
        }
        if let (Some(ty), true) = (run.type_of(name), probing.is_tied()) {
            run.head = Some(probing.head_of(probing.plainly(tensor, ty)?)?);
        }
        run.step(probing, 0)?;
        Ok(run)
    }

    /// What a tensor is rounded to.
    fn type_of(&self, name: &str) -> Option<GgmlType> {
        let ty = self.types.get(name).copied();
        ty.filter(|ty| is_searched(*ty))
    }

    /// Measures with everything from block `first` on as it is stored.
    fn step(&mut self, probing: &Probing, first: usize) -> Result<()> {
        let is_last = first == probing.config().pattern.kinds().len();
        if self.is_stepwise || is_last {
            let run = |index: usize, batch: &Batch| {
                probing.rest(first, self.streams[index].clone(), &batch.lengths)
            };
            let found = probing.divergence(run, self.head.as_ref())?;
            self.steps.push(found);
        }
        Ok(())
    }

    fn block(&mut self, probing: &Probing, block: usize, layer: &Layer) -> Result<()> {
        for (stream, batch) in self.streams.iter_mut().zip(&probing.probe_batches) {
            layer.run_values(stream, &batch.lengths, &mut Capture::default())?;
        }
        self.step(probing, block + 1)
    }

    fn head(mut self, probing: &Probing, seen: &SeenMoments) -> Result<Trial> {
        let name = "output.weight";
        let before = self.steps.last().copied().unwrap_or(0.0);
        let whole = match self.type_of(name) {
            None => before,
            Some(ty) => {
                let head = probing.head_of(probing.job.rounded(name, ty, seen)?)?;
                let run = |index: usize, _: &Batch| probing.normed(&self.streams[index]);
                probing.divergence(run, Some(&head))?
            }
        };
        self.steps.push(whole);
        Ok(Trial { steps: self.steps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_follow_what_each_step_added() {
        let trial = Trial {
            steps: vec![0.01, 0.05, 0.05],
        };
        let factors = trial.rescale(&[0.01, 0.02, 0.0]);
        assert!((factors[0] - 1.0).abs() < 0.02, "{factors:?}");
        assert!((factors[1] - 2.0).abs() < 0.02, "{factors:?}");
        // Nothing foreseen, nothing found: as the whole.
        assert!((factors[2] - 5.0 / 3.0).abs() < 0.01, "{factors:?}");
        // A step that took nothing, or far more than foreseen, is bounded.
        let trial = Trial {
            steps: vec![0.01, 0.009, 0.9],
        };
        let factors = trial.rescale(&[0.01, 0.02, 0.01]);
        assert!((0.25..0.5).contains(&factors[1]), "{factors:?}");
        assert_eq!(factors[2], 4.0);
    }

    #[test]
    fn steps_are_embedding_blocks_and_head() {
        let steps = [
            "token_embd.weight",
            "blk.0.ssm_in.weight",
            "blk.11.x",
            "output.weight",
        ];
        assert_eq!(steps.map(|name| step_of(name, 12)), [0, 1, 12, 13]);
    }
}
