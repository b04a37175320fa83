//! `to-safetensors`: from flags to a packed folder, one stage after the other.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use nemoconv::artifact::locate;
use nemoconv::backend::Machines;
use nemoconv::convert::Conduct;
use nemoconv::error::Result;
use nemoconv::formats::GgmlType;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::model::config::NemotronHConfig;
use nemoconv::plan::packed::{PackedPlan, PackedSettings};
use nemoconv::plan::recipe::Recipe;
use nemoconv::write::packed::folder::check_target;

use super::calibration_job::{Calibration, CalibrationFlags, Source, ToRound};
use super::gguf_job::model_id;
use super::inputs;
use super::memory;
use super::output::{Talk, human_bytes, print_stdout, table};
use super::outputs;
use super::packed_folder::{Folder, balance, floats};
use super::packed_receipt;
use super::recipe_job;
use super::safetensors_args::ToSafetensors;

/// Writes the folder, or shows the plan with `--dry-run`.
pub fn to_safetensors(
    args: &ToSafetensors,
    machines: &Machines,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<()> {
    args.calibration.require_inputs()?;
    inputs::require(&[("--recipe", args.recipe.as_deref())])?;
    let entries = args
        .entries()
        .or(recipe_job::of_file(args.recipe.as_deref())?);
    if args.print_recipe {
        let is_calibrated = recipe_job::is_calibrated(&entries, &args.calibration);
        recipe_job::print_recipe(&entries.resolve()?, is_calibrated);
        return Ok(());
    }
    if !args.dry_run {
        recipe_job::require_text(&entries, &args.calibration)?;
    }
    let recipe = entries.resolve()?;
    if args.calibration.calibration.is_none() {
        memory::return_at_once();
    }
    let checkpoint = Checkpoint::open(&locate(&args.model)?)?;
    let mut settings = settings(args, &recipe)?;
    let mut plan = plan(&checkpoint, &settings)?;
    if args.dry_run {
        return show(args, &checkpoint, &plan);
    }
    let outdir = outdir(args, &checkpoint, &settings);
    check_target(&outdir)?;
    outputs::try_sibling("--outdir", &outdir)?;
    let calibration = match &args.calibration.calibration {
        None => None,
        Some(text) => {
            let flags = CalibrationFlags {
                machines,
                model: &args.model,
                threads: args.threads,
                calibration: &args.calibration,
                floats: Some(floats(&plan)),
                balance: balance(&plan),
            };
            let source = Source {
                checkpoint: &checkpoint,
                plan: &plan.plan,
                type_of: &|_| GgmlType::F32,
            };
            let begun = Calibration::begin(flags, text, &recipe, &source, talk, stop)?;
            settings.is_rewritten = begun.is_rewritten() || recipe.rounding.bias_absorption;
            plan = self::plan(&checkpoint, &settings)?;
            talk.say(begun.effort(&plan.plan, args.threads)?);
            Some(begun)
        }
    };
    announce(&plan, talk);
    let grids = plan.grids();
    let rounded = ToRound {
        plan: &plan.plan,
        integers: &grids,
        workspace: outdir.with_extension("work"),
    };
    let workspace = match &calibration {
        Some(calibration) => Some(calibration.round(args.threads, &rounded, None, talk, stop)?),
        None => None,
    };
    let written = Folder {
        checkpoint: &checkpoint,
        plan: &plan,
        outdir: &outdir,
        recipe: &recipe,
        rounding: args.rounding,
        calibration: calibration.as_ref(),
        workspace: workspace.as_ref(),
        conduct: Conduct {
            threads: args.thread_count(),
            allow_nonfinite: args.allow_nonfinite,
            allow_overflow: args.allow_f16_overflow,
        },
    };
    let (written, receipt) = written.write(talk, stop)?;
    if let Some(workspace) = workspace {
        workspace.remove()?;
    }
    match args.json {
        true => print_stdout(format_args!("{receipt:#}")),
        false => print_stdout(written.display()),
    }
    Ok(())
}

fn settings(args: &ToSafetensors, recipe: &Recipe) -> Result<PackedSettings> {
    let settings = recipe.packed.settings(recipe.aim)?;
    Ok(PackedSettings {
        shard_bytes: args.max_shard_size.unwrap_or(settings.shard_bytes),
        ..settings
    })
}

fn plan(checkpoint: &Checkpoint, settings: &PackedSettings) -> Result<PackedPlan> {
    let (_, config) = NemotronHConfig::open(checkpoint)?;
    PackedPlan::new(checkpoint, config, settings)
}

fn outdir(args: &ToSafetensors, checkpoint: &Checkpoint, settings: &PackedSettings) -> PathBuf {
    let default = || {
        let id = model_id(checkpoint.folder());
        let name = Path::new(&id)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        PathBuf::from(format!("{name}-{}", settings.aim.name()))
    };
    args.outdir.clone().unwrap_or_else(default)
}

fn show(args: &ToSafetensors, checkpoint: &Checkpoint, plan: &PackedPlan) -> Result<()> {
    if args.json {
        print_stdout(format_args!(
            "{:#}",
            packed_receipt::plan_json(checkpoint, plan)
        ));
        return Ok(());
    }
    let header = ["linear", "shape", "scheme"].map(String::from).to_vec();
    let rows = plan
        .linears
        .iter()
        .zip(&plan.schemes)
        .map(|(linear, scheme)| {
            vec![
                linear.module.clone(),
                format!("{} x {}", linear.rows, linear.columns),
                scheme
                    .as_ref()
                    .map_or("kept".into(), |scheme| scheme.scheme.to_string()),
            ]
        });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    print_stdout(table(&rows, &[false, false, false]));
    print_stdout(totals(plan));
    Ok(())
}

fn announce(plan: &PackedPlan, talk: &Talk) {
    for remark in &plan.remarks {
        talk.say(format_args!("note: {remark}"));
    }
    talk.say(totals(plan));
}

fn totals(plan: &PackedPlan) -> String {
    let quantized = plan.schemes.iter().flatten().count();
    format!(
        "{quantized} of {} linears quantized, {} bytes ({}) in {} shard{}, {:.3} bits per weight",
        plan.linears.len(),
        plan.file_bytes(),
        human_bytes(plan.file_bytes()),
        plan.shards.len(),
        if plan.shards.len() == 1 { "" } else { "s" },
        plan.bits_per_weight(),
    )
}
