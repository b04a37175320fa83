//! What a calibrated conversion needs, from headers alone: memory, how it stays within a limit, and work.
//!
//! Enters: a plan, lengths of samples, how weights are rounded, a limit. Leaves: [`Arrangement`], or how much would be
//! needed. Changes no number of the artifact: residual streams are the same in a file, and second moments the same when
//! they are collected in several passes over the samples.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Rounding, stages};
use crate::backend::SIDE_BY_SIDE;
use crate::backend::cpu::gram::{CHUNK_ROWS, Columns, products};
use crate::backend::cpu::kernels::Isa;
use crate::calibrate::cells::CELLS;
use crate::calibrate::samples::{SampleSettings, Samples};
use crate::error::{Error, Fault, Result};
use crate::model::hybrid_pattern::BlockKind;
use crate::plan::{Plan, PlannedTensor};

/// The program, its threads' stacks and what else is small.
const BASE_BYTES: u64 = 128 << 20;
/// Bytes per element of second moments while a matrix is rounded: mean, damped in strips, its factor, differences.
const ROUNDING_BYTES: u64 = 18;
/// Bytes per weight while a matrix is rounded: wanted, corrected and laid out for it, stored twice, and read back.
const WEIGHT_BYTES: u64 = 20;
/// Multiply-adds per weight and candidate that choosing scales takes, counted with the first pass and each later one.
const SCALE_SEARCH: f64 = 600.0;

/// What decides what a conversion needs.
#[derive(Debug, Clone, Copy)]
pub struct Needs<'a> {
    /// What each tensor becomes.
    pub plan: &'a Plan,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Tokens of the largest cell.
    pub cell_tokens: usize,
    /// Cells that hold any.
    pub cells: usize,
    /// How weights are rounded.
    pub rounding: Rounding,
}

/// How a conversion stays within its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrangement {
    /// Residual streams are kept in a temporary file.
    pub streams_in_file: bool,
    /// Most memory at a time, bytes.
    pub peak_bytes: u64,
    /// Passes over the samples for the stage that takes most of them.
    pub most_passes: usize,
    /// Per block and stage, which of its inputs are looked at together; a stage's inputs are numbered in its order.
    passes: Vec<Vec<Vec<Range<usize>>>>,
}

impl Arrangement {
    /// Which inputs of a stage are looked at together.
    pub fn passes(&self, block: usize, stage: usize) -> &[Range<usize>] {
        &self.passes[block][stage]
    }

    /// Cuts every pass into some of so many inputs.
    #[cfg(test)]
    pub fn look_at_most(&mut self, count: usize) {
        for passes in self.passes.iter_mut().flatten() {
            let cut = |pass: &Range<usize>| {
                let end = pass.end;
                let begins = pass.clone().step_by(count);
                begins.map(move |begin| begin..(begin + count).min(end))
            };
            *passes = passes.iter().flat_map(cut).collect();
        }
    }
}

/// One matrix's input, with the widest of the matrices that read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Input {
    n: u64,
    rows: u64,
    has_pool: bool,
}

impl Input {
    fn sums(self, rounding: &Rounding) -> u64 {
        let arrays = 1 + u64::from(rounding.target_correction > 0.0);
        8 * arrays * self.n * self.n
    }

    fn rounding(self) -> u64 {
        ROUNDING_BYTES * self.n * self.n + WEIGHT_BYTES * self.n * self.rows
    }
}

/// What a stage holds while it looks at some of its inputs.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    collecting: u64,
    sums: u64,
    rounding: u64,
    pool: u64,
}

impl Held {
    fn with(self, input: Input, needs: &Needs) -> Self {
        let sums = input.sums(&needs.rounding);
        let pool = u64::from(input.has_pool) * 16 * input.n * input.n;
        Self {
            collecting: self.collecting + needs.tree_levels() * sums,
            sums: self.sums + sums,
            rounding: self.rounding.max(input.rounding()),
            pool: self.pool.max(pool),
        }
    }

