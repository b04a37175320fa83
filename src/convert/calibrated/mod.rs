//! The spine of a calibrated conversion: block after block, statistics from the network as it is already rounded.
//!
//! Enters: the original weights, a plan, samples. Leaves: every tensor's stored bytes in a workspace, from which the
//! artifact is assembled. Memory holds one block: its weights, its second moments; residual streams go to a file where
//! they do not fit.

mod absorption;
mod collector;
mod ledger;
mod moments;
pub mod needs;
pub mod rotation;
mod rounding;
pub mod sensitivity;
mod stages;
#[cfg(test)]
mod tests;
pub mod workspace;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Progress;
use crate::artifact::MemoryTensor;
use crate::backend::cpu::kernels::Isa;
use crate::backend::{ExpertRows, Machine, Machines};
use crate::calibrate::capture::Capture;
use crate::calibrate::cells::side_by_side;
use crate::calibrate::gradients::OutputMoments;
use crate::calibrate::layer::Layer;
use crate::calibrate::samples::Samples;
use crate::calibrate::stream::MachineStreams;
use crate::error::{Error, Result};
use crate::model::nemotron_h::is_bias_behind_ssm_in;
use crate::plan::{Plan, PlannedTensor};
use crate::quantize::feedback::Damping;
use crate::quantize::form::Form;
use crate::quantize::integer::IntegerGrid;
use crate::rewrite::RewrittenModel;
pub use ledger::{ExpertTokens, TensorOutcome, Treatment};
use moments::StageMoments;
use needs::{Arrangement, Needs};
use workspace::Workspace;

/// How weights are rounded when there are samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// To the nearest point of the grid that the data-free search finds.
    Rtn,
    /// The same search, errors weighted by the mean squares of the inputs.
    Imatrix,
    /// With error feedback.
    Gptq,
}

/// What the user decided about rounding.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Rounding {
    /// How weights are rounded.
    pub method: Method,
    /// Passes of coordinate descent after the first.
    pub passes: usize,
    /// Sequences that run through the network and back, so that rows repair each other; 0: rows apart.
    pub gradient_sequences: usize,
    /// Share of the correction towards the original network's outputs on inputs of the rounded one (beta), 0 to 1.
    pub target_correction: f64,
    /// What is added to second moments, as a share of their mean diagonal.
    pub damp_percent: f64,
    /// Biases behind `ssm_in` take back its mean errors.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub bias_absorption: bool,
}

impl Default for Rounding {
    fn default() -> Self {
        Self {
            method: Method::Gptq,
            passes: 3,
            gradient_sequences: 0,
            target_correction: 1.0,
            damp_percent: 0.01,
            bias_absorption: false,
        }
    }
}

impl Rounding {
    fn damping(&self) -> Damping {
        Damping {
            first: self.damp_percent,
            ..Damping::default()
        }
    }
}

/// Everything a calibrated conversion works on.
pub struct Calibrated<'a> {
    /// Where the network is run.
    pub machines: &'a Machines,
    /// The original weights after their rewrites, by GGUF name.
    pub weights: &'a RewrittenModel,
    /// What each tensor becomes.
    pub plan: &'a Plan,
    /// By tensor: grids of those that become integer rows instead.
    pub integers: &'a BTreeMap<String, IntegerGrid>,
    /// What the network reads.
    pub samples: &'a Samples,
    /// Second moments of the gradients at the outputs, if rows repair each other.
    pub outputs: Option<&'a OutputMoments>,
    /// How weights are rounded.
    pub rounding: Rounding,
    /// Memory to stay within, see [`Needs::arrange`](needs::Needs::arrange); the bytes do not depend on it.
    pub memory_bytes: u64,
    /// Told how far the work is.
    pub progress: &'a dyn Progress,
    /// Raised to stop.
    pub stop: &'a AtomicBool,
    /// Another artifact of the same weights: its matrices are rounded too, by what the network of this one shows, so that
    /// the samples are read once for both.
    pub twin: Option<&'a Calibrated<'a>>,
}

impl<'a> Calibrated<'a> {
    /// This artifact, and the other one.
    fn and_twin(&self) -> impl Iterator<Item = (bool, &Calibrated<'a>)> {
        let twin = self.twin.map(|twin| (true, twin));
        std::iter::once((false, self)).chain(twin)
    }

