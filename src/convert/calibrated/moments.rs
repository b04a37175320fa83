//! Second moments of one stage: every cell through the block as it is now, inputs of the stage's matrices summed up.

use std::collections::BTreeMap;
use std::ops::Range;

use super::collector::{Collector, Key, SeenInputs};
use super::rounding::{TensorRounding, add_to_pool};
use super::{BothStreams, Calibrated, Workspace, absorption, routing_of, stages};
use crate::backend::{Backend, ExpertRows, MachineBuffer};
use crate::calibrate::capture::{Capture, Captured};
use crate::calibrate::cells::side_by_side;
use crate::calibrate::layer::Layer;
use crate::error::Result;

/// A stage of a block about to be rounded.
pub struct StageMoments<'a> {
    pub job: &'a Calibrated<'a>,
    /// All tensors of the stage.
    pub members: &'a [&'a str],
    /// Which of its inputs are looked at together.
    pub passes: &'a [Range<usize>],
    pub original: &'a Layer,
    pub current: &'a Layer,
    pub streams: &'a mut BothStreams,
    pub routes: &'a [Vec<ExpertRows>],
    /// Tensors whose products none of the stage's inputs depends on: its own and those of later stages.
    pub left_out: Vec<&'a str>,
    /// No later stage reads the streams before the block.
    pub is_last: bool,
}

impl<'a> StageMoments<'a> {
    /// Collects what the tensors read, and rounds them one by one, in as many passes over the cells as memory asks for.
    /// Behind the last pass of the last stage the original stream lies behind the block, if that was run.
    pub fn round(&mut self, tensors: &[&str], workspace: &mut Workspace) -> Result<()> {
        let mut open = Vec::new();
        for (is_twin, job) in self.job.and_twin() {
            for tensor in tensors.iter().filter_map(|name| job.tensor(name)) {
                let input = stages::input_of(&tensor.name);
                open.push((is_twin, job, TensorRounding::begin(job, tensor, input)?));
            }
        }
        let keys = self.keys();
        let passes = self.passes.iter().map(|pass| &keys[pass.clone()]);
        let is_read = |keys: &&[Key]| {
            let mut inputs = keys.iter().map(|(input, _)| input);
            inputs.any(|input| open.iter().any(|(.., tensor)| tensor.input() == input))
        };
        let passes: Vec<&[Key]> = passes.filter(is_read).collect();
        let rounding = open.iter_mut().map(|(.., tensor)| tensor);
        self.pool(&passes, rounding)?;
        let count = passes.len();
        for (pass, keys) in passes.into_iter().enumerate() {
            let advances = self.is_last && pass + 1 == count && !self.reads_stream();
            let seen = self.collect(keys, advances)?;
            for (is_twin, job, mut tensor) in std::mem::take(&mut open) {
                self.job.check_stop()?;
                tensor.round(count_of(keys, tensor.input()), &seen)?;
                if !tensor.is_complete() {
                    open.push((is_twin, job, tensor));
                    continue;
                }
                let (planned, input) = (tensor.planned(), tensor.input().to_string());
                let (bytes, outcome) = tensor.finish();
                let workspace = workspace.of(is_twin);
                // Before the matrix itself: a run that is killed in between does both again.
                if let (true, Some(seen)) =
                    (self.job.rounding.bias_absorption, seen.get(&(input, 0)))
                {
                    for (bias, bytes) in absorption::absorbed(job, planned, &bytes, seen)? {
                        workspace.finish(&bytes, absorption::outcome(job, bias))?;
                    }
                }
                workspace.finish(&bytes, outcome)?;
                if !is_twin {
                    self.job.progress.advance(planned.bytes());
                }
            }
        }
        Ok(())
    }

    /// All inputs of the stage, in the order of [`Needs`](super::needs::Needs).
    fn keys(&self) -> Vec<Key> {
        let mut inputs: Vec<String> = Vec::new();
        for input in self.members.iter().map(|name| stages::input_of(name)) {
            if !inputs.contains(&input) {
                inputs.push(input);
            }
        }
        let stored = self.job.weights.stored();
        let matrices = |input: &str| stored.tensor(input).map_or(0, |tensor| tensor.matrices);
        let keys = inputs.into_iter().map(|input| (matrices(&input), input));
        keys.flat_map(|(matrices, input)| (0..matrices).map(move |matrix| (input.clone(), matrix)))
            .collect()
    }

