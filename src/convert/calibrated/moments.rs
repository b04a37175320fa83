//! Second moments of one stage: every cell through the block as it is now, inputs of the stage's matrices summed up.

use std::collections::BTreeMap;

use super::{BothStreams, Calibrated, Workspace, rounding, routing_of, stages};
use crate::backend::cpu::kernels::Isa;
use crate::backend::{Backend, ExpertRows};
use crate::calibrate::capture::{Capture, Captured};
use crate::calibrate::cells::{Merge, Tree};
use crate::calibrate::layer::Layer;
use crate::calibrate::second_moments::{CrossMoments, SecondMoments};
use crate::error::Result;

/// What is known of the inputs of one matrix.
#[derive(Debug)]
pub struct Seen {
    /// Of the rounded network.
    pub moments: SecondMoments,
    /// Inputs of the original network with them.
    pub cross: Option<CrossMoments>,
    /// Their largest magnitude.
    pub largest: f32,
}

impl Merge for Seen {
    fn merge(&mut self, later: Self) {
        self.moments.merge(later.moments);
        self.largest = self.largest.max(later.largest);
        if let (Some(cross), Some(later)) = (&mut self.cross, later.cross) {
            cross.merge(later);
        }
    }
}

/// By tensor whose input it is, and matrix.
pub type SeenInputs = BTreeMap<(String, usize), Seen>;

/// A stage of a block about to be rounded.
pub struct StageMoments<'a> {
    pub job: &'a Calibrated<'a>,
    pub original: &'a Layer,
    pub current: &'a Layer,
    pub streams: &'a BothStreams,
    pub routes: &'a [Vec<ExpertRows>],
}

impl StageMoments<'_> {
    /// Collects what the tensors read, then rounds them one by one.
    pub fn round(&self, tensors: &[&str], workspace: &mut Workspace) -> Result<()> {
        let mut inputs: Vec<String> = tensors.iter().map(|name| stages::input_of(name)).collect();
        inputs.dedup();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let seen = self.collect(&inputs)?;
        for name in tensors {
            self.job.check_stop()?;
            let Some(tensor) = self.job.tensor(name) else {
                continue;
            };
            let (bytes, outcome) =
                rounding::with_inputs(self.job, tensor, &stages::input_of(name), &seen)?;
            workspace.finish(&bytes, outcome)?;
            self.job.progress.advance(tensor.bytes());
        }
        Ok(())
    }

    fn collect(&self, inputs: &[&str]) -> Result<SeenInputs> {
        let mut trees: BTreeMap<(String, usize), Tree<Seen>> = BTreeMap::new();
        for cell in 0..self.streams.cells.len() {
            self.job.check_stop()?;
            for (key, seen) in self.cell(cell, inputs)? {
                trees.entry(key).or_default().push(seen);
            }
        }
        let sums = trees.into_iter();
        Ok(sums
            .filter_map(|(key, tree)| Some((key, tree.finish()?)))
            .collect())
    }

    /// Runs the block where that is needed to know what is wanted.
    fn show(
        &self,
        layer: &Layer,
        stream: &mut Vec<f32>,
        lengths: &[usize],
        routing: Option<&[ExpertRows]>,
        capture: &mut Capture,
    ) -> Result<()> {
        let config = self.job.weights.stored().config();
        let is_latent = config
            .moe
            .as_ref()
            .is_some_and(|moe| moe.moe_latent_size.is_some());
        let reads_stream = |name: &&str| stages::reads_stream(name, is_latent);
        if capture.wanted().iter().all(reads_stream) {
            layer.show_readers(stream, routing, capture);
            return Ok(());
        }
        layer.run(stream, lengths, capture)
    }

    /// What one cell shows.
    fn cell(&self, cell: usize, inputs: &[&str]) -> Result<SeenInputs> {
        let (lengths, routing) = (&self.streams.cells[cell], routing_of(self.routes, cell));
        let mut capture = Capture::new(inputs, routing);
        let mut stream = self.streams.rounded.read(cell)?;
        self.show(self.current, &mut stream, lengths, routing, &mut capture)?;
        let mut originals = Capture::new(inputs, routing);
        if self.job.rounding.target_correction > 0.0 {
            let mut stream = self.streams.original.read(cell)?;
            self.show(self.original, &mut stream, lengths, routing, &mut originals)?;
        }
        let seen = |(key, captured)| {
            let found = seen(self.job.isa(), &captured, originals.inputs.get(&key));
            (key, found)
        };
        Ok(capture.inputs.into_iter().map(seen).collect())
    }
}

fn seen(isa: Isa, captured: &Captured, original: Option<&Captured>) -> Seen {
    let n = captured.in_features;
    let mut moments = SecondMoments::empty(n);
    let weights = (!captured.weights.is_empty()).then_some(captured.weights.as_slice());
    moments.add(isa, &captured.rows, weights);
    // Of experts the few tokens they see would be corrected for noise.
    let original = original.filter(|_| weights.is_none());
    let cross =
        original.map(|original| CrossMoments::of(isa, (&original.rows, n), (&captured.rows, n)));
    let largest = captured.rows.iter().fold(0.0, |a: f32, x| a.max(x.abs()));
    Seen {
        moments,
        cross,
        largest,
    }
}

/// Rounds the head, whose inputs are the normed streams behind the last block.
pub fn round_head(
    job: &Calibrated,
    name: &str,
    norm: &[f32],
    streams: &BothStreams,
    workspace: &mut Workspace,
) -> Result<()> {
    let Some(tensor) = job.tensor(name) else {
        return Ok(());
    };
    let backend = job.backend();
    let eps = job.weights.stored().config().norm_epsilon();
    let mut tree = Tree::default();
    for cell in 0..streams.cells.len() {
        job.check_stop()?;
        let normed = |values: Vec<f32>| Captured {
            rows: backend.rms_norm(&values, &norm.to_vec(), eps),
            in_features: norm.len(),
            weights: Vec::new(),
        };
        let rounded = normed(streams.rounded.read(cell)?);
        let original = match job.rounding.target_correction > 0.0 {
            true => Some(normed(streams.original.read(cell)?)),
            false => None,
        };
        tree.push(seen(job.isa(), &rounded, original.as_ref()));
    }
    let seen = tree
        .finish()
        .map(|seen| ((name.to_string(), 0), seen))
        .into_iter()
        .collect();
    let (bytes, outcome) = rounding::with_inputs(job, tensor, name, &seen)?;
    workspace.finish(&bytes, outcome)?;
    job.progress.advance(tensor.bytes());
    Ok(())
}
