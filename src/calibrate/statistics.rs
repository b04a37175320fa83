//! What every layer of the original network sees: the base of rewrites, of importance matrices, of sensitivities.
//!
//! Enters: a model, samples. Leaves: second moments of the normed residual stream per block, sizes of the inputs of every
//! matrix, routing counts. One block is in memory at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::capture::weights_of;
use super::cells::{CELLS, Merge, Tree, side_by_side};
use super::layer::Layer;
use super::samples::Samples;
use super::second_moments::{MomentsOfCells, SecondMoments};
use super::stream::MachineStreams;
use crate::artifact::StoredModel;
use crate::backend::{Backend, ExpertRows, Machine, MachineBuffer, Machines, SIDE_BY_SIDE};
use crate::error::{Error, Fault, Result};
use crate::forward::observer::Observer;
use crate::rewrite::{ChannelStatistics, Kept, RewriteStatistics, RewrittenModel};

/// Inputs of one matrix: sums over tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSums {
    /// Sum of u^2 per channel.
    pub squares: Vec<f64>,
    /// Largest |u| per channel.
    pub max_abs: Vec<f32>,
    /// Tokens seen.
    pub tokens: u64,
    /// Sum of their squared router weights; of matrices that see every token their number.
    pub weight: f64,
}

impl InputSums {
    /// Of rows `[_, n]`, which count `weights`; all 1 where there are none.
    fn of(machine: &Machine, rows: &MachineBuffer, n: usize, weights: &[f32]) -> Result<Self> {
        let tokens = machine.len(rows) / n;
        let columns = machine.column_sums(rows, n)?;
        let weight = weights.iter().map(|weight| f64::from(*weight));
        Ok(Self {
            squares: columns.squares,
            max_abs: columns.max_abs,
            tokens: tokens as u64,
            weight: match weights.is_empty() {
                true => tokens as f64,
                false => weight.sum(),
            },
        })
    }
}

impl Merge for InputSums {
    fn merge(&mut self, later: Self) {
        self.squares
            .iter_mut()
            .zip(&later.squares)
            .for_each(|(sum, later)| *sum += later);
        self.max_abs
            .iter_mut()
            .zip(&later.max_abs)
            .for_each(|(max, later)| *max = max.max(*later));
        self.tokens += later.tokens;
        self.weight += later.weight;
    }
}

/// Second moments of the normed residual stream before the norm's weight, at one place.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamMoments {
    /// Channels.
    pub n: usize,
    /// Sums of products, rows of the upper triangle: `n (n + 1) / 2`.
    pub triangle: Kept,
    /// Tokens seen.
    pub tokens: u64,
}

impl StreamMoments {
    fn keep(moments: &SecondMoments) -> Result<Self> {
        let n = moments.n;
        let rows = moments.sums.chunks_exact(n.max(1)).enumerate();
        let triangle: Vec<f64> = rows.flat_map(|(i, row)| &row[i..]).copied().collect();
        Ok(Self {
            n,
            triangle: Kept::new(triangle)?,
            tokens: moments.tokens,
        })
    }

    /// The whole of the mean, `[n, n]`.
    fn mean(&self) -> Result<Vec<f64>> {
        let n = self.n;
        let per_token = match self.tokens {
            0 => 0.0,
            tokens => 1.0 / tokens as f64,
        };
        let mut mean = vec![0.0; n * n];
        let triangle = self.triangle.read()?;
        let mut sums = triangle.iter();
        for i in 0..n {
            for (j, sum) in (i..n).zip(&mut sums) {
                mean[i * n + j] = sum * per_token;
                mean[j * n + i] = mean[i * n + j];
            }
        }
        Ok(mean)
    }
}

/// What the layers of a network see.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Statistics {
    /// Of the residual stream before every block and behind the last one.
    pub residual: Vec<StreamMoments>,
    /// Inputs by GGUF name, one entry per matrix of a stack; `None` where no token came.
    pub inputs: BTreeMap<String, Vec<Option<InputSums>>>,
}

/// What collecting statistics takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectionNeeds {
    /// Residual streams are kept in a temporary file.
    pub streams_in_file: bool,
    /// Most memory at a time.
    pub peak_bytes: u64,
}