    /// Inputs of all experts together, for tensors that are not rounded in one pass: a pass over the cells of their own.
    fn pool<'t, 'r: 't>(
        &mut self,
        passes: &[&[Key]],
        open: impl Iterator<Item = &'t mut TensorRounding<'r>>,
    ) -> Result<()> {
        let most = |input: &str| passes.iter().map(|keys| count_of(keys, input)).max();
        for tensor in open {
            let most = most(tensor.input()).unwrap_or(0);
            let Some(input) = tensor.missing_pool(most).map(str::to_owned) else {
                continue;
            };
            let mut pool = None;
            for keys in passes {
                let keys: Vec<Key> = keys
                    .iter()
                    .filter(|(name, _)| *name == input)
                    .cloned()
                    .collect();
                let seen = self.collect(&keys, false)?;
                seen.values().for_each(|seen| add_to_pool(&mut pool, seen));
            }
            pool.iter().for_each(|pool| tensor.set_pool(pool));
        }
        Ok(())
    }

    /// With `advances` the original stream is taken through the block at the same time.
    fn collect(&mut self, keys: &[Key], advances: bool) -> Result<SeenInputs> {
        let mut wanted: BTreeMap<&str, Range<usize>> = BTreeMap::new();
        for (input, matrix) in keys {
            let range = wanted.entry(input).or_insert(*matrix..*matrix);
            range.end = matrix + 1;
        }
        let machine = self.job.machine(0);
        let mut collector = Collector::new(&machine);
        for cells in side_by_side(self.streams.cells.len(), self.job.machines.abreast()) {
            self.job.check_stop()?;
            let first = cells.start;
            let look = |cell| self.look(cell, &wanted, advances);
            let shown = self.job.machines.each(cells, look)?;
            for (cell, shown) in (first..).zip(shown) {
                for (key, captured) in shown.rounded {
                    collector.see(key.clone(), &captured, shown.original.get(&key))?;
                }
                if let Some(stream) = shown.original_behind {
                    self.streams.original.write(cell, stream)?;
                }
            }
        }
        self.streams.original_is_behind |= advances && self.reads_original();
        collector.finish()
    }

    fn reads_original(&self) -> bool {
        self.job.rounding.target_correction > 0.0
    }

    fn reads_stream(&self) -> bool {
        let config = self.job.weights.stored().config();
        stages::reads_stream(self.original.kind(), config, self.members)
    }

    /// Runs the block where that is needed to know what is wanted.
    fn show(
        &self,
        layer: &Layer,
        stream: &mut MachineBuffer,
        lengths: &[usize],
        routing: Option<&[ExpertRows]>,
        capture: &mut Capture,
    ) -> Result<()> {
        if self.reads_stream() {
            return layer.show_readers(stream, routing, capture);
        }
        layer.run(stream, lengths, capture)
    }

    /// One cell through the block as far as it is wanted.
    fn look(
        &self,
        cell: usize,
        wanted: &BTreeMap<&str, Range<usize>>,
        advances: bool,
    ) -> Result<Shown> {
        let (lengths, routing) = (&self.streams.cells[cell], routing_of(self.routes, cell));
        let left_out = || self.left_out.iter().copied();
        let mut rounded = Capture::of_matrices(wanted, routing).leaving_out(left_out());
        let mut stream = self.streams.rounded.read(cell)?;
        self.show(self.current, &mut stream, lengths, routing, &mut rounded)?;
        let mut shown = Shown {
            rounded: rounded.inputs,
            ..Shown::default()
        };
        if self.reads_original() {
            let mut original = Capture::of_matrices(wanted, routing);
            if !advances {
                original = original.leaving_out(left_out());
            }
            let mut stream = self.streams.original.read(cell)?;
            self.show(self.original, &mut stream, lengths, routing, &mut original)?;
            shown.original = original.inputs;
            shown.original_behind = advances.then_some(stream);
        }
        Ok(shown)
    }
}

/// Inputs that one cell shows.
#[derive(Default)]
struct Shown {
    rounded: BTreeMap<Key, Captured>,
    original: BTreeMap<Key, Captured>,
    /// The original stream behind the block, where it was taken along.
    original_behind: Option<MachineBuffer>,
}

/// How many matrices of an input are among the keys.
fn count_of(keys: &[Key], input: &str) -> usize {
    keys.iter().filter(|(name, _)| name == input).count()
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
    let machine = job.machine(0);
    let norm = machine.upload(norm.to_vec())?;
    let eps = job.weights.stored().config().norm_epsilon();
    let mut collector = Collector::new(&machine);
    for cell in 0..streams.cells.len() {
        job.check_stop()?;
        let normed = |stream: MachineBuffer| -> Result<_> {
            let normed = machine.rms_norm(&stream, &norm, eps)?;
            let width = machine.len(&norm);
            Ok(Captured::unweighted(&machine, normed, width))
        };
        let rounded = normed(streams.rounded.read(cell)?)?;
        let original = match job.rounding.target_correction > 0.0 {
            true => Some(normed(streams.original.read(cell)?)?),
            false => None,
        };
        let key = (name.to_string(), 0);
        collector.see(key, &rounded, original.as_ref())?;
    }
    let seen = collector.finish()?;
    for (is_twin, job) in job.and_twin() {
        let Some(tensor) = job.tensor(name) else {
            continue;
        };
        let mut rounding = TensorRounding::begin(job, tensor, name.to_string())?;
        rounding.round(1, &seen)?;
        let (bytes, outcome) = rounding.finish();
        workspace.of(is_twin).finish(&bytes, outcome)?;
    }
    job.progress.advance(tensor.bytes());
    Ok(())
}
