//! The walk through the network: every group rounded alone, and what that does to the predictions.

use std::collections::BTreeMap;

use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;

use super::batches::{Batch, batches, choose_sequences};
use super::curve::Curve;
use super::local_losses::{LocalLosses, memory_tensor, sum_of_squares};
use super::predictions::{Head, KEPT_LOGITS, POSITIONS, Reference};
use super::{Group, Measurement, Sensitivity, TypeLoss, probe_types};
use crate::artifact::{MemoryTensor, StoredTensor};
use crate::backend::cpu::Residence;
use crate::backend::{Backend, Exponentials, LogitRows, Machine, MachineBuffer};
use crate::calibrate::capture::Capture;
use crate::calibrate::cells::Merge;
use crate::calibrate::layer::Layer;
use crate::calibrate::second_moments::SecondMoments;
use crate::convert::calibrated::stages;
use crate::error::Result;
use crate::forward::network::Network;
use crate::forward::numerics::Numerics;
use crate::forward::observer::Silent;
use crate::forward::required;
use crate::model::config::NemotronHConfig;
use crate::rewrite::Restore;

/// Second moments by the tensor whose input they are of, and matrix.
pub type SeenMoments = BTreeMap<(String, usize), SecondMoments>;

/// A measurement on its way through the network.
pub struct Probing<'a> {
    pub job: &'a Measurement<'a>,
    /// As it is stored: what comes behind the block that is looked at.
    network: Network<Machine>,
    /// For operations without weights.
    machine: Machine,
    /// From the rewritten stream to the stored one.
    restore: Restore<'a>,
    /// Residual streams are those of the rewritten network.
    moment_batches: Vec<Batch>,
    pub probe_batches: Vec<Batch>,
    /// Parallel to the probe's batches.
    references: Vec<Reference>,
}

impl<'a> Probing<'a> {
    /// Embeds what is read and takes what the original network predicts.
    pub fn begin(job: &'a Measurement<'a>) -> Result<Self> {
        let stored = job.weights.stored();
        let machines = job.machines.all(stored, Residence::Mapped);
        let network = Network::open_on(stored, machines, &Numerics::EXACT)?;
        let (for_moments, for_probes) = choose_sequences(&job.samples.sequences);
        let hidden = stored.config().hidden_size;
        let table = job.weights.matrix("token_embd.weight", 0)?;
        let embed = |mut batch: Batch| {
            let tokens = batch.tokens.iter();
            let rows = tokens.flat_map(|token| &table[*token as usize * hidden..][..hidden]);
            batch.residual = rows.copied().collect();
            batch
        };
        let moment_batches = batches(&for_moments).into_iter().map(embed).collect();
        let probe_batches: Vec<Batch> = batches(&for_probes).into_iter().map(embed).collect();
        let tokens = probe_batches
            .iter()
            .map(|batch| batch.tokens.len())
            .sum::<usize>();
        let positions = POSITIONS
            .min(KEPT_LOGITS / stored.config().vocab_size)
            .max(1);
        let stride = tokens.div_ceil(positions);
        let references = probe_batches.iter().map(|batch| {
            job.check_stop()?;
            let rows: Vec<u32> = (0..batch.tokens.len() as u32)
                .skip(stride - 1)
                .step_by(stride)
                .collect();
            let normed = network.run_from(0, network.embed(&batch.tokens)?, &batch.lengths)?;
            Ok(Reference {
                logits: network.logits_at_head(&normed, &rows, &mut Silent)?,
                rows,
            })
        });
        let references = references.collect::<Result<_>>()?;
        Ok(Self {
            job,
            network,
            machine: job.machines.without_weights(0, stored.config()),
            restore: job.weights.rewrites().restore(),
            moment_batches,
            probe_batches,
            references,
        })
    }

    /// The embedding, whose inputs are one-hot: its local loss is that of the rows which the text looks up.
    pub fn embedding(&self, measured: &mut BTreeMap<&'a str, Sensitivity>) -> Result<()> {
        let name = "token_embd.weight";
        let Some(group) = self.group_of(name) else {
            return Ok(());
        };
        let tensor = required(self.job.weights.stored(), name)?;
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
        let mut probed = Vec::new();
        for ty in probe_types(group) {
            let head = match self.is_tied() {
                true => Some(self.head_of(self.plainly(tensor, ty)?)?),
                false => None,
            };
            let run =
                |_, batch: &Batch| self.rest(0, rounded(ty, &batch.residual)?, &batch.lengths);
            probed.push((ty, self.divergence(run, head.as_ref())?));
        }
        self.conclude(group, &local, &probed, measured)
    }

