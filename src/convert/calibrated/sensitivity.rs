//! How much each tensor's rounding costs the network: local losses per type, and the divergence that they lead to.
//!
//! Enters: the original weights, samples, groups of tensors that share a type. Leaves: per group and type an estimate of
//! the KL divergence. Forward passes only. Decides nothing about types.
//!
//! A group is rounded alone, at its lowest type and at one of about four bits, and the network is run on text that the
//! rounding has not seen: `KL = a l`, l the local loss `tr(E M E^T) / tr(W M W^T)`. Local losses of all other types come
//! from a sample of rows. Everything before a group's block is run once for all.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;
use rayon::prelude::*;

use super::{Method, Rounding, stages};
use crate::artifact::{MemoryTensor, StoredModel, StoredTensor};
use crate::backend::Backend;
use crate::backend::activation::Activation;
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::{Cpu, Residence};
use crate::calibrate::capture::Capture;
use crate::calibrate::cells::Merge;
use crate::calibrate::layer::Layer;
use crate::calibrate::samples::Samples;
use crate::calibrate::second_moments::SecondMoments;
use crate::convert::Progress;
use crate::error::{Error, Result};
use crate::forward::log_softmax::LogSoftmax;
use crate::forward::network::Network;
use crate::forward::numerics::Numerics;
use crate::forward::observer::Silent;
use crate::forward::required;
use crate::quantize::feedback::{self, Damping, InputMoments, can_feed_back};
use crate::quantize::quantize_rows;

/// Tokens whose second moments are taken.
const MOMENT_TOKENS: usize = 16 << 10;
/// Tokens that the probes are run on: others than those.
const PROBE_TOKENS: usize = 8 << 10;
/// Tokens that are run together.
const BATCH_TOKENS: usize = 2048;
/// Positions whose logits are compared, and how many logits may be kept for it.
const POSITIONS: usize = 2048;
const KEPT_LOGITS: usize = 1 << 26;
/// Rows of a tensor that local losses are measured on, and of each matrix of a stack.
const SAMPLE_ROWS: usize = 256;
const SAMPLE_ROWS_OF_STACK: usize = 32;
/// Bits of the second probe.
const MIDDLE_BITS: f64 = 4.5;
/// Bounds of the exponent with which the divergence grows between the two probes.
const GROWTH: (f64, f64) = (0.5, 2.0);

/// Tensors that share a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What they have in common.
    pub name: String,
    /// GGUF names, all of one block.
    pub tensors: Vec<String>,
    /// Types to look at, by size.
    pub types: Vec<GgmlType>,
}

/// What one type costs a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TypeLoss {
    /// The type.
    pub ty: GgmlType,
    /// `tr(E M E^T) / tr(W M W^T)`, summed over the tensors.
    pub loss: f64,
    /// What that adds to the KL divergence, nats.
    pub kl_divergence: f64,
}

/// What every type costs a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// KL divergence per local loss, where losses are small.
    pub gain: f64,
    /// One per type of the group.
    pub types: Vec<TypeLoss>,
}

/// A measurement about to be made.
pub struct Measurement<'a> {
    /// The original weights, by GGUF name.
    pub weights: &'a Arc<StoredModel>,
    /// What the network reads.
    pub samples: &'a Samples,
    /// How weights will be rounded.
    pub rounding: Rounding,
    /// What is looked at.
    pub groups: &'a [Group],
    /// Told how far the work is, in bytes of the original weights.
    pub progress: &'a dyn Progress,
    /// Raised to stop.
    pub stop: &'a AtomicBool,
}

