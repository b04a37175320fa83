//! The calibrated part of `to-gguf`: from a text to rewrites, and to rounded tensors in a workspace beside the artifact.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nemoconv::artifact::StoredModel;
use nemoconv::backend::Machines;
use nemoconv::calibrate::gradients::{GradientSettings, OutputMoments};
use nemoconv::calibrate::samples::Samples;
use nemoconv::calibrate::statistics::Statistics;
use nemoconv::convert::calibrated::needs::Needs;
use nemoconv::convert::calibrated::rotation::{RotationChoice, RotationLoss, RotationTrial};
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::convert::calibrated::{Calibrated, Method, Rounding};
use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats::GgmlType;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::formats::gguf::Value;
use nemoconv::plan::Plan;
use nemoconv::plan::recipe::Recipe;
use nemoconv::quantize::integer::IntegerGrid;
use nemoconv::rewrite::{
    Balance, RewriteSettings, Rewrites, RewrittenModel, Rotation, SHA256_KEY, SUMMARY_KEY,
    sidecar_of,
};
use nemoconv::write::whole_file::sha256_of;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::args::{CalibrationArgs, ToGguf};
use super::calibrate_job::read_samples;
use super::effort::Effort;
use super::memory;
use super::output::Talk;
use super::progress::Report;
use super::workers::on_workers;

/// Where the rewrites lie until the artifact is published.
const REWRITES: &str = "rewrites.safetensors";

/// A model that has read its samples.
pub struct Calibration {
    machines: Machines,
    weights: RewrittenModel,
    samples: Samples,
    rounding: Rounding,
    /// SHA-256 of every shard of the checkpoint.
    shards: Vec<String>,
    /// SHA-256 of the sidecar, if the model was rewritten.
    sidecar: Option<String>,
    /// SHA-256 of the statistics, if they were given.
    statistics: Option<String>,
    /// Memory to stay within.
    memory_bytes: u64,
    /// What collecting statistics took.
    peak_bytes: u64,
    /// What rounding would lose under each rotation, where one was chosen.
    rotation_losses: Vec<RotationLoss>,
}

/// What a calibration begins with.
pub struct Source<'a> {
    pub checkpoint: &'a Checkpoint,
    /// What is rounded in the end: its sizes count, not its types.
    pub plan: &'a Plan,
    /// What a tensor will be stored as, as far as that is known.
    pub type_of: &'a (dyn Fn(&str) -> GgmlType + Sync),
}

/// What the user said of a calibration.
pub struct CalibrationFlags<'a> {
    pub machines: &'a Machines,
    pub model: &'a str,
    pub threads: Option<u16>,
    pub calibration: &'a CalibrationArgs,
    /// Tensors that stay floats of the checkpoint's type, where rewrites must not round them.
    pub floats: Option<Vec<String>>,
    /// How sizes of channels are shared, where the recipe does not say.
    pub balance: Balance,
}

/// An artifact whose tensors are to be rounded.
pub struct ToRound<'a> {
    pub plan: &'a Plan,
    /// By tensor: grids of those that become integer rows.
    pub integers: &'a BTreeMap<String, IntegerGrid>,
    /// Where finished tensors lie meanwhile: beside the artifact.
    pub workspace: PathBuf,
}

impl ToRound<'_> {
    fn types(&self) -> impl Iterator<Item = (&String, String)> {
        let tensors = self.plan.tensors.iter();
        tensors.map(|tensor| match self.integers.get(&tensor.name) {
            Some(grid) => (&tensor.name, grid.to_string()),
            None => (&tensor.name, tensor.ty.name().to_string()),
        })
    }

    fn workspace(&self, key: &str) -> Result<Workspace> {
        Workspace::open(&self.workspace, key)
    }
}

impl ToGguf {
    /// What is said of the calibration.
    pub fn calibration_flags<'a>(&'a self, machines: &'a Machines) -> CalibrationFlags<'a> {
        CalibrationFlags {
            machines,
            model: &self.model,
            threads: self.threads,
            calibration: &self.calibration,
            floats: None,
            balance: Balance::default(),
        }
    }
}

/// Statistics of an earlier run.
struct GivenStatistics {
    statistics: Statistics,
    sha256: String,
}

