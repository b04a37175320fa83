//! The calibrated part of `to-gguf`: from a text to rounded tensors in a workspace beside the artifact.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use nemoconv::artifact::StoredModel;
use nemoconv::calibrate::samples::Samples;
use nemoconv::convert::calibrated::Calibrated;
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::error::Result;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::model::tokenizer::TextEncoder;
use nemoconv::plan::Plan;
use nemoconv::plan::recipe::Recipe;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::args::ToGguf;
use super::eval_model::open_encoder;
use super::output::Talk;
use super::progress::Report;
use super::workers::on_workers;

/// Calibrates on `text` and rounds every tensor; an interrupted run of the same settings goes on where it was.
pub fn calibrate(
    args: &ToGguf,
    text: &Path,
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    plan: &Plan,
    outfile: &Path,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<Workspace> {
    let weights = StoredModel::open(&args.model)?;
    let encoder = open_encoder(&weights, None, weights.config().vocab_size)?;
    let samples = read_samples(&encoder, text, recipe)?;
    talk.say(format_args!(
        "calibrating on {} tokens in {} sequences",
        samples.tokens(),
        samples.sequences.len()
    ));
    let rounding = recipe.rounding;
    let types: Vec<_> = plan.tensors.iter().map(|tensor| (&tensor.name, tensor.ty.name())).collect();
    let key = json!({
        "nemoconv": env!("CARGO_PKG_VERSION"),
        "checkpoint": checkpoint.shards().iter().map(|shard| digest(shard.bytes())).collect::<Vec<_>>(),
        "samples": samples.digest(),
        "rounding": rounding,
        "types": types,
    });
    let folder = outfile.with_extension("work");
    let mut workspace = Workspace::open(&folder, &digest(key.to_string().as_bytes()))?;
    if workspace.resumed > 0 {
        talk.say(format_args!("going on after {} tensors that an earlier run finished", workspace.resumed));
    }
    let job = Calibrated {
        weights: &weights,
        plan,
        samples: &samples,
        rounding,
        memory_bytes: 4 << 30,
        progress: &Report::new(*talk),
        stop,
    };
    on_workers(args.threads, || job.run(&mut workspace))?;
    Ok(workspace)
}

/// Reads a calibration text as the recipe says.
pub fn read_samples(encoder: &TextEncoder, text: &Path, recipe: &Recipe) -> Result<Samples> {
    let read = std::fs::read_to_string(text).map_err(|error| nemoconv::formats::Error::from(error).in_file(text))?;
    Samples::of_text(encoder, &read, recipe.samples)
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