    /// Whether the embedding is the head too.
    pub fn is_tied(&self) -> bool {
        self.job.weights.stored().tensor("output.weight").is_none()
    }

    /// A head in memory.
    pub fn head_of(&self, tensor: MemoryTensor) -> Result<Head> {
        Head::new(self.config(), tensor)
    }

    pub fn config(&self) -> &NemotronHConfig {
        self.job.weights.stored().config()
    }

    /// The normed stream of the stored network, from rewritten streams before block `first`.
    pub fn rest(
        &self,
        first: usize,
        mut residual: Vec<f32>,
        lengths: &[usize],
    ) -> Result<Vec<f32>> {
        self.restore.stream(&mut residual);
        let residual = self.network.backend_of(first).upload(residual)?;
        let normed = self.network.run_from(first, residual, lengths)?;
        self.network.head_backend().download_all(normed)
    }

    /// What the rewritten head reads, from rewritten streams behind the last block.
    pub fn normed(&self, residual: &[f32]) -> Result<Vec<f32>> {
        self.machine.download_all(self.normed_there(residual)?)
    }

    /// The same, where the machine has it.
    fn normed_there(&self, residual: &[f32]) -> Result<MachineBuffer> {
        let norm = self.job.weights.matrix("output_norm.weight", 0)?;
        let (stream, norm) = (
            self.machine.upload(residual.to_vec())?,
            self.machine.upload(norm)?,
        );
        let eps = self.config().norm_epsilon();
        self.machine.rms_norm(&stream, &norm, eps)
    }

    /// A tensor rounded to the nearest.
    pub fn plainly(&self, tensor: &StoredTensor, ty: GgmlType) -> Result<MemoryTensor> {
        let values = self.job.weights.matrix(&tensor.name, 0)?;
        let bytes = self.job.round(ty, tensor.columns, &values, None);
        Ok(memory_tensor(tensor, ty, bytes))
    }

    /// All groups of a block; then every stream is behind it.
    pub fn block(
        &mut self,
        block: usize,
        measured: &mut BTreeMap<&'a str, Sensitivity>,
    ) -> Result<()> {
        let prefix = format!("blk.{block}.");
        let originals = self.originals(block)?;
        let layer = Layer::open(self.job.machines, self.config(), block, originals.clone())?;
        let groups: Vec<&Group> = self
            .job
            .groups
            .iter()
            .filter(|group| group.tensors[0].starts_with(&prefix))
            .collect();
        let tensors = groups.iter().flat_map(|group| &group.tensors);
        let tensors: Vec<&str> = tensors.map(String::as_str).collect();
        let seen = self.advance_moments(&layer, &tensors)?;
        for group in groups {
            let looked = self.job.look_at(group, &seen)?;
            let mut probed = Vec::new();
            for (ty, tensors) in probe_types(group).into_iter().zip(looked.probes) {
                let layer = self.replaced(block, &originals, tensors)?;
                let run = |_, batch: &Batch| {
                    let mut residual = batch.residual.clone();
                    layer.run_values(&mut residual, &batch.lengths, &mut Capture::default())?;
                    self.rest(block + 1, residual, &batch.lengths)
                };
                probed.push((ty, self.divergence(run, None)?));
            }
            self.conclude(group, &looked.local, &probed, measured)?;
        }
        for batch in &mut self.probe_batches {
            layer.run_values(&mut batch.residual, &batch.lengths, &mut Capture::default())?;
        }
        Ok(())
    }

    /// The tensors of a block, rewritten.
    pub fn originals(&self, block: usize) -> Result<Vec<MemoryTensor>> {
        let prefix = format!("blk.{block}.");
        let tensors = self.job.weights.stored().tensors().iter();
        let tensors = tensors.filter(|tensor| tensor.name.starts_with(&prefix));
        tensors
            .map(|tensor| self.job.weights.in_memory(&tensor.name))
            .collect()
    }