impl Measurement<'_> {
    /// Measures every group, in order.
    ///
    /// # Errors
    /// A weight cannot be read, a block computes something that is not a number, a raised `stop`.
    pub fn run(&self) -> Result<Vec<Sensitivity>> {
        let mut bytes = 0;
        for tensor in self.groups.iter().flat_map(|group| &group.tensors) {
            bytes += required(self.weights, tensor)?.bytes();
        }
        self.progress.begin("measuring", bytes);
        let mut probing = Probing::begin(self)?;
        let mut measured: BTreeMap<&str, Sensitivity> = BTreeMap::new();
        probing.embedding(&mut measured)?;
        for block in 0..self.weights.config().pattern.kinds().len() {
            probing.block(block, &mut measured)?;
        }
        probing.head(&mut measured)?;
        self.progress.end();
        let found = self
            .groups
            .iter()
            .map(|group| measured.remove(group.name.as_str()));
        Ok(found.map(Option::unwrap_or_default).collect())
    }

    fn isa(&self) -> Isa {
        Isa::detect()
    }

    fn check_stop(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// All values of one matrix, f32.
    fn matrix(&self, tensor: &StoredTensor, matrix: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; tensor.rows * tensor.columns];
        self.weights
            .dequantize_rows(tensor, matrix, 0, &mut Vec::new(), &mut values)?;
        Ok(values)
    }

    /// Rounds rows as the conversion will, with one pass of descent at most.
    fn round(
        &self,
        ty: GgmlType,
        columns: usize,
        rows: &[f32],
        inputs: Option<&Inputs>,
    ) -> Vec<u8> {
        let mut out = vec![0; ty.bytes_for(rows.len() as u64).unwrap_or(0) as usize];
        match (self.rounding.method, inputs) {
            (Method::Gptq, Some(inputs)) if can_feed_back(ty) => {
                let passes = self.rounding.passes.min(1);
                feedback::quantize_rows(self.isa(), ty, rows, &inputs.moments, passes, &mut out);
            }
            (Method::Gptq | Method::Imatrix, Some(inputs)) => {
                let _ = quantize_rows(ty, columns, rows, Some(&inputs.mean_squares), &mut out);
            }
            _ => {
                let _ = quantize_rows(ty, columns, rows, None, &mut out);
            }
        }
        out
    }

    /// What is known of the inputs of a matrix, damped the more the fewer tokens were seen.
    fn inputs(&self, seen: &SecondMoments) -> Option<Inputs> {
        let scarcity = seen.n as f64 / (2 * seen.tokens.max(1)) as f64;
        let damping = Damping {
            first: self.rounding.damp_percent + scarcity,
            ..Damping::default()
        };
        Some(Inputs {
            moments: InputMoments::new(self.isa(), seen.n, &seen.mean(), damping)?,
            mean_squares: seen.mean_squares(),
            weight: seen.weight,
        })
    }
}

impl Default for Sensitivity {
    /// Of a tensor that nothing reads.
    fn default() -> Self {
        Self {
            gain: 0.0,
            types: Vec::new(),
        }
    }
}

/// Inputs of one matrix.
struct Inputs {
    moments: InputMoments,
    mean_squares: Vec<f32>,
    /// Sum of what its tokens count.
    weight: f64,
}

/// Sums of local losses, one per type.
struct LocalLosses {
    energy: f64,
    losses: Vec<f64>,
}

impl LocalLosses {
    fn relative(&self) -> Vec<f64> {
        self.losses
            .iter()
            .map(|loss| loss / self.energy.max(f64::MIN_POSITIVE))
            .collect()
    }
}

/// Sequences that are run together.
struct Batch {
    tokens: Vec<u32>,
    lengths: Vec<usize>,
    /// Residual streams of the original network before the block that is looked at.
    residual: Vec<f32>,
}

/// Positions of a batch with what the original network predicts there.
struct Reference {
    rows: Vec<u32>,
    /// `[rows, vocab_size]`.
    logits: Vec<f32>,
}

/// A measurement on its way through the network.
struct Probing<'a> {
    job: &'a Measurement<'a>,
    network: Network<Cpu>,
    moment_batches: Vec<Batch>,
    probe_batches: Vec<Batch>,
    /// Parallel to the probe's batches.
    references: Vec<Reference>,
}

/// Types that a group is probed with: its lowest, and one of about four bits.
fn probe_types(group: &Group) -> Vec<GgmlType> {
    let middle = group
        .types
        .iter()
        .find(|ty| ty.bits_per_weight() >= MIDDLE_BITS);
    let mut types: Vec<GgmlType> = group.types.iter().take(1).chain(middle).copied().collect();
    types.dedup();
    types
}