    fn peak(self) -> u64 {
        self.pool + self.collecting.max(self.sums + self.rounding)
    }
}

/// Multiply-adds per second of this machine, measured on a product the size of second moments; in rayon's current pool.
pub fn measured_rate() -> f64 {
    const WIDTH: usize = 1024;
    const LEAST: Duration = Duration::from_millis(50);
    let values = vec![1.0; CHUNK_ROWS * WIDTH];
    let columns = Columns {
        values: &values,
        stride: WIDTH,
        range: 0..WIDTH,
    };
    let mut sums = vec![0.0f64; WIDTH * WIDTH];
    let begun = Instant::now();
    let mut products_made = 0;
    while begun.elapsed() < LEAST {
        let add = |out: &mut f64, sum: f32| *out += f64::from(sum);
        products(
            Isa::detect(),
            0..CHUNK_ROWS,
            &columns,
            &columns,
            false,
            &mut sums,
            WIDTH,
            add,
        );
        products_made += 1;
    }
    (products_made * CHUNK_ROWS * WIDTH * WIDTH) as f64 / begun.elapsed().as_secs_f64()
}

impl<'a> Needs<'a> {
    /// Of a conversion that reads these samples.
    pub fn of_samples(plan: &'a Plan, rounding: Rounding, samples: &Samples) -> Self {
        let cells = samples.cells();
        let tokens = cells.map(|cell| cell.iter().map(Vec::len).sum::<usize>());
        let tokens: Vec<usize> = tokens.filter(|tokens| *tokens > 0).collect();
        Self {
            plan,
            tokens: samples.tokens(),
            cell_tokens: tokens.iter().copied().max().unwrap_or(0),
            cells: tokens.len(),
            rounding,
        }
    }

    /// Of a conversion that reads as much as `settings` allow at most.
    pub fn at_most(plan: &'a Plan, rounding: Rounding, settings: SampleSettings) -> Self {
        let of = |sequences: usize| sequences.saturating_mul(settings.context_tokens);
        Self {
            plan,
            tokens: of(settings.max_sequences),
            cell_tokens: of(settings.max_sequences.div_ceil(CELLS)),
            cells: settings.max_sequences.min(CELLS),
            rounding,
        }
    }

    /// How a conversion of at most so many bytes is arranged: residual streams go to a file before second moments are
    /// collected in more than one pass.
    ///
    /// # Errors
    /// Not even one matrix at a time fits; the error says what would be needed.
    pub fn arrange(&self, limit: u64) -> Result<Arrangement> {
        let in_one_pass = self.arranged(u64::MAX, false);
        if in_one_pass.peak_bytes <= limit {
            return Ok(in_one_pass);
        }
        let arranged = self.arranged(limit, true);
        if arranged.peak_bytes <= limit {
            return Ok(arranged);
        }
        let needed = self.least_bytes();
        let fault = Fault::new(format!(
            "{limit} bytes of memory are too few: second moments and weights, one matrix at a time, need {needed}"
        ));
        Err(Error::Plan(fault.hint(format!(
            "allow them with `--max-ram {needed}`, or read shorter sequences with `--calibration-context`"
        ))))
    }

    /// The smallest limit under which there is an arrangement.
    pub fn least_bytes(&self) -> u64 {
        self.arranged(0, true).peak_bytes
    }

