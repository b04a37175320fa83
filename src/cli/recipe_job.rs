//! From flags and a recipe file to the recipe that is in force, its types chosen.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use nemoconv::artifact::locate;
use nemoconv::backend::Machines;
use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats::Dtype;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::plan::file_type::FileType;
use nemoconv::plan::recipe::{Aim, Recipe, RecipeEntries};
use nemoconv::plan::types::{Scheme, TensorTypeRule};
use serde_json::Value;

use super::allocation_job;
use super::args::{CalibrationArgs, ToGguf, tensor_type_rule};
use super::calibration_job::Calibration;
use super::output::{Talk, print_stdout};

/// A recipe whose types are known.
pub struct Chosen {
    pub recipe: Recipe,
    pub scheme: Scheme,
    /// As it stands in the artifact's name.
    pub name: String,
    /// How types were allocated, where they were.
    pub allocation: Option<Value>,
    /// The model with its samples read, where that was needed to choose types.
    pub calibration: Option<Calibration>,
}

impl Chosen {
    /// The types of `scheme`, but for what the recipe says by name.
    pub fn of_scheme(recipe: Recipe, scheme: Scheme) -> Self {
        Self {
            recipe,
            scheme,
            name: scheme.name().to_string(),
            allocation: None,
            calibration: None,
        }
    }
}

/// The recipe in force; `None` where it was only to be printed.
pub fn choose(
    args: &ToGguf,
    entries: RecipeEntries,
    machines: &Machines,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<Option<Chosen>> {
    let is_calibrated = is_calibrated(&entries, &args.calibration);
    let recipe = entries.resolve()?;
    let chosen = match recipe.aim {
        Aim::Scheme(scheme) => Chosen::of_scheme(recipe, scheme),
        Aim::OwnType => {
            let own = Scheme::Mix(auto_type(&Checkpoint::open(&locate(&args.model)?)?));
            Chosen::of_scheme(
                Recipe {
                    aim: Aim::Scheme(own),
                    ..recipe
                },
                own,
            )
        }
        Aim::BitsPerWeight(_) | Aim::FileBytes(_) => {
            allocation_job::allocate(args, machines, recipe, talk, stop)?
        }
    };
    if args.print_recipe {
        print_recipe(&chosen.recipe, is_calibrated);
        return Ok(None);
    }
    Ok(Some(chosen))
}

/// What flags and the recipe file say together.
pub fn entries(args: &ToGguf) -> Result<RecipeEntries> {
    Ok(args
        .entries(rules_of(args)?)
        .or(of_file(args.recipe.as_deref())?))
}

/// What a recipe file says; nothing if there is none.
pub fn of_file(path: Option<&Path>) -> Result<RecipeEntries> {
    Ok(path
        .map(RecipeEntries::open)
        .transpose()?
        .unwrap_or_default())
}

/// Refuses settings of a calibration where there is nothing to read: they would do nothing.
pub fn require_text(entries: &RecipeEntries, calibration: &CalibrationArgs) -> Result<()> {
    match entries.calibration_key() {
        Some(key) if calibration.calibration.is_none() => {
            let what =
                format!("`{key}` is a setting of the calibration, and there is no text to read");
            let hint = "give one with `--calibration FILE`, or leave the setting out: weights are then rounded without data";
            Err(Error::Usage(Fault::new(what).hint(hint)))
        }
        _ => Ok(()),
    }
}

/// Whether settings of a calibration count: there is a text, or the recipe speaks of one that will be.
pub fn is_calibrated(entries: &RecipeEntries, calibration: &CalibrationArgs) -> bool {
    calibration.calibration.is_some() || entries.calibration_key().is_some()
}

/// The recipe on stdout, without settings of a calibration where there is none.
pub fn print_recipe(recipe: &Recipe, is_calibrated: bool) {
    let yaml = match is_calibrated {
        true => recipe.to_yaml(),
        false => recipe.to_data_free_yaml(),
    };
    print_stdout(yaml.trim_end());
}

/// The converter's rule: BF16 or F16 by the first tensor with two dimensions, F32 checkpoints become F16. Packed ones
/// count as BF16, in which their models were trained.
fn auto_type(checkpoint: &Checkpoint) -> FileType {
    let first = checkpoint
        .tensors()
        .iter()
        .find(|entry| entry.shape.len() >= 2);
    match first.map(|entry| entry.dtype) {
        Some(Dtype::F16 | Dtype::F32) | None => FileType::F16,
        Some(_) => FileType::BF16,
    }
}

/// The rules of `--tensor-type-file`: one per line, blank lines and `#` comments aside.
fn rules_of(args: &ToGguf) -> Result<Vec<TensorTypeRule>> {
    let Some(path) = &args.tensor_type_file else {
        return Ok(Vec::new());
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| nemoconv::formats::Error::from(error).in_file(path))?;
    let lines = text
        .lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.trim()));
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(number, line)| {
            tensor_type_rule(line).map_err(|what| {
                Error::Plan(Fault::new(format!("line {number}: {what}")).in_file(path))
            })
        })
        .collect()
}