    /// Rounds every tensor of the network into the workspace; what is there already is taken as it is.
    ///
    /// # Errors
    /// The memory is too little, a weight cannot be read, a block computes something that is not a number, the workspace
    /// cannot be written, a raised `stop`.
    pub fn run(&self, workspace: &mut Workspace) -> Result<()> {
        let needs = Needs::of_samples(self.plan, self.rounding, self.samples);
        self.run_arranged(&needs.arrange(self.memory_bytes)?, workspace)
    }

    fn run_arranged(&self, arrangement: &Arrangement, workspace: &mut Workspace) -> Result<()> {
        let total = self.tensors().map(PlannedTensor::bytes).sum();
        self.progress.begin("calibrating", total);
        let mut streams = self.embed(arrangement.streams_in_file, workspace)?;
        for block in 0..self.plan.config.pattern.kinds().len() {
            self.block(block, arrangement, &mut streams, workspace)?;
        }
        self.finish(&streams, workspace)?;
        self.progress.end();
        Ok(())
    }

    /// Tensors of the network that is run: all but those of a multi-token-prediction head.
    fn tensors(&self) -> impl Iterator<Item = &PlannedTensor> {
        let tensors = self.plan.tensors.iter();
        tensors.filter(|tensor| self.weights.stored().tensor(&tensor.name).is_some())
    }

    fn tensor(&self, name: &str) -> Option<&PlannedTensor> {
        self.tensors().find(|tensor| tensor.name == name)
    }