impl Statistics {
    /// Runs the samples through the network, block after block.
    ///
    /// `in_file` keeps residual streams in a temporary file. `watch` is called before every cell of every block.
    ///
    /// # Errors
    /// A block computes something that is not a number, a file cannot be read, whatever `watch` returns.
    pub fn collect(
        machines: &Machines,
        model: &Arc<StoredModel>,
        samples: &Samples,
        in_file: bool,
        watch: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let plain = RewrittenModel::new(Arc::clone(model), Arc::default());
        let mut walk = Walk::new(machines, &plain, samples, in_file)?;
        let mut statistics = Self::default();
        for block in 0..model.config().pattern.kinds().len() {
            walk.block(block, &mut statistics, watch)?;
        }
        let last = StreamMoments::keep(&walk.residual_moments(watch)?)?;
        statistics.residual.push(last);
        if model.tensor("output.weight").is_some() {
            let inputs = walk.head_inputs()?;
            statistics
                .inputs
                .insert("output.weight".into(), vec![inputs]);
        }
        Ok(statistics)
    }

    /// How [`Self::collect`] stays within `limit` bytes.
    ///
    /// # Errors
    /// It cannot; the error says what it takes.
    pub fn arrange(model: &StoredModel, samples: &Samples, limit: u64) -> Result<CollectionNeeds> {
        let needs = |streams_in_file| CollectionNeeds {
            streams_in_file,
            peak_bytes: peak_bytes(model, samples, streams_in_file),
        };
        let mut arranged = [false, true].into_iter().map(needs);
        if let Some(needs) = arranged.find(|needs| needs.peak_bytes <= limit) {
            return Ok(needs);
        }
        let needed = Self::least_bytes(model, samples);
        let fault = Fault::new(format!(
            "{limit} bytes of memory are too few: the statistics of all blocks and the weights of one need {needed}"
        ));
        Err(Error::Plan(fault.hint(format!(
            "allow them with `--max-ram {needed}`, or read shorter sequences with `--calibration-context`"
        ))))
    }

    /// The smallest limit within which [`Self::collect`] can stay.
    pub fn least_bytes(model: &StoredModel, samples: &Samples) -> u64 {
        peak_bytes(model, samples, true)
    }

    /// As the choice of rewrites takes them.
    ///
    /// # Errors
    /// A temporary file cannot be written or read.
    pub fn into_rewrites(self) -> Result<RewriteStatistics> {
        let channels = |matrices: &Vec<Option<InputSums>>| {
            let width = matrices
                .iter()
                .flatten()
                .map(|sums| sums.squares.len())
                .next()
                .unwrap_or(0);
            let mut all = ChannelStatistics::default();
            for sums in matrices {
                match sums {
                    Some(sums) => {
                        let per_token = 1.0 / sums.tokens.max(1) as f64;
                        all.mean_square
                            .extend(sums.squares.iter().map(|square| square * per_token));
                        all.max_abs.extend(&sums.max_abs);
                    }
                    None => {
                        all.mean_square.extend(vec![0.0; width]);
                        all.max_abs.extend(vec![0.0; width]);
                    }
                }
            }
            all
        };
        let streams = self.residual.into_iter();
        Ok(RewriteStatistics {
            residual: streams
                .map(|stream| Kept::new(stream.mean()?))
                .collect::<Result<_>>()?,
            inputs: self
                .inputs
                .iter()
                .map(|(name, all)| (name.clone(), channels(all)))
                .collect(),
        })
    }
}

/// Bytes held at most while statistics are collected: second moments on their way through the tree, those of all blocks
/// where they are small, the weights of the largest block, what two cells show of it, residual streams.
fn peak_bytes(model: &StoredModel, samples: &Samples, in_file: bool) -> u64 {
    const BASE_BYTES: u64 = 128 << 20;
    let config = model.config();
    let hidden = config.hidden_size as u64;
    let blocks = config.pattern.kinds().len();
    let tokens = samples.cells().map(|cell| cell.iter().map(Vec::len).sum());
    let cell_tokens: usize = tokens.max().unwrap_or(0);
    let visits = |matrices: usize| match &config.moe {
        Some(moe) if matrices > 1 => moe.num_experts_per_tok as u64,
        _ => 1,
    };
    let block = |block: usize| {
        let prefix = format!("blk.{block}.");
        let tensors = model.tensors().iter();
        let tensors = tensors.filter(|tensor| tensor.name.starts_with(&prefix));
        let bytes = tensors.map(|tensor| {
            let widths = (tensor.columns + 2 * tensor.rows) as u64 * visits(tensor.matrices);
            4 * (tensor.weights() + (SIDE_BY_SIDE * cell_tokens) as u64 * widths)
        });
        bytes.sum::<u64>()
    };
    let embedding = model.tensor("token_embd.weight");
    let embedding = embedding.map_or(0, |tensor| 4 * tensor.weights());
    let largest = (0..blocks).map(block).max().unwrap_or(0).max(embedding);
    let levels = CELLS.ilog2() as u64 + SIDE_BY_SIDE as u64;
    let kept = Kept::held_bytes(hidden * (hidden + 1) / 2);
    let moments = levels * 8 * hidden * hidden + (blocks as u64 + 1) * kept;
    let streams = u64::from(!in_file) * 4 * samples.tokens() as u64 * hidden;
    BASE_BYTES + moments + largest + streams
}