impl GivenStatistics {
    /// Opens them and checks that they are of this model and of these samples.
    fn open(
        path: &Path,
        stored: &StoredModel,
        shards: &[String],
        samples: &Samples,
    ) -> Result<Self> {
        let sha256 = sha256_of(path)?;
        let (statistics, origin) = Statistics::open(path)?;
        origin.check(shards, samples)?;
        statistics.check_model(stored)?;
        Ok(Self { statistics, sha256 })
    }
}

/// What a run goes through, each stage with its own needs.
struct Stages<'a> {
    stored: &'a Arc<StoredModel>,
    samples: &'a Samples,
    reads_statistics: bool,
}

impl Stages<'_> {
    /// Refuses a limit within which one of the stages cannot stay, naming what all of them need.
    fn check_memory(&self, plan: &Plan, rounding: Rounding, limit: u64) -> Result<()> {
        let needed = self.least_bytes(plan, rounding);
        if needed <= limit {
            return Ok(());
        }
        let what = format!("{limit} bytes of memory are too few: the whole run needs {needed}");
        Err(Error::Plan(Fault::new(what).hint(format!(
            "allow them with `--max-ram {needed}`, or read shorter sequences with `--calibration-context`"
        ))))
    }

    fn least_bytes(&self, plan: &Plan, rounding: Rounding) -> u64 {
        let (stored, samples) = (self.stored, self.samples);
        let mut least = Needs::of_samples(plan, rounding, samples).least_bytes();
        if self.reads_statistics {
            least = least.max(Statistics::least_bytes(stored, samples));
        }
        if runs_backwards(&rounding) {
            let plain = RewrittenModel::new(Arc::clone(stored), Arc::default());
            let sequences = rounding.gradient_sequences;
            least = least.max(OutputMoments::least_bytes(&plain, samples, sequences));
        }
        least
    }
}

/// Whether rows repair each other by gradients at their outputs.
fn runs_backwards(rounding: &Rounding) -> bool {
    rounding.gradient_sequences > 0 && rounding.method == Method::Gptq
}

impl Calibration {
    /// Reads the samples and chooses rewrites.
    pub fn begin(
        flags: CalibrationFlags,
        text: &Path,
        recipe: &Recipe,
        source: &Source,
        talk: &Talk,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let Source {
            checkpoint,
            plan,
            type_of,
        } = *source;
        let stored = match recipe.widen {
            true => StoredModel::open_widened(flags.model)?,
            false => StoredModel::open(flags.model)?,
        };
        let stored = Arc::new(stored);
        let samples = read_samples(&stored, text, recipe.samples)?;
        talk.say(format_args!(
            "calibrating on {} tokens in {} sequences",
            samples.tokens(),
            samples.sequences.len()
        ));
        let shards: Vec<_> = checkpoint
            .shards()
            .iter()
            .map(|shard| digest(shard.bytes()))
            .collect();
        let given = match &flags.calibration.statistics {
            Some(path) => Some(GivenStatistics::open(path, &stored, &shards, &samples)?),
            None => None,
        };
        let (statistics, given) = given.map(|given| (given.statistics, given.sha256)).unzip();
        let memory_bytes = memory::limit(flags.calibration.max_ram);
        let mut peak_bytes = 0;
        let settings = recipe.rewrites(flags.balance, stored.config().nextn_predict_layers > 0);
        let settings = settings.map(|settings| RewriteSettings {
            floats: flags.floats,
            ..settings
        });
        let mixer = flags.machines.mixer();
        let stages = Stages {
            stored: &stored,
            samples: &samples,
            reads_statistics: settings.is_some() && statistics.is_none(),
        };
        stages.check_memory(plan, recipe.rounding, memory_bytes)?;
        let RotationChoice { rewrites, losses } = match settings {
            None => RotationChoice::default(),
            Some(settings) => on_workers(flags.threads, || {
                let watch = || match stop.load(Ordering::Relaxed) {
                    true => Err(Error::Interrupted),
                    false => Ok(()),
                };
                let statistics = match statistics {
                    Some(statistics) => statistics,
                    None => {
                        let needs = Statistics::arrange(&stored, &samples, memory_bytes)?;
                        peak_bytes = needs.peak_bytes;
                        let in_file = needs.streams_in_file;
                        Statistics::collect(flags.machines, &stored, &samples, in_file, &watch)?
                    }
                };
                let statistics = statistics.into_rewrites()?;
                let is_decided = recipe
                    .rewrite
                    .is_none_or(|rewrite| rewrite.rotation.decided().is_some());
                if is_decided {
                    let rewrites =
                        Rewrites::choose_on(mixer.as_deref(), &stored, &settings, &statistics)?;
                    return Ok(RotationChoice::without_trial(rewrites));
                }
                let trial = RotationTrial {
                    model: &stored,
                    settings: &settings,
                    statistics: &statistics,
                    rounding: recipe.rounding,
                    type_of,
                    mixer: mixer.as_deref(),
                    watch: &watch,
                };
                trial.choose()
            })?,
        };
        if !losses.is_empty() {
            talk.say(rotation_line(rewrites.settings().rotation, &losses));
        }
        let sidecar = match rewrites.is_none() {
            true => None,
            false => {
                talk.say(format_args!("rewritten exactly: {}", rewrites.summary()));
                let folder = tempfile::tempdir().map_err(nemoconv::formats::Error::from)?;
                Some(rewrites.save(&folder.path().join(REWRITES))?)
            }
        };
        Ok(Self {
            machines: flags.machines.clone(),
            weights: RewrittenModel::new(stored, Arc::new(rewrites)).mixed_by(mixer),
            samples,
            rounding: recipe.rounding,
            shards,
            sidecar,
            statistics: given,
            memory_bytes,
            peak_bytes,
            rotation_losses: losses,
        })
    }