impl<'a> Probing<'a> {
    fn begin(job: &'a Measurement<'a>) -> Result<Self> {
        let backend = Cpu::new(Arc::clone(job.weights), Residence::Mapped);
        let network = Network::open(job.weights, backend, &Numerics::EXACT)?;
        let (for_moments, for_probes) = choose_sequences(&job.samples.sequences);
        let embed = |mut batch: Batch| {
            batch.residual = network.embed(&batch.tokens)?;
            Ok(batch)
        };
        let moment_batches = batches(&for_moments)
            .into_iter()
            .map(embed)
            .collect::<Result<_>>()?;
        let probe_batches: Vec<Batch> = batches(&for_probes)
            .into_iter()
            .map(embed)
            .collect::<Result<_>>()?;
        let tokens = probe_batches
            .iter()
            .map(|batch| batch.tokens.len())
            .sum::<usize>();
        let positions = POSITIONS
            .min(KEPT_LOGITS / job.weights.config().vocab_size)
            .max(1);
        let stride = tokens.div_ceil(positions);
        let references = probe_batches.iter().map(|batch| {
            job.check_stop()?;
            let rows: Vec<u32> = (0..batch.tokens.len() as u32)
                .skip(stride - 1)
                .step_by(stride)
                .collect();
            let normed = network.run_from(0, batch.residual.clone(), &batch.lengths)?;
            Ok(Reference {
                logits: network.logits(&normed, &rows, &mut Silent)?,
                rows,
            })
        });
        let references = references.collect::<Result<_>>()?;
        Ok(Self {
            job,
            network,
            moment_batches,
            probe_batches,
            references,
        })
    }

    /// The embedding, whose inputs are one-hot: its local loss is that of the rows which the text looks up.
    fn embedding(&self, measured: &mut BTreeMap<&'a str, Sensitivity>) -> Result<()> {
        let name = "token_embd.weight";
        let Some(group) = self.group_of(name) else {
            return Ok(());
        };
        let tensor = required(self.job.weights, name)?;
        let rounded = |ty: GgmlType, rows: &[f32]| {
            let bytes = self.job.round(ty, tensor.columns, rows, None);
            let mut values = vec![0.0; rows.len()];
            dequantize(ty, &bytes, &mut values).map(|()| values)
        };
        let mut local = LocalLosses {
            energy: 0.0,
            losses: vec![0.0; group.types.len()],
        };
        for batch in &self.moment_batches {
            self.job.check_stop()?;
            local.energy += sum_of_squares(&batch.residual);
            for (loss, ty) in local.losses.iter_mut().zip(&group.types) {
                let values = rounded(*ty, &batch.residual)?;
                let errors: Vec<f32> = values
                    .iter()
                    .zip(&batch.residual)
                    .map(|(a, b)| a - b)
                    .collect();
                *loss += sum_of_squares(&errors);
            }
        }
        let is_tied = self.job.weights.tensor("output.weight").is_none();
        let mut probed = Vec::new();
        for ty in probe_types(group) {
            let head = match is_tied {
                true => Some(Head::new(self.job.weights, self.plainly(tensor, ty)?)?),
                false => None,
            };
            let run = |batch: &Batch| {
                self.network
                    .run_from(0, rounded(ty, &batch.residual)?, &batch.lengths)
            };
            probed.push((ty, self.divergence(run, head.as_ref())?));
        }
        self.conclude(group, &local, &probed, measured)
    }

    /// A tensor rounded to the nearest.
    fn plainly(&self, tensor: &StoredTensor, ty: GgmlType) -> Result<MemoryTensor> {
        let bytes = self
            .job
            .round(ty, tensor.columns, &self.job.matrix(tensor, 0)?, None);
        Ok(memory_tensor(tensor, ty, bytes))
    }