    /// A block with some of its tensors replaced.
    pub fn replaced(
        &self,
        block: usize,
        originals: &[MemoryTensor],
        tensors: Vec<MemoryTensor>,
    ) -> Result<Layer> {
        let mut replaced = originals.to_vec();
        for tensor in tensors {
            let place = replaced
                .iter_mut()
                .find(|original| original.name == tensor.name);
            *place.expect("a group's tensors are of its block") = tensor;
        }
        Layer::open(self.job.machines, self.config(), block, replaced)
    }

    /// Runs the moments' streams through a block and sums up what some tensors read.
    pub fn advance_moments(&mut self, layer: &Layer, tensors: &[&str]) -> Result<SeenMoments> {
        let inputs: Vec<String> = tensors.iter().map(|name| stages::input_of(name)).collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let mut seen = SeenMoments::new();
        for batch in &mut self.moment_batches {
            self.job.check_stop()?;
            let mut capture = Capture::new(&inputs, None);
            layer.run_values(&mut batch.residual, &batch.lengths, &mut capture)?;
            for (key, captured) in capture.inputs {
                let mut moments = SecondMoments::empty(captured.in_features);
                captured.with_rows(&self.machine, |rows| {
                    moments.add_on(&self.machine, rows, captured.weights())
                })?;
                match seen.get_mut(&key) {
                    Some(sum) => sum.merge(moments),
                    None => drop(seen.insert(key, moments)),
                }
            }
        }
        Ok(seen)
    }

    /// The head, which reads the normed stream.
    pub fn head(&self, measured: &mut BTreeMap<&'a str, Sensitivity>) -> Result<()> {
        let name = "output.weight";
        let Some(group) = self.group_of(name) else {
            return Ok(());
        };
        let seen = self.head_moments()?;
        let looked = self.job.look_at(group, &seen)?;
        let mut probed = Vec::new();
        for (ty, tensors) in probe_types(group).into_iter().zip(looked.probes) {
            let tensor = tensors.into_iter().next().expect("a head is one tensor");
            let head = self.head_of(tensor)?;
            let run = |_, batch: &Batch| self.normed(&batch.residual);
            probed.push((ty, self.divergence(run, Some(&head))?));
        }
        self.conclude(group, &looked.local, &probed, measured)
    }

    /// Second moments of what the head reads; the moments' streams must be behind the last block.
    pub fn head_moments(&self) -> Result<SeenMoments> {
        let mut moments = SecondMoments::empty(self.config().hidden_size);
        for batch in &self.moment_batches {
            let normed = self.normed_there(&batch.residual)?;
            moments.add_on(&self.machine, &normed, None)?;
        }
        Ok([(("output.weight".to_string(), 0), moments)]
            .into_iter()
            .collect())
    }

    fn group_of(&self, tensor: &str) -> Option<&'a Group> {
        self.job
            .groups
            .iter()
            .find(|group| group.tensors.iter().any(|name| name == tensor))
    }

    /// Mean KL divergence from the original of what `run` makes of the probe's batches.
    pub fn divergence(
        &self,
        run: impl Fn(usize, &Batch) -> Result<Vec<f32>>,
        head: Option<&Head>,
    ) -> Result<f64> {
        let (mut sum, mut positions) = (0.0, 0);
        let batches = self.probe_batches.iter().zip(&self.references);
        for (index, (batch, reference)) in batches.enumerate() {
            self.job.check_stop()?;
            let normed = run(index, batch)?;
            let machine = self.network.head_backend();
            let logits = match head {
                Some(head) => machine.upload(head.logits(&normed, &reference.rows)?)?,
                None => {
                    let normed = machine.upload(normed)?;
                    self.network
                        .logits_at_head(&normed, &reference.rows, &mut Silent)?
                }
            };
            let stride = self.config().vocab_size;
            let [original, rounded] =
                [&reference.logits, &logits].map(|logits| LogitRows { logits, stride });
            let rows = machine.kl_divergence(original, rounded, stride, Exponentials::Own)?;
            let divergences: Vec<f64> = rows.iter().map(|row| row.kl_divergence).collect();
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
                .advance(required(self.job.weights.stored(), name)?.bytes());
        }
        Ok(())
    }
}
