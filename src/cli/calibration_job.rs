//! The calibrated part of `to-gguf`: from a text to rewrites, and to rounded tensors in a workspace beside the artifact.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nemoconv::artifact::StoredModel;
use nemoconv::calibrate::samples::Samples;
use nemoconv::calibrate::statistics::Statistics;
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::convert::calibrated::{Calibrated, Rounding};
use nemoconv::error::{Error, Result};
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::formats::gguf::Value;
use nemoconv::plan::Plan;
use nemoconv::rewrite::{Rewrites, RewrittenModel, SHA256_KEY, SUMMARY_KEY, sidecar_of};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::args::ToGguf;
use super::eval_model::open_encoder;
use super::output::Talk;
use super::progress::Report;
use super::workers::on_workers;

/// Where the rewrites lie until the artifact is published.
const REWRITES: &str = "rewrites.safetensors";

/// A model that has read its samples.
pub struct Calibration {
    weights: RewrittenModel,
    samples: Samples,
    rounding: Rounding,
    /// SHA-256 of every shard of the checkpoint.
    shards: Vec<String>,
    /// SHA-256 of the sidecar, if the model was rewritten.
    sidecar: Option<String>,
}

impl Calibration {
    /// Reads the samples and chooses rewrites.
    pub fn begin(
        args: &ToGguf,
        text: &Path,
        checkpoint: &Checkpoint,
        talk: &Talk,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let stored = match args.widen {
            true => StoredModel::open_widened(&args.model)?,
            false => StoredModel::open(&args.model)?,
        };
        let stored = Arc::new(stored);
        let encoder = open_encoder(&stored, None, stored.config().vocab_size)?;
        let read = std::fs::read_to_string(text)
            .map_err(|error| nemoconv::formats::Error::from(error).in_file(text))?;
        let samples = Samples::of_text(&encoder, &read, args.calibration.samples())?;
        talk.say(format_args!(
            "calibrating on {} tokens in {} sequences",
            samples.tokens(),
            samples.sequences.len()
        ));
        let settings = args
            .calibration
            .rewrites(!args.no_mtp && stored.config().nextn_predict_layers > 0);
        let rewrites = match settings {
            None => Rewrites::none(),
            Some(settings) => on_workers(args.threads, || {
                let watch = || match stop.load(Ordering::Relaxed) {
                    true => Err(Error::Interrupted),
                    false => Ok(()),
                };
                let statistics = Statistics::collect(&stored, &samples, false, &watch)?;
                Rewrites::choose(&stored, &settings, &statistics.for_rewrites())
            })?,
        };
        let shards = checkpoint
            .shards()
            .iter()
            .map(|shard| digest(shard.bytes()))
            .collect();
        let sidecar = match rewrites.is_none() {
            true => None,
            false => {
                talk.say(format_args!("rewritten exactly: {}", rewrites.summary()));
                let folder = tempfile::tempdir().map_err(nemoconv::formats::Error::from)?;
                Some(rewrites.save(&folder.path().join(REWRITES))?)
            }
        };
        Ok(Self {
            weights: RewrittenModel::new(stored, Arc::new(rewrites)),
            samples,
            rounding: args.calibration.rounding(),
            shards,
            sidecar,
        })
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

    /// Rounds every tensor; an interrupted run of the same settings goes on where it was.
    pub fn round(
        &self,
        args: &ToGguf,
        plan: &Plan,
        outfile: &Path,
        talk: &Talk,
        stop: &AtomicBool,
    ) -> Result<Workspace> {
        let types: Vec<_> = plan
            .tensors
            .iter()
            .map(|tensor| (&tensor.name, tensor.ty.name()))
            .collect();
        let key = json!({
            "nemoconv": env!("CARGO_PKG_VERSION"),
            "checkpoint": self.shards,
            "samples": self.samples.digest(),
            "rounding": self.rounding,
            "rewrites": self.sidecar,
            "widened": plan.widening.is_widened(),
            "types": types,
        });
        let folder = outfile.with_extension("work");
        let mut workspace = Workspace::open(&folder, &digest(key.to_string().as_bytes()))?;
        if workspace.resumed > 0 {
            talk.say(format_args!(
                "going on after {} tensors that an earlier run finished",
                workspace.resumed
            ));
        }
        let job = Calibrated {
            weights: &self.weights,
            plan,
            samples: &self.samples,
            rounding: self.rounding,
            memory_bytes: 4 << 30,
            progress: &Report::new(*talk),
            stop,
        };
        on_workers(args.threads, || job.run(&mut workspace))?;
        Ok(workspace)
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
        })
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