    /// All groups of a block; then every stream is behind it.
    fn block(&mut self, block: usize, measured: &mut BTreeMap<&'a str, Sensitivity>) -> Result<()> {
        let prefix = format!("blk.{block}.");
        let tensors = self
            .job
            .weights
            .tensors()
            .iter()
            .filter(|tensor| tensor.name.starts_with(&prefix));
        let originals = tensors
            .map(|tensor| self.original(tensor))
            .collect::<Result<Vec<_>>>()?;
        let layer = Layer::open(self.job.weights.config(), block, originals.clone())?;
        let groups: Vec<&Group> = self
            .job
            .groups
            .iter()
            .filter(|group| group.tensors[0].starts_with(&prefix))
            .collect();
        let seen = self.advance_moments(&layer, &groups)?;
        for group in groups {
            let looked = self.look_at(group, &seen)?;
            let mut probed = Vec::new();
            for (ty, tensors) in probe_types(group).into_iter().zip(looked.probes) {
                let mut replaced = originals.clone();
                for tensor in tensors {
                    let place = replaced
                        .iter_mut()
                        .find(|original| original.name == tensor.name);
                    *place.expect("a group's tensors are of its block") = tensor;
                }
                let layer = Layer::open(self.job.weights.config(), block, replaced)?;
                let run = |batch: &Batch| {
                    let mut residual = batch.residual.clone();
                    layer.run(&mut residual, &batch.lengths, &mut Capture::default())?;
                    self.network.run_from(block + 1, residual, &batch.lengths)
                };
                probed.push((ty, self.divergence(run, None)?));
            }
            self.conclude(group, &looked.local, &probed, measured)?;
        }
        for batch in &mut self.probe_batches {
            layer.run(&mut batch.residual, &batch.lengths, &mut Capture::default())?;
        }
        Ok(())
    }

    /// Runs the moments' streams through a block and sums up what its groups read.
    fn advance_moments(
        &mut self,
        layer: &Layer,
        groups: &[&Group],
    ) -> Result<BTreeMap<(String, usize), SecondMoments>> {
        let inputs: Vec<String> = groups
            .iter()
            .flat_map(|group| &group.tensors)
            .map(|name| stages::input_of(name))
            .collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let mut seen: BTreeMap<(String, usize), SecondMoments> = BTreeMap::new();
        for batch in &mut self.moment_batches {
            self.job.check_stop()?;
            let mut capture = Capture::new(&inputs, None);
            layer.run(&mut batch.residual, &batch.lengths, &mut capture)?;
            for (key, captured) in capture.inputs {
                let weights = (!captured.weights.is_empty()).then_some(captured.weights.as_slice());
                let mut moments = SecondMoments::empty(captured.in_features);
                moments.add(self.job.isa(), &captured.rows, weights);
                match seen.get_mut(&key) {
                    Some(sum) => sum.merge(moments),
                    None => drop(seen.insert(key, moments)),
                }
            }
        }
        Ok(seen)
    }

    /// The head, which reads the normed stream.
    fn head(&self, measured: &mut BTreeMap<&'a str, Sensitivity>) -> Result<()> {
        let name = "output.weight";
        let Some(group) = self.group_of(name) else {
            return Ok(());
        };
        let end = self.job.weights.config().pattern.kinds().len();
        let mut moments = SecondMoments::empty(self.job.weights.config().hidden_size);
        for batch in &self.moment_batches {
            let normed = self
                .network
                .run_from(end, batch.residual.clone(), &batch.lengths)?;
            moments.add(self.job.isa(), &normed, None);
        }
        let seen = [((name.to_string(), 0), moments)].into_iter().collect();
        let looked = self.look_at(group, &seen)?;
        let mut probed = Vec::new();
        for (ty, tensors) in probe_types(group).into_iter().zip(looked.probes) {
            let tensor = tensors.into_iter().next().expect("a head is one tensor");
            let head = Head::new(self.job.weights, tensor)?;
            let run = |batch: &Batch| {
                self.network
                    .run_from(end, batch.residual.clone(), &batch.lengths)
            };
            probed.push((ty, self.divergence(run, Some(&head))?));
        }
        self.conclude(group, &looked.local, &probed, measured)
    }