    fn check_stop(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// How a tensor is stored.
    fn form(&self, tensor: &PlannedTensor) -> Form {
        match self.integers.get(&tensor.name) {
            Some(grid) => Form::Integer(*grid),
            None => Form::Block(tensor.ty),
        }
    }

    /// A tensor as the workspace holds it; integer rows as the weights they stand for.
    fn rounded(&self, tensor: &PlannedTensor, workspace: &Workspace) -> Result<MemoryTensor> {
        let stored = crate::forward::required(self.weights.stored(), &tensor.name)?;
        let shape = [stored.matrices, stored.rows, stored.columns];
        let bytes = workspace.read(&tensor.name)?;
        let ty = match self.form(tensor) {
            Form::Block(ty) => ty,
            form @ Form::Integer(_) => {
                let mut values = vec![0.0; shape.iter().product()];
                form.dequantize(stored.columns, &bytes, &mut values)?;
                return Ok(MemoryTensor::of_f32(&tensor.name, shape, &values));
            }
        };
        let [matrices, rows, columns] = shape;
        Ok(MemoryTensor {
            name: tensor.name.clone(),
            ty,
            matrices,
            rows,
            columns,
            bytes: bytes.into(),
        })
    }

    /// Rounds the embedding, whose inputs are one-hot, and looks up every token in both versions.
    fn embed(&self, in_file: bool, workspace: &mut Workspace) -> Result<BothStreams> {
        let name = "token_embd.weight";
        self.round_plainly(name, workspace)?;
        let hidden = self.weights.stored().config().hidden_size;
        let original = self.weights.matrix(name, 0)?;
        let mut rounded = vec![0.0; original.len()];
        if let Some(tensor) = self.tensor(name) {
            let bytes = workspace.read(name)?;
            self.form(tensor).dequantize(hidden, &bytes, &mut rounded)?;
        }
        let cells: Vec<Vec<usize>> = self
            .samples
            .cells()
            .map(|sequences| sequences.iter().map(Vec::len).collect())
            .collect();
        let lengths: Vec<usize> = cells
            .iter()
            .map(|cell| hidden * cell.iter().sum::<usize>())
            .collect();
        let mut streams = BothStreams {
            original: MachineStreams::new(self.machine(0), lengths.clone(), in_file)?,
            rounded: MachineStreams::new(self.machine(0), lengths, in_file)?,
            original_is_behind: false,
            cells,
        };
        for (cell, sequences) in self.samples.cells().enumerate() {
            let tokens = || {
                sequences
                    .iter()
                    .flatten()
                    .map(|token| *token as usize * hidden)
            };
            let look_up = |table: &[f32]| {
                tokens()
                    .flat_map(|at| table[at..at + hidden].iter().copied())
                    .collect()
            };
            streams.original.write_values(cell, look_up(&original))?;
            streams.rounded.write_values(cell, look_up(&rounded))?;
        }
        Ok(streams)
    }

    /// Rounds one block and runs both streams through it.
    fn block(
        &self,
        block: usize,
        arrangement: &Arrangement,
        streams: &mut BothStreams,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let prefix = format!("blk.{block}.");
        let names: Vec<&str> = self
            .tensors()
            .map(|tensor| tensor.name.as_str())
            .filter(|name| name.starts_with(&prefix))
            .collect();
        let stages = stages::of(self.plan.config.pattern.kinds()[block], &prefix, &names);
        let is_staged = |name: &&str| stages.iter().flatten().any(|staged| staged == name);
        let is_late = |name: &&str| self.rounding.bias_absorption && is_bias_behind_ssm_in(name);
        for name in names
            .iter()
            .filter(|name| !is_staged(name) && !is_late(name))
        {
            self.round_plainly(name, workspace)?;
        }
        let config = self.weights.stored().config();
        let originals = names
            .iter()
            .map(|name| self.weights.in_memory(name))
            .collect::<Result<Vec<_>>>()?;
        let original = Layer::open(self.machines, config, block, originals.clone())?;
        let routes = self.run_original(&original, &names, streams)?;
        for (index, stage) in stages.iter().enumerate() {
            self.check_stop()?;
            let open = stage.iter().filter(|name| !workspace.is_finished(name));
            let open: Vec<&str> = open.copied().collect();
            self.skip(stage.iter().filter(|name| !open.contains(name)));
            if open.is_empty() {
                continue;
            }
            let current = self.current_layer(block, &names, &originals, workspace)?;
            let mut stage = StageMoments {
                job: self,
                passes: arrangement.passes(block, index),
                members: stage,
                original: &original,
                current: &current,
                streams,
                routes: &routes,
                left_out: stages[index..].iter().flatten().copied().collect(),
                is_last: index + 1 == stages.len(),
            };
            stage.round(&open, workspace)?;
        }
        // Those of an earlier run are finished, those without anything to absorb are not.
        for name in names.iter().filter(|name| is_late(name)) {
            self.round_plainly(name, workspace)?;
        }
        let current = self.current_layer(block, &names, &originals, workspace)?;
        self.advance(&original, &current, streams, &routes)
    }

    /// Counts tensors that an earlier run finished.
    fn skip<'n>(&self, names: impl Iterator<Item = &'n &'n str>) {
        let tensors = names.filter_map(|name| self.tensor(name));
        tensors.for_each(|tensor| self.progress.advance(tensor.bytes()));
    }

    /// The block with what is rounded so far, and the rest as it was.
    fn current_layer(
        &self,
        block: usize,
        names: &[&str],
        originals: &[MemoryTensor],
        workspace: &Workspace,
    ) -> Result<Layer> {
        let tensors = names
            .iter()
            .zip(originals)
            .map(|(name, original)| match self.tensor(name) {
                Some(tensor) if workspace.is_finished(name) => self.rounded(tensor, workspace),
                _ => Ok(original.clone()),
            });
        Layer::open(
            self.machines,
            self.weights.stored().config(),
            block,
            tensors.collect::<Result<_>>()?,
        )
    }

    /// Where the original network routes each cell's tokens. Rounding must not change which experts read which samples.
    fn run_original(
        &self,
        layer: &Layer,
        names: &[&str],
        streams: &BothStreams,
    ) -> Result<Vec<Vec<ExpertRows>>> {
        if self.plan.config.moe.is_none() {
            return Ok(Vec::new());
        }
        let others = || {
            let names = names.iter().copied();
            names.filter(|name| !name.ends_with("ffn_gate_inp.weight"))
        };
        let mut routes = Vec::new();
        for (cell, lengths) in streams.cells.iter().enumerate() {
            self.check_stop()?;
            let mut capture = Capture::new(&[], None).leaving_out(others());
            layer.run(&mut streams.original.read(cell)?, lengths, &mut capture)?;
            routes.push(capture.routes);
        }
        show_starved_experts(&mut routes, &streams.cells);
        Ok(routes)
    }

