//! From a plan and what a calibration left to a published folder with its receipt.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use nemoconv::convert::Conduct;
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::convert::packed::{PackedJob, Rounded};
use nemoconv::error::Result;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::formats::packed::Inputs;
use nemoconv::plan::packed::PackedPlan;
use nemoconv::plan::packed::linears::Kind;
use nemoconv::plan::recipe::Recipe;
use nemoconv::rewrite::{Balance, SIDECAR_IN_FOLDER};
use nemoconv::write::packed::folder::PackedFolder;
use serde_json::Value;

use super::calibration_job::Calibration;
use super::output::Talk;
use super::packed_receipt;
use super::progress::Report;
use super::safetensors_args::RoundingArg;

/// A folder about to be written.
pub struct Folder<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a PackedPlan,
    pub outdir: &'a Path,
    pub recipe: &'a Recipe,
    /// Without a calibration.
    pub rounding: RoundingArg,
    pub calibration: Option<&'a Calibration>,
    pub workspace: Option<&'a Workspace>,
    pub conduct: Conduct,
}

impl Folder<'_> {
    /// Writes and publishes it; gives its path and its receipt.
    pub fn write(&self, talk: &Talk, stop: &AtomicBool) -> Result<(PathBuf, Value)> {
        let Self {
            checkpoint,
            plan,
            recipe,
            ..
        } = *self;
        let folder = PackedFolder::create(self.outdir, &plan.shards)?;
        let rounded = self.calibration.zip(self.workspace);
        let job = PackedJob {
            checkpoint,
            plan,
            rounded: rounded.map(|(calibration, workspace)| Rounded {
                weights: calibration.weights(),
                workspace,
                bias_absorption: recipe.rounding.bias_absorption,
                clip: recipe.packed.activation_clip,
            }),
            nearest: self.rounding.into(),
            folder: &folder,
            progress: &Report::new(*talk),
            stop,
        };
        let summary = job.run(self.conduct)?;
        for odd in &summary.oddities {
            talk.say(format_args!(
                "warning: `{}` has {} NaN or infinite weights and {} overflows, written as allowed",
                odd.tensor, odd.nonfinite, odd.overflows
            ));
        }
        folder.write_companions(checkpoint, plan)?;
        if !checkpoint.folder().join("tokenizer.json").is_file() {
            talk.say(format_args!(
                "warning: {} holds no tokenizer.json, and so does the folder: runtimes do not start without one",
                checkpoint.folder().display()
            ));
        }
        let mut receipt = packed_receipt::plan_json(checkpoint, plan);
        packed_receipt::add_summary(&mut receipt, &summary, self.workspace);
        receipt["method"] = match (self.calibration, self.rounding) {
            (Some(_), _) => recipe.rounding.method.to_string(),
            (None, RoundingArg::Nearest) => "rtn".into(),
            (None, RoundingArg::Llmcompressor) => "llmcompressor".into(),
        }
        .into();
        if let Some(calibration) = self.calibration {
            receipt["calibration"] = calibration.receipt();
            if let Some(rewrites) = calibration.sidecar_bytes()? {
                folder.write_file(SIDECAR_IN_FOLDER, &rewrites)?;
            }
        }
        folder.write_file("receipt.json", format!("{receipt:#}\n").as_bytes())?;
        Ok((folder.publish()?, receipt))
    }
}

/// Tensors that stay floats.
pub fn floats(plan: &PackedPlan) -> Vec<String> {
    let kept = plan
        .linears
        .iter()
        .zip(&plan.schemes)
        .filter(|(linear, scheme)| scheme.is_none() && linear.kind != Kind::Router);
    let mut names: Vec<String> = kept
        .map(|(linear, _)| plan.plan.tensors[linear.tensor].name.clone())
        .collect();
    names.dedup();
    names
}

/// How sizes of channels are shared between weights and activations: all to the weights where nothing else is rounded.
pub fn balance(plan: &PackedPlan) -> Balance {
    let mut schemes = plan.schemes.iter().flatten();
    match schemes.all(|scheme| scheme.scheme.inputs == Inputs::AsTheyAre) {
        true => Balance::WEIGHTS,
        false => Balance::default(),
    }
}