    fn group_of(&self, tensor: &str) -> Option<&'a Group> {
        self.job
            .groups
            .iter()
            .find(|group| group.tensors.iter().any(|name| name == tensor))
    }

    fn original(&self, tensor: &StoredTensor) -> Result<MemoryTensor> {
        let mut bytes = vec![0; tensor.bytes() as usize];
        let matrix_bytes = tensor.rows * tensor.row_bytes();
        for (matrix, bytes) in bytes.chunks_mut(matrix_bytes.max(1)).enumerate() {
            self.job.weights.read_rows(tensor, matrix, 0, bytes)?;
        }
        Ok(memory_tensor(tensor, tensor.ty, bytes))
    }

    /// Local losses of a group's types, and its tensors in the types of the probes.
    fn look_at(
        &self,
        group: &Group,
        seen: &BTreeMap<(String, usize), SecondMoments>,
    ) -> Result<Looked> {
        let types = probe_types(group);
        let mut looked = Looked {
            local: LocalLosses {
                energy: 0.0,
                losses: vec![0.0; group.types.len()],
            },
            probes: vec![Vec::new(); types.len()],
        };
        for name in &group.tensors {
            let tensor = required(self.job.weights, name)?;
            let mut stored: Vec<Vec<u8>> = vec![Vec::new(); types.len()];
            for matrix in 0..tensor.matrices {
                self.job.check_stop()?;
                let values = self.job.matrix(tensor, matrix)?;
                let inputs = seen
                    .get(&(stages::input_of(name), matrix))
                    .and_then(|seen| self.job.inputs(seen));
                if let Some(inputs) = &inputs {
                    self.add_losses(group, tensor, &values, inputs, &mut looked.local);
                }
                for (ty, bytes) in types.iter().zip(&mut stored) {
                    bytes.extend(
                        self.job
                            .round(*ty, tensor.columns, &values, inputs.as_ref()),
                    );
                }
            }
            for ((ty, bytes), probe) in types.iter().zip(stored).zip(&mut looked.probes) {
                probe.push(memory_tensor(tensor, *ty, bytes));
            }
        }
        Ok(looked)
    }

    /// Adds the losses of one matrix, measured on evenly spaced rows and scaled up to all.
    fn add_losses(
        &self,
        group: &Group,
        tensor: &StoredTensor,
        values: &[f32],
        inputs: &Inputs,
        sums: &mut LocalLosses,
    ) {
        let columns = tensor.columns;
        let most = if tensor.matrices > 1 {
            SAMPLE_ROWS_OF_STACK
        } else {
            SAMPLE_ROWS
        };
        let count = tensor.rows.min(most);
        let row = |index: usize| index * tensor.rows / count * columns;
        let rows: Vec<f32> = (0..count)
            .flat_map(|index| &values[row(index)..][..columns])
            .copied()
            .collect();
        let scale = inputs.weight * inputs.moments.unit * tensor.rows as f64 / count as f64;
        sums.energy += scale * feedback::loss(self.job.isa(), &rows, &inputs.moments);
        let mut errors = vec![0.0; rows.len()];
        for (ty, loss) in group.types.iter().zip(&mut sums.losses) {
            let bytes = self.job.round(*ty, columns, &rows, Some(inputs));
            dequantize(*ty, &bytes, &mut errors).expect("the type was written just now");
            errors
                .iter_mut()
                .zip(&rows)
                .for_each(|(error, row)| *error -= row);
            *loss += scale * feedback::loss(self.job.isa(), &errors, &inputs.moments);
        }
    }

    /// Mean KL divergence from the original of what `run` makes of the probe's batches.
    fn divergence(
        &self,
        run: impl Fn(&Batch) -> Result<Vec<f32>>,
        head: Option<&Head>,
    ) -> Result<f64> {
        let (mut sum, mut positions) = (0.0, 0);
        for (batch, reference) in self.probe_batches.iter().zip(&self.references) {
            self.job.check_stop()?;
            let normed = run(batch)?;
            let logits = match head {
                Some(head) => head.logits(&normed, &reference.rows)?,
                None => self.network.logits(&normed, &reference.rows, &mut Silent)?,
            };
            let vocabulary = logits.len() / reference.rows.len().max(1);
            let rows = reference
                .logits
                .par_chunks(vocabulary.max(1))
                .zip(logits.par_chunks(vocabulary.max(1)));
            let divergences: Vec<f64> = rows
                .map(|(original, rounded)| kl_divergence(original, rounded))
                .collect();
            sum += divergences.iter().sum::<f64>();
            positions += divergences.len();
        }
        Ok(sum / positions.max(1) as f64)
    }

    /// From probes and local losses to what every type costs.
    fn conclude(
        &self,
        group: &'a Group,
        local: &LocalLosses,
        probed: &[(GgmlType, f64)],
        measured: &mut BTreeMap<&'a str, Sensitivity>,
    ) -> Result<()> {
        let losses = local.relative();
        let point = |&(ty, kl_divergence): &(GgmlType, f64)| {
            let at = group.types.iter().position(|other| *other == ty);
            (at.map_or(0.0, |at| losses[at]), kl_divergence)
        };
        let points: Vec<(f64, f64)> = probed.iter().map(point).collect();
        let curve = Curve::through(&points);
        let types = group.types.iter().zip(&losses).map(|(ty, loss)| TypeLoss {
            ty: *ty,
            loss: *loss,
            kl_divergence: curve.at(*loss),
        });
        measured.insert(
            &group.name,
            Sensitivity {
                gain: curve.gain,
                types: types.collect(),
            },
        );
        for name in &group.tensors {
            self.job
                .progress
                .advance(required(self.job.weights, name)?.bytes());
        }
        Ok(())
    }
}