    /// Both streams through the finished block.
    fn advance(
        &self,
        original: &Layer,
        rounded: &Layer,
        streams: &mut BothStreams,
        routes: &[Vec<ExpertRows>],
    ) -> Result<()> {
        let with_original = self.needs_original() && !streams.original_is_behind;
        for cells in side_by_side(streams.cells.len(), self.machines.abreast()) {
            self.check_stop()?;
            let first = cells.start;
            let before = &*streams;
            let run = |layer: &Layer, stream: &MachineStreams, cell: usize| -> Result<_> {
                let mut residual = stream.read(cell)?;
                let mut capture = Capture::new(&[], routing_of(routes, cell));
                layer.run(&mut residual, &before.cells[cell], &mut capture)?;
                Ok(residual)
            };
            let behind = self.machines.each(cells, |cell| {
                let original = with_original.then(|| run(original, &before.original, cell));
                Ok((original.transpose()?, run(rounded, &before.rounded, cell)?))
            })?;
            for (cell, (original, rounded)) in (first..).zip(behind) {
                if let Some(original) = original {
                    streams.original.write(cell, original)?;
                }
                streams.rounded.write(cell, rounded)?;
            }
        }
        streams.original_is_behind = false;
        Ok(())
    }

    /// Whether anything is learnt from the original network's stream.
    fn needs_original(&self) -> bool {
        self.rounding.target_correction > 0.0 || self.plan.config.moe.is_some()
    }

    /// The final norm and the head.
    fn finish(&self, streams: &BothStreams, workspace: &mut Workspace) -> Result<()> {
        let norm = "output_norm.weight";
        self.round_plainly(norm, workspace)?;
        let head = "output.weight";
        if self.tensor(head).is_none() || workspace.is_finished(head) {
            self.skip([&head].into_iter());
            return Ok(());
        }
        let norm = self.weights.matrix(norm, 0)?;
        moments::round_head(self, head, &norm, streams, workspace)
    }

    /// Rounds a tensor whose inputs are not looked at.
    fn round_plainly(&self, name: &str, workspace: &mut Workspace) -> Result<()> {
        for (is_twin, job) in self.and_twin() {
            let workspace = workspace.of(is_twin);
            let tensor = job.tensor(name).filter(|_| !workspace.holds(name));
            if let Some(tensor) = tensor {
                self.check_stop()?;
                let (bytes, outcome) = rounding::plain(job, tensor)?;
                workspace.finish(&bytes, outcome)?;
            }
        }
        let tensor = self.tensor(name);
        tensor
            .iter()
            .for_each(|tensor| self.progress.advance(tensor.bytes()));
        Ok(())
    }

    /// For operations without weights; of several machines that of expert `index`.
    fn machine(&self, index: usize) -> Machine {
        let config = self.weights.stored().config();
        self.machines.without_weights(index, config)
    }

    fn isa(&self) -> Isa {
        Isa::detect()
    }
}

/// Residual streams of the original network and of the rounded one.
struct BothStreams {
    original: MachineStreams,
    rounded: MachineStreams,
    /// The original one has been through the block whose matrices are rounded now, the other has not.
    original_is_behind: bool,
    /// Lengths of the sequences of each cell.
    cells: Vec<Vec<usize>>,
}

fn routing_of(routes: &[Vec<ExpertRows>], cell: usize) -> Option<&[ExpertRows]> {
    routes
        .get(cell)
        .map(Vec::as_slice)
        .filter(|routes| !routes.is_empty())
}

/// An expert that no sample chose sees every token, with weight 0: its output stays out, its inputs are known.
fn show_starved_experts(routes: &mut [Vec<ExpertRows>], cells: &[Vec<usize>]) {
    let experts = routes.first().map_or(0, Vec::len);
    for expert in 0..experts {
        if routes.iter().any(|cell| !cell[expert].rows.is_empty()) {
            continue;
        }
        for (cell, lengths) in routes.iter_mut().zip(cells) {
            let tokens = lengths.iter().sum::<usize>();
            cell[expert] = ExpertRows {
                rows: (0..tokens as u32).collect(),
                weights: vec![0.0; tokens],
            };
        }
    }
}