/// Sums up every input that a block shows of one cell.
#[derive(Default)]
struct InputObserver {
    routes: Vec<ExpertRows>,
    sums: Vec<((String, usize), InputSums)>,
}

impl Observer<Machine> for InputObserver {
    fn experts(&mut self, _: usize, experts: &[ExpertRows]) {
        self.routes = experts.to_vec();
    }

    fn input(
        &mut self,
        tensor: &str,
        matrix: usize,
        machine: &Machine,
        input: &MachineBuffer,
        rows: usize,
    ) -> Result<()> {
        // A cell without sequences shows nothing, not even how wide inputs are.
        if let Some(in_features) = machine.len(input).checked_div(rows) {
            let weights = weights_of(&self.routes, tensor, matrix);
            let sums = InputSums::of(machine, input, in_features, &weights)?;
            self.sums.push(((tensor.to_string(), matrix), sums));
        }
        Ok(())
    }
}

/// Residual streams on their way through the blocks.
struct Walk<'a> {
    model: &'a RewrittenModel,
    streams: MachineStreams,
    cells: Vec<Vec<usize>>,
    machines: &'a Machines,
    machine: Machine,
}

impl<'a> Walk<'a> {
    fn new(
        machines: &'a Machines,
        model: &'a RewrittenModel,
        samples: &Samples,
        in_file: bool,
    ) -> Result<Self> {
        let hidden = model.stored().config().hidden_size;
        let cells: Vec<Vec<usize>> = samples
            .cells()
            .map(|sequences| sequences.iter().map(Vec::len).collect())
            .collect();
        let lengths = cells
            .iter()
            .map(|cell| hidden * cell.iter().sum::<usize>())
            .collect();
        let machine = || machines.without_weights(0, model.stored().config());
        let mut streams = MachineStreams::new(machine(), lengths, in_file)?;
        let embedding = model.matrix("token_embd.weight", 0)?;
        for (cell, sequences) in samples.cells().enumerate() {
            let rows = sequences
                .iter()
                .flatten()
                .map(|token| &embedding[*token as usize * hidden..][..hidden]);
            streams.write_values(cell, rows.flatten().copied().collect())?;
        }
        Ok(Self {
            model,
            streams,
            cells,
            machine: machine(),
            machines,
        })
    }

    fn block(
        &mut self,
        block: usize,
        statistics: &mut Statistics,
        watch: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let stored = self.model.stored();
        let prefix = format!("blk.{block}.");
        let tensors: Vec<_> = stored
            .tensors()
            .iter()
            .filter(|tensor| tensor.name.starts_with(&prefix))
            .collect();
        let in_memory = tensors
            .iter()
            .map(|tensor| self.model.in_memory(&tensor.name));
        let layer = Layer::open(
            self.machines,
            stored.config(),
            block,
            in_memory.collect::<Result<_>>()?,
        )?;
        let mut residual = MomentsOfCells::new(&self.machine, self.hidden())?;
        let ones = self.machine.upload(vec![1.0; self.hidden()])?;
        let mut inputs: BTreeMap<(String, usize), Tree<InputSums>> = BTreeMap::new();
        for cells in side_by_side(self.cells.len(), self.machines.abreast()) {
            watch()?;
            let first = cells.start;
            let shown = self.machines.each(cells, |cell| {
                let mut stream = self.streams.read(cell)?;
                let moments = residual.look(self.normed(&stream, &ones)?)?;
                let mut inputs = InputObserver::default();
                layer.run(&mut stream, &self.cells[cell], &mut inputs)?;
                Ok((moments, stream, inputs.sums))
            })?;
            for (cell, (moments, stream, sums)) in (first..).zip(shown) {
                residual.push(moments)?;
                self.streams.write(cell, stream)?;
                for (key, sums) in sums {
                    inputs.entry(key).or_default().push(sums);
                }
            }
        }
        let moments = StreamMoments::keep(&residual.finish()?)?;
        statistics.residual.push(moments);
        let matrices = |name: &str| {
            tensors
                .iter()
                .find(|tensor| tensor.name == name)
                .map_or(1, |tensor| tensor.matrices)
        };
        for ((name, matrix), tree) in inputs {
            let count = matrices(&name);
            let all = statistics
                .inputs
                .entry(name)
                .or_insert_with(|| vec![None; count]);
            all[matrix] = tree.finish();
        }
        Ok(())
    }