/// What was found without running the network.
struct Looked {
    local: LocalLosses,
    /// Per type of the probes, the tensors of the group.
    probes: Vec<Vec<MemoryTensor>>,
}

/// Divergence by local loss: proportional up to the smaller of the measured losses, a power between them and beyond.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Curve {
    gain: f64,
    knee: f64,
    exponent: f64,
}

impl Curve {
    /// `points`: loss and divergence, one or two, the larger loss first.
    fn through(points: &[(f64, f64)]) -> Self {
        let Some(&(knee, divergence)) = points.last() else {
            return Self {
                gain: 0.0,
                knee: 0.0,
                exponent: 1.0,
            };
        };
        let gain = if knee > 0.0 {
            divergence.max(0.0) / knee
        } else {
            0.0
        };
        let exponent = match points {
            [(loss, high), (_, low)] if *loss > knee && knee > 0.0 && *high > 0.0 && *low > 0.0 => {
                ((high / low).ln() / (loss / knee).ln()).clamp(GROWTH.0, GROWTH.1)
            }
            _ => 1.0,
        };
        Self {
            gain,
            knee,
            exponent,
        }
    }

    fn at(&self, loss: f64) -> f64 {
        match loss > self.knee {
            true => self.gain * self.knee * (loss / self.knee).powf(self.exponent),
            false => self.gain * loss,
        }
    }
}

/// A head in memory.
struct Head {
    backend: Cpu,
    weight: <Cpu as Backend>::Weight,
    hidden: usize,
}

impl Head {
    fn new(weights: &StoredModel, tensor: MemoryTensor) -> Result<Self> {
        let (name, hidden) = (tensor.name.clone(), tensor.columns);
        let model = StoredModel::in_memory(
            Path::new("a rounded head"),
            weights.config().clone(),
            vec![tensor],
        )?;
        let model = Arc::new(model);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        let weight = backend.weight(required(&model, &name)?)?;
        Ok(Self {
            backend,
            weight,
            hidden,
        })
    }

    fn logits(&self, normed: &Vec<f32>, rows: &[u32]) -> Result<Vec<f32>> {
        let chosen = self.backend.gather(normed, self.hidden, rows);
        self.backend
            .matmul(&self.weight, 0, &chosen, rows.len(), Activation::None)
    }
}

