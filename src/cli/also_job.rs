//! `to-gguf --also-safetensors`: a packed folder from the same walk over the samples.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use nemoconv::convert::Conduct;
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::model::config::NemotronHConfig;
use nemoconv::plan::packed::{PackedPlan, PackedSettings};
use nemoconv::plan::recipe::{Aim, Recipe};
use nemoconv::plan::types::Scheme;
use nemoconv::quantize::integer::IntegerGrid;
use nemoconv::write::packed::folder::check_target;

use super::args::ToGguf;
use super::calibration_job::{Calibration, ToRound};
use super::output::Talk;
use super::outputs;
use super::packed_folder::{Folder, floats};
use super::safetensors_args::RoundingArg;

/// A folder that is planned.
pub struct Also {
    plan: PackedPlan,
    grids: BTreeMap<String, IntegerGrid>,
    settings: PackedSettings,
    outdir: PathBuf,
}

impl Also {
    /// Plans it, if it is asked for.
    pub fn plan(args: &ToGguf, recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some(outdir) = &args.also_safetensors else {
            return Ok(None);
        };
        if recipe.widen {
            let what = "a packed folder keeps the checkpoint's widths, and this model is widened";
            return Err(Error::Plan(
                Fault::new(what).hint("write it with `to-safetensors`"),
            ));
        }
        check_target(outdir)?;
        outputs::try_sibling("--also-safetensors", outdir)?;
        // A named mix says nothing of a folder, a phase does.
        let aim = match recipe.aim {
            Aim::Scheme(Scheme::Phase(_)) => recipe.aim,
            _ => Aim::OwnType,
        };
        let settings = recipe.packed.settings(aim)?;
        Self::of(checkpoint, settings, outdir).map(Some)
    }

    fn of(checkpoint: &Checkpoint, settings: PackedSettings, outdir: &Path) -> Result<Self> {
        let (_, config) = NemotronHConfig::open(checkpoint)?;
        let plan = PackedPlan::new(checkpoint, config, &settings)?;
        Ok(Self {
            grids: plan.grids(),
            plan,
            settings,
            outdir: outdir.to_owned(),
        })
    }

    /// The same of a rewritten model.
    pub fn rewritten(self, checkpoint: &Checkpoint, is_rewritten: bool) -> Result<Self> {
        let settings = PackedSettings {
            is_rewritten,
            ..self.settings
        };
        Self::of(checkpoint, settings, &self.outdir)
    }

    /// Tensors that stay floats.
    pub fn floats(&self) -> Vec<String> {
        floats(&self.plan)
    }

    /// What there is to round.
    pub fn to_round(&self) -> ToRound<'_> {
        ToRound {
            plan: &self.plan.plan,
            integers: &self.grids,
            // `NAME.work` is that of `NAME.gguf`.
            workspace: self.outdir.with_extension("packed.work"),
        }
    }

    /// Writes the folder; gives its path.
    pub fn write(
        &self,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        (calibration, workspace): (&Calibration, &Workspace),
        conduct: Conduct,
        (talk, stop): (&Talk, &AtomicBool),
    ) -> Result<PathBuf> {
        for remark in &self.plan.remarks {
            talk.say(format_args!("note: {remark}"));
        }
        let folder = Folder {
            checkpoint,
            plan: &self.plan,
            outdir: &self.outdir,
            recipe,
            rounding: RoundingArg::Nearest,
            calibration: Some(calibration),
            workspace: Some(workspace),
            conduct,
        };
        Ok(folder.write(talk, stop)?.0)
    }
}