    fn arranged(&self, limit: u64, streams_in_file: bool) -> Arrangement {
        let streams = match streams_in_file {
            true => 0,
            false => self.stream_bytes(),
        };
        let mut arrangement = Arrangement {
            streams_in_file,
            peak_bytes: BASE_BYTES + streams + self.ends(),
            most_passes: 1,
            passes: Vec::new(),
        };
        for (block, kind) in self.plan.config.pattern.kinds().iter().enumerate() {
            let names = self.names(block);
            let held = BASE_BYTES + streams + self.block_bytes(&names);
            let mut stages = Vec::new();
            for stage in stages::of(*kind, &format!("blk.{block}."), &names) {
                let inputs = self.inputs(&stage);
                let held = held + self.cell_bytes(*kind, &names, &inputs);
                let room = limit.saturating_sub(held);
                let passes = self.passes(&inputs, room);
                let peaks = passes.iter().map(|pass| self.peak(&inputs[pass.clone()]));
                let peak = peaks.max().unwrap_or(0);
                arrangement.peak_bytes = arrangement.peak_bytes.max(held + peak);
                arrangement.most_passes = arrangement.most_passes.max(passes.len());
                stages.push(passes);
            }
            arrangement.passes.push(stages);
        }
        arrangement
    }

    /// Sums that the tree over cells holds at a time: one per level, and the next leaf.
    fn tree_levels(&self) -> u64 {
        u64::from(self.cells.max(1).ilog2()) + 1
    }

    fn peak(&self, inputs: &[Input]) -> u64 {
        let add = |held: Held, input: &Input| held.with(*input, self);
        inputs.iter().fold(Held::default(), add).peak()
    }

    /// As many inputs at a time as there is room for, and at least one.
    fn passes(&self, inputs: &[Input], room: u64) -> Vec<Range<usize>> {
        let mut passes = Vec::new();
        let mut begun = 0;
        for end in 1..=inputs.len() {
            if begun + 1 < end && self.peak(&inputs[begun..end]) > room {
                passes.push(begun..end - 1);
                begun = end - 1;
            }
        }
        if begun < inputs.len() {
            passes.push(begun..inputs.len());
        }
        passes
    }

    /// The inputs of a stage in the order in which they are rounded.
    fn inputs(&self, stage: &[&str]) -> Vec<Input> {
        let mut inputs: Vec<(String, Input, usize)> = Vec::new();
        for tensor in stage.iter().filter_map(|name| self.tensor(name)) {
            let name = stages::input_of(&tensor.name);
            let rows = tensor.stored.rows as u64;
            match inputs.iter_mut().find(|(known, ..)| *known == name) {
                Some((_, input, _)) => input.rows = input.rows.max(rows),
                None => {
                    let input = Input {
                        n: tensor.stored.columns as u64,
                        rows,
                        has_pool: tensor.pieces.len() > 1,
                    };
                    inputs.push((name, input, tensor.pieces.len()));
                }
            }
        }
        let matrices = inputs.into_iter();
        matrices
            .flat_map(|(_, input, matrices)| vec![input; matrices])
            .collect()
    }