    /// What the model reads.
    pub fn samples(&self) -> &Samples {
        &self.samples
    }

    /// The weights that are rounded.
    pub fn weights(&self) -> &RewrittenModel {
        &self.weights
    }

    /// Whether they are others than the checkpoint's.
    pub fn is_rewritten(&self) -> bool {
        self.sidecar.is_some()
    }

    /// The sidecar's bytes, if the model was rewritten.
    pub fn sidecar_bytes(&self) -> Result<Option<Vec<u8>>> {
        if self.sidecar.is_none() {
            return Ok(None);
        }
        let failed = nemoconv::formats::Error::from;
        let folder = tempfile::tempdir().map_err(failed)?;
        let path = folder.path().join(REWRITES);
        self.weights.rewrites().save(&path)?;
        Ok(Some(std::fs::read(path).map_err(failed)?))
    }

    /// The rotation of the residual stream.
    pub fn rotation(&self) -> Rotation {
        self.weights.rewrites().settings().rotation
    }

    /// What the artifact says of it.
    pub fn keys(&self) -> Vec<(&'static str, Value)> {
        let mut keys = vec![
            ("nemoconv.version", Value::from(env!("CARGO_PKG_VERSION"))),
            (
                "nemoconv.calibration.sha256",
                Value::from(self.samples.digest().as_str()),
            ),
            (
                "nemoconv.calibration.tokens",
                Value::U64(self.samples.tokens() as u64),
            ),
            (
                "nemoconv.rounding",
                Value::from(json!(self.rounding).to_string().as_str()),
            ),
        ];
        if let Some(sha256) = &self.sidecar {
            keys.push((SHA256_KEY, Value::from(sha256.as_str())));
            keys.push((
                SUMMARY_KEY,
                Value::from(self.weights.rewrites().summary().as_str()),
            ));
        }
        keys
    }

    /// Most memory at a time before the rounding.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// What the rounding takes.
    pub fn effort(&self, plan: &Plan, threads: Option<u16>) -> Result<Effort> {
        let needs = Needs::of_samples(plan, self.rounding, &self.samples);
        Effort::of(&needs, self.memory_bytes, threads)
    }