    fn residual_moments(&self, watch: &dyn Fn() -> Result<()>) -> Result<SecondMoments> {
        let mut all = MomentsOfCells::new(&self.machine, self.hidden())?;
        let ones = self.machine.upload(vec![1.0; self.hidden()])?;
        for cell in 0..self.cells.len() {
            watch()?;
            all.push(all.look(self.normed(&self.streams.read(cell)?, &ones)?)?)?;
        }
        all.finish()
    }

    fn head_inputs(&self) -> Result<Option<InputSums>> {
        let weight = self.model.matrix("output_norm.weight", 0)?;
        let weight = self.machine.upload(weight)?;
        let mut tree = Tree::default();
        for cell in 0..self.cells.len() {
            let rows = self.normed(&self.streams.read(cell)?, &weight)?;
            tree.push(InputSums::of(&self.machine, &rows, self.hidden(), &[])?);
        }
        Ok(tree.finish())
    }

    fn normed(&self, stream: &MachineBuffer, weight: &MachineBuffer) -> Result<MachineBuffer> {
        let eps = self.model.stored().config().norm_epsilon();
        self.machine.rms_norm(stream, weight, eps)
    }

    fn hidden(&self) -> usize {
        self.model.stored().config().hidden_size
    }
}

#[cfg(test)]
mod tests {
    use nemoconv_fixtures::checkpoint::cases;

    use super::*;

    fn samples() -> Samples {
        let token = |i: u32| (i * 7919 + 13) % 1000;
        let sequence = |first: u32| (first * 31..first * 31 + 20 + first).map(token).collect();
        Samples {
            sequences: (0..9).map(sequence).collect(),
        }
    }

    fn statistics(path: &str, threads: usize) -> Statistics {
        let model = Arc::new(StoredModel::open(path).unwrap());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let in_file = threads == 2;
            Statistics::collect(&Machines::Cpu, &model, &samples(), in_file, &|| Ok(())).unwrap()
        })
    }

    /// Equal values: a NaN is refused, and zeros of both signs are the same sum.
    #[track_caller]
    fn check(path: &str) {
        let one = statistics(path, 1);
        assert!(!one.inputs.is_empty() && one.residual.iter().all(|s| s.tokens == 216));
        for threads in [2, 3] {
            assert!(
                statistics(path, threads) == one,
                "{path}: {threads} threads"
            );
        }
    }

    #[test]
    fn less_memory_means_a_file_and_then_an_error() {
        let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
        let arranged = |limit| Statistics::arrange(&model, &samples(), limit);
        let roomy = arranged(u64::MAX).unwrap();
        assert!(!roomy.streams_in_file);
        assert_eq!(arranged(roomy.peak_bytes).unwrap(), roomy);
        let tight = arranged(roomy.peak_bytes - 1).unwrap();
        assert!(tight.streams_in_file && tight.peak_bytes < roomy.peak_bytes);
        let error = arranged(tight.peak_bytes - 1).unwrap_err();
        let mend = format!("--max-ram {}", tight.peak_bytes);
        assert!(error.hint().unwrap().contains(&mend), "{error}");
    }

    #[test]
    fn statistics_do_not_depend_on_threads_or_on_where_streams_are_kept() {
        check(nemoconv_fixtures::nano().to_str().unwrap());
        let with_experts = cases()
            .into_iter()
            .find(|case| case.checkpoint.pattern.contains('E'));
        let case = with_experts.expect("a case has experts");
        let folder = tempfile::tempdir().unwrap();
        let path = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        check(path.to_str().unwrap());
    }
}