    fn tensor(&self, name: &str) -> Option<&'a PlannedTensor> {
        let tensors = &self.plan.tensors;
        tensors.iter().find(|tensor| tensor.name == name)
    }

    fn names(&self, block: usize) -> Vec<&'a str> {
        let prefix = format!("blk.{block}.");
        let names = self.plan.tensors.iter().map(|tensor| tensor.name.as_str());
        names.filter(|name| name.starts_with(&prefix)).collect()
    }

    fn hidden(&self) -> u64 {
        let embedding = self.tensor("token_embd.weight");
        embedding.map_or(0, |tensor| tensor.stored.columns as u64)
    }

    /// Of the original network and of the rounded one, F32.
    fn stream_bytes(&self) -> u64 {
        2 * 4 * self.tokens as u64 * self.hidden()
    }

    /// A block as it was and as it is, F32 each.
    fn block_bytes(&self, names: &[&str]) -> u64 {
        let tensors = names.iter().filter_map(|name| self.tensor(name));
        tensors.map(|tensor| 2 * 4 * tensor.weights()).sum()
    }

    /// What the cells of both networks that go side by side take on their way through a block, with the inputs that are kept of them.
    fn cell_bytes(&self, kind: BlockKind, names: &[&str], inputs: &[Input]) -> u64 {
        let visits = |tensor: &PlannedTensor| self.visits(tensor.pieces.len());
        let tensors = names.iter().filter_map(|name| self.tensor(name));
        let widths = tensors.map(|tensor| tensor.stored.rows as u64 * visits(tensor));
        let widest = widths.max().unwrap_or(0);
        let dense: u64 = inputs
            .iter()
            .filter(|input| !input.has_pool)
            .map(|input| input.n)
            .sum();
        let experts = inputs.iter().find(|input| input.has_pool);
        let experts = experts.map_or(0, |input| input.n * self.visits(inputs.len()));
        let forward = match kind {
            BlockKind::Mamba => 4 * widest,
            _ => 2 * widest,
        };
        let tokens = (SIDE_BY_SIDE * self.cell_tokens) as u64;
        4 * tokens * (4 * self.hidden() + forward + 2 * (dense + experts))
    }

    /// Matrices of a stack that a token visits.
    fn visits(&self, matrices: usize) -> u64 {
        let moe = self.plan.config.moe.as_ref().filter(|_| matrices > 1);
        moe.map_or(1, |moe| moe.num_experts_per_tok as u64)
    }

    /// The larger of embedding and head, as they are rounded.
    fn ends(&self) -> u64 {
        let weights = |name: &str| self.tensor(name).map_or(0, PlannedTensor::weights);
        let hidden = self.hidden();
        let head = Input {
            n: hidden,
            rows: weights("output.weight") / hidden.max(1),
            has_pool: false,
        };
        let embedding = 12 * weights("token_embd.weight");
        embedding.max(self.peak(&[head]))
    }

    /// Multiply-adds of the whole conversion: passes through the network, second moments, factors, rounding.
    pub fn multiply_adds(&self) -> f64 {
        let kinds = self.plan.config.pattern.kinds().iter().enumerate();
        let blocks = kinds.map(|(block, kind)| self.work_of_block(block, *kind));
        blocks.sum::<f64>() + self.work_of_stage(&["output.weight"])
    }

    fn work_of_block(&self, block: usize, kind: BlockKind) -> f64 {
        let names = self.names(block);
        let tensors = names.iter().filter_map(|name| self.tensor(name));
        let weights = tensors.map(|tensor| {
            let rows = tensor.stored.rows as f64 * self.visits(tensor.pieces.len()) as f64;
            rows * tensor.stored.columns as f64
        });
        let stages = stages::of(kind, &format!("blk.{block}."), &names);
        let networks = 1 + usize::from(self.rounding.target_correction > 0.0);
        // Readers are shown without a run; the rounded stream moves on by itself, the original one with the last stage.
        let runs = networks * stages.len().saturating_sub(1) + 1;
        let forward = weights.sum::<f64>() * self.tokens as f64 * runs as f64;
        forward
            + stages
                .iter()
                .map(|stage| self.work_of_stage(stage))
                .sum::<f64>()
    }

    fn work_of_stage(&self, stage: &[&str]) -> f64 {
        let passes = self.rounding.passes as f64;
        let cross = f64::from(u8::from(self.rounding.target_correction > 0.0));
        let tensors = stage.iter().filter_map(|name| self.tensor(name));
        let rounding = tensors.map(|tensor| {
            let (n, weights) = (tensor.stored.columns as f64, tensor.weights() as f64);
            weights * (n * (4.0 + passes + 1.5 * cross) + SCALE_SEARCH * (1.0 + passes))
        });
        let inputs = self.inputs(stage);
        let stacked = inputs.iter().filter(|input| input.has_pool).count();
        let moments = inputs.iter().map(|input| {
            let (n, tokens) = (input.n as f64, self.tokens as f64);
            let visited = match input.has_pool {
                true => self.visits(stacked) as f64 / stacked as f64,
                false => 1.0 + 2.0 * cross,
            };
            n * n * (tokens * visited / 2.0 + n / 3.0)
        });
        rounding.sum::<f64>() + moments.sum::<f64>()
    }
}