    /// Rounds every tensor, of the twin too by what the artifact's network shows; an interrupted run of the same settings goes on where it was.
    pub fn round<'a>(
        &'a self,
        threads: Option<u16>,
        artifact: &'a ToRound,
        twin: Option<&'a ToRound>,
        talk: &Talk,
        stop: &AtomicBool,
    ) -> Result<Workspace> {
        let mut workspace = artifact.workspace(&self.key(&[artifact]))?;
        if let Some(twin) = twin {
            workspace = workspace.with_twin(twin.workspace(&self.key(&[artifact, twin]))?);
        }
        if workspace.resumed > 0 {
            talk.say(format_args!(
                "going on after {} tensors that an earlier run finished",
                workspace.resumed
            ));
        }
        let outputs = self.outputs(threads, stop)?;
        let report = Report::new(*talk);
        let job = |artifact: &'a ToRound| Calibrated {
            machines: &self.machines,
            weights: &self.weights,
            plan: artifact.plan,
            integers: artifact.integers,
            samples: &self.samples,
            outputs: outputs.as_ref(),
            rounding: self.rounding,
            memory_bytes: self.memory_bytes,
            progress: &report,
            stop,
            twin: None,
        };
        // Targets are corrected for the errors of the first artifact's network, which are not those of the twin's.
        let twin = twin.map(|twin| Calibrated {
            rounding: Rounding {
                target_correction: 0.0,
                ..self.rounding
            },
            ..job(twin)
        });
        let job = Calibrated {
            twin: twin.as_ref(),
            ..job(artifact)
        };
        let run = on_workers(threads, || job.run(&mut workspace));
        if matches!(run, Err(Error::Interrupted)) {
            talk.say(format_args!(
                "finished tensors are kept in {}: the same command goes on after them",
                artifact.workspace.display()
            ));
        }
        run.map(|()| workspace)
    }

    /// What decides the bytes of the last of these artifacts, which the others' types do too.
    fn key(&self, artifacts: &[&ToRound]) -> String {
        let widened = artifacts
            .iter()
            .any(|artifact| artifact.plan.widening.is_widened());
        let types: Vec<_> = artifacts
            .iter()
            .flat_map(|artifact| artifact.types())
            .collect();
        let key = json!({
            "nemoconv": env!("CARGO_PKG_VERSION"),
            "checkpoint": self.shards,
            "samples": self.samples.digest(),
            "rounding": self.rounding,
            "rewrites": self.sidecar,
            "widened": widened,
            "types": types,
            "device": self.machines.name(),
        });
        digest(key.to_string().as_bytes())
    }

    /// Runs samples through the network and back, if rows are to repair each other.
    fn outputs(&self, threads: Option<u16>, stop: &AtomicBool) -> Result<Option<OutputMoments>> {
        if !runs_backwards(&self.rounding) {
            return Ok(None);
        }
        let settings = GradientSettings {
            max_sequences: self.rounding.gradient_sequences,
            seed: 0,
            memory_bytes: self.memory_bytes,
        };
        let watch = || match stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        };
        let collected = on_workers(threads, || {
            OutputMoments::collect(&self.weights, &self.samples, &settings, &watch)
        });
        collected.map(Some)
    }

    /// Writes the sidecar, from which `validate` undoes the rewrites; gives its path.
    pub fn save_sidecar(&self, artifact: &Path) -> Result<Option<PathBuf>> {
        if self.sidecar.is_none() {
            return Ok(None);
        }
        let path = sidecar_of(artifact);
        self.weights.rewrites().save(&path)?;
        Ok(Some(path))
    }

    /// For the receipt.
    pub fn receipt(&self) -> serde_json::Value {
        json!({
            "checkpoint_sha256": self.shards,
            "samples_sha256": self.samples.digest(),
            "sequences": self.samples.sequences.len(),
            "tokens": self.samples.tokens(),
            "rounding": self.rounding,
            "rewrites": self.weights.rewrites().describe(),
            "rewrites_sha256": self.sidecar,
            "rotation_losses": self.rotation_losses,
            "statistics_sha256": self.statistics,
        })
    }
}

/// What was chosen, and from what.
fn rotation_line(chosen: Rotation, losses: &[RotationLoss]) -> String {
    let losses: Vec<_> = losses
        .iter()
        .map(|tried| format!("{} {:.4e}", tried.rotation, tried.loss))
        .collect();
    format!("rotation {chosen}: relative losses {}", losses.join(", "))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