fn memory_tensor(tensor: &StoredTensor, ty: GgmlType, bytes: Vec<u8>) -> MemoryTensor {
    MemoryTensor {
        name: tensor.name.clone(),
        ty,
        matrices: tensor.matrices,
        rows: tensor.rows,
        columns: tensor.columns,
        bytes: bytes.into(),
    }
}

/// Evenly spaced sequences for second moments and for probes; the same ones only where there are too few.
fn choose_sequences(sequences: &[Vec<u32>]) -> (Vec<&[u32]>, Vec<&[u32]>) {
    let length = sequences
        .first()
        .map_or(1, |sequence| sequence.len().max(1));
    let wanted = (MOMENT_TOKENS + PROBE_TOKENS)
        .div_ceil(length)
        .min(sequences.len());
    let chosen = (0..wanted).map(|index| sequences[index * sequences.len() / wanted].as_slice());
    let probes = 1 + MOMENT_TOKENS / PROBE_TOKENS;
    let (mut for_moments, mut for_probes) = (Vec::new(), Vec::new());
    for (index, sequence) in chosen.enumerate() {
        match index % probes == probes - 1 {
            true => for_probes.push(sequence),
            false => for_moments.push(sequence),
        }
    }
    if for_probes.is_empty() {
        for_probes.clone_from(&for_moments);
    }
    (for_moments, for_probes)
}

fn batches(sequences: &[&[u32]]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for sequence in sequences {
        let fits = |batch: &&mut Batch| batch.tokens.len() + sequence.len() <= BATCH_TOKENS;
        match batches.last_mut().filter(fits) {
            Some(batch) => {
                batch.tokens.extend_from_slice(sequence);
                batch.lengths.push(sequence.len());
            }
            None => batches.push(Batch {
                tokens: sequence.to_vec(),
                lengths: vec![sequence.len()],
                residual: Vec::new(),
            }),
        }
    }
    batches
}

fn sum_of_squares(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|value| f64::from(*value) * f64::from(*value))
        .sum()
}

/// KL(original || rounded) of one position, nats.
fn kl_divergence(original: &[f32], rounded: &[f32]) -> f64 {
    let (p, q) = (LogSoftmax::of(original), LogSoftmax::of(rounded));
    let terms = original.iter().zip(rounded).map(|(original, rounded)| {
        let log_p = p.log_probability(*original);
        f64::from(crate::backend::cpu::exp(log_p as f32)) * (log_p - q.log_probability(*rounded))
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_goes_through_what_was_measured() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        let curve = Curve::through(&[(0.1, 0.04), (0.01, 0.002)]);
        near(curve.at(0.1), 0.04);
        near(curve.at(0.01), 0.002);
        near(curve.at(0.001), 0.0002);
        let line = Curve::through(&[(0.1, 0.04)]);
        near(line.at(0.05), 0.02);
        near(line.at(0.2), 0.08);
        near(Curve::through(&[(0.0, 0.0)]).at(0.0), 0.0);
    }

    #[test]
    fn probes_read_what_moments_have_not() {
        let sequences: Vec<Vec<u32>> = (0..200).map(|n| vec![n; 512]).collect();
        let (moments, probes) = choose_sequences(&sequences);
        assert_eq!((moments.len(), probes.len()), (32, 16));
        assert!(probes.iter().all(|sequence| !moments.contains(sequence)));
        let (moments, probes) = choose_sequences(&sequences[..1]);
        assert_eq!((moments.len(), probes.len()), (1, 1));
        let batches = batches(&moments);
        assert_eq!((batches.len(), &batches[0].lengths[..]), (1, &[512][..]));
    }

    #[test]
    fn equal_logits_do_not_diverge() {
        let logits = [1.0, 2.5, -0.5];
        assert!(kl_divergence(&logits, &logits).abs() < 1e-9);
        assert!(kl_divergence(&logits, &[2.5, 1.0, -0.5]) > 0.1);
    }
}
