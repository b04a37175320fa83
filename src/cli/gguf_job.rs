//! `to-gguf` and `plan`: from flags to an artifact, one stage after the other.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use nemoconv::artifact::locate;
use nemoconv::backend::Machines;
use nemoconv::convert::calibrated::needs::Needs;
use nemoconv::convert::{self, Conduct};
use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::formats::gguf::NewTensor;
use nemoconv::formats::{GgmlType, Imatrix};
use nemoconv::model::config::NemotronHConfig;
use nemoconv::model::description::{DescriptionSources, ModelDescription, ParameterCounts};
use nemoconv::model::tokenizer::{TokenType, Tokenizer};
use nemoconv::plan::packing::keeps_codes;
use nemoconv::plan::sources::{Fate, Piece};
use nemoconv::plan::{Coverage, Plan, PlannedTensor};
use nemoconv::write::gguf::artifact::{Artifact, create_sibling};
use nemoconv::write::gguf::parts::Parts;
use nemoconv::write::gguf::{self, NamedImatrix};
use serde_json::Value;

use super::also_job::Also;
use super::args::ToGguf;
use super::calibration_job::{Calibration, CalibrationFlags, Source, ToRound};
use super::effort::Effort;
use super::inputs;
use super::memory;
use super::output::{Talk, human_bytes, print_stdout, shape, table};
use super::outputs;
use super::progress::Report;
use super::receipt;
use super::recipe_job::{self, Chosen};

/// Everything known before a weight is read.
pub struct Prepared {
    pub checkpoint: Checkpoint,
    pub plan: Plan,
    pub parts: Parts,
    peak_bytes: u64,
}

/// Writes the artifact, or shows the plan with `--dry-run`.
pub fn to_gguf(args: &ToGguf, machines: &Machines, talk: &Talk, stop: &AtomicBool) -> Result<()> {
    if args.dry_run {
        return plan(args, machines, talk, stop);
    }
    if args.calibration.calibration.is_none() {
        memory::return_at_once();
    }
    require_inputs(args)?;
    let entries = recipe_job::entries(args)?;
    if !args.print_recipe {
        recipe_job::require_text(&entries, &args.calibration)?;
    }
    let Some(mut chosen) = recipe_job::choose(args, entries, machines, talk, stop)? else {
        return Ok(());
    };
    let mut prepared = prepare(args, &chosen, &[])?;
    for part in &prepared.parts.parts {
        outputs::try_file("--outfile", Some(&part.path))?;
    }
    let mut also = Also::plan(args, &chosen.recipe, &prepared.checkpoint)?;
    if let (Some(_), Some(_)) = (&also, &chosen.calibration) {
        let what = "`--also-safetensors` does not go with types that are allocated";
        return Err(Error::Usage(Fault::new(what)));
    }
    let calibration = match (chosen.calibration.take(), &args.calibration.calibration) {
        (None, Some(text)) => Some(Calibration::begin(
            CalibrationFlags {
                floats: also.as_ref().map(Also::floats),
                ..args.calibration_flags(machines)
            },
            text,
            &chosen.recipe,
            &Source {
                checkpoint: &prepared.checkpoint,
                plan: &prepared.plan,
                type_of: &|name| prepared.plan.type_of(name),
            },
            talk,
            stop,
        )?),
        (begun, _) => begun,
    };
    if let Some(calibration) = &calibration {
        prepared = prepare(args, &chosen, &calibration.keys())?;
        let is_rewritten = calibration.is_rewritten() || chosen.recipe.rounding.bias_absorption;
        also = also
            .map(|also| also.rewritten(&prepared.checkpoint, is_rewritten))
            .transpose()?;
        let plan = &prepared.plan;
        let effort = calibration.effort(plan, args.threads)?;
        let before = calibration.peak_bytes();
        prepared.peak_bytes = prepared.peak_bytes.max(before).max(effort.peak_bytes());
        talk.say(effort);
    }
    let Prepared {
        checkpoint,
        plan,
        parts,
        peak_bytes,
    } = &prepared;
    announce(args, chosen.recipe.widen, &prepared, talk);
    talk.say(totals(&prepared));
    let finished = match &calibration {
        Some(calibration) => {
            let artifact = ToRound {
                plan,
                integers: &BTreeMap::new(),
                workspace: parts.parts[0].path.with_extension("work"),
            };
            let twin = also.as_ref().map(Also::to_round);
            Some(calibration.round(args.threads, &artifact, twin.as_ref(), talk, stop)?)
        }
        None => None,
    };
    let (finished, twin) = finished.map_or((None, None), |finished| {
        let (finished, twin) = finished.split();
        (Some(finished), twin)
    });
    let artifact = Artifact::create(parts)?;
    let conduct = Conduct {
        threads: args.thread_count(),
        allow_nonfinite: args.allow_nonfinite,
        allow_overflow: args.allow_f16_overflow,
    };
    let report = Report::new(*talk);
    let summary = convert::convert(
        checkpoint,
        plan,
        finished.as_ref(),
        &artifact,
        &parts.slots,
        conduct,
        &report,
        stop,
    )?;
    for odd in &summary.oddities {
        if odd.nonfinite + odd.overflows > 0 {
            talk.say(format_args!(
                "warning: `{}` has {} NaN or infinite weights and {} overflows, written as allowed",
                odd.tensor, odd.nonfinite, odd.overflows
            ));
        }
        if odd.rounded_rows > 0 {
            talk.say(format_args!(
                "`{}`: {} rows have scales that F16 does not hold and were rounded again",
                odd.tensor, odd.rounded_rows
            ));
        }
    }
    let planned = receipt::plan_json(
        checkpoint,
        plan,
        parts,
        *peak_bytes,
        chosen.allocation.as_ref(),
    );
    let mut receipt = receipt::with_summary(planned, &summary, finished.as_ref());
    if let Some(calibration) = &calibration {
        receipt["calibration"] = calibration.receipt();
        calibration.save_sidecar(&parts.parts[0].path)?;
    }
    // Before the folder: a run that is killed in between does both again, which it could not with a folder in its place.
    let mut written = artifact.publish()?;
    write_receipt(&written[0], &receipt)?;
    let folder = match (&also, &calibration, &twin) {
        (Some(also), Some(calibration), Some(twin)) => {
            let rounded = (calibration, twin);
            let recipe = &chosen.recipe;
            Some(also.write(checkpoint, recipe, rounded, conduct, (talk, stop))?)
        }
        _ => None,
    };
    written.extend(folder);
    for workspace in finished.into_iter().chain(twin) {
        workspace.remove()?;
    }
    if args.json {
        print_stdout(format_args!("{receipt:#}"));
    } else {
        written.iter().for_each(|path| print_stdout(path.display()));
    }
    Ok(())
}

fn require_inputs(args: &ToGguf) -> Result<()> {
    args.calibration.require_inputs()?;
    inputs::require(&[
        ("--imatrix", args.imatrix.as_deref()),
        ("--recipe", args.recipe.as_deref()),
        ("--tensor-type-file", args.tensor_type_file.as_deref()),
    ])
}

/// Shows what would be written.
pub fn plan(args: &ToGguf, machines: &Machines, talk: &Talk, stop: &AtomicBool) -> Result<()> {
    require_inputs(args)?;
    let entries = recipe_job::entries(args)?;
    let Some(chosen) = recipe_job::choose(args, entries, machines, talk, stop)? else {
        return Ok(());
    };
    let keys = chosen.calibration.as_ref().map(Calibration::keys);
    let mut prepared = prepare(args, &chosen, &keys.unwrap_or_default())?;
    if args.calibration.calibration.is_some() {
        let recipe = &chosen.recipe;
        let needs = Needs::at_most(&prepared.plan, recipe.rounding, recipe.samples);
        let limit = memory::limit(args.calibration.max_ram);
        let effort = Effort::of(&needs, limit, args.threads)?;
        prepared.peak_bytes = prepared.peak_bytes.max(effort.peak_bytes());
        talk.say(effort);
    }
    if args.json {
        let Prepared {
            checkpoint,
            plan,
            parts,
            peak_bytes,
        } = &prepared;
        let json = receipt::plan_json(
            checkpoint,
            plan,
            parts,
            *peak_bytes,
            chosen.allocation.as_ref(),
        );
        print_stdout(format_args!("{json:#}"));
        return Ok(());
    }
    print_stdout(plan_table(&prepared.plan));
    announce(args, chosen.recipe.widen, &prepared, talk);
    print_stdout(totals(&prepared));
    Ok(())
}

/// Plans the artifact of a choice, headers and all.
pub fn prepare(
    args: &ToGguf,
    chosen: &Chosen,
    keys: &[(&'static str, nemoconv::formats::gguf::Value)],
) -> Result<Prepared> {
    let checkpoint = Checkpoint::open(&locate(&args.model)?)?;
    let (json, config) = NemotronHConfig::open(&checkpoint)?;
    let vocab_size = config.vocab_size;
    let imatrix = args.imatrix.as_deref().map(Imatrix::open).transpose()?;
    let settings = chosen
        .recipe
        .settings(chosen.scheme, args.calibration.calibration.is_some());
    let plan = Plan::new(&checkpoint, config, &settings, imatrix.as_ref())?;

    let mut tokenizer = Tokenizer::read(
        checkpoint.folder(),
        &json,
        vocab_size,
        args.pre_tokenizer.as_deref(),
    )?;
    drop_padding(&mut tokenizer, vocab_size)?;
    let description = describe(args, &checkpoint, &json, &plan)?;
    let imatrix_path = args.imatrix.as_ref().map(|path| path.to_string_lossy());
    let named = imatrix
        .as_ref()
        .zip(imatrix_path.as_deref())
        .map(|(imatrix, path)| NamedImatrix { path, imatrix });
    let mut metadata = gguf::metadata(&plan, &description, &tokenizer, named);
    for (key, value) in keys {
        metadata.set(*key, value.clone());
    }
    for over in &args.override_kv {
        let value = match metadata.get(&over.key) {
            Some(old) => like(old, &over.value).ok_or_else(|| wrong_override(&over.key))?,
            None => over.value.clone(),
        };
        metadata.set(over.key.as_str(), value);
    }

    let tensors = plan.tensors.iter().map(|tensor| NewTensor {
        name: tensor.name.clone(),
        dims: tensor.dims.clone(),
        ty: tensor.ty,
    });
    let outfile = outfile(args, &description, &chosen.name);
    let calibration = &args.calibration;
    let read = [
        Some(checkpoint.folder()),
        args.imatrix.as_deref(),
        args.recipe.as_deref(),
        calibration.calibration.as_deref(),
        calibration.statistics.as_deref(),
    ];
    inputs::spare(&read, &[Some(&outfile)])?;
    let parts = Parts::new(&outfile, &metadata, tensors.collect(), args.split_limits())?;
    let fixed = parts
        .parts
        .iter()
        .map(|part| 2 * part.layout.header_bytes().len() as u64)
        .sum::<u64>();
    let peak_bytes = BASE_MEMORY_BYTES + fixed + convert::peak_bytes(&plan, args.thread_count());
    Ok(Prepared {
        checkpoint,
        plan,
        parts,
        peak_bytes,
    })
}

/// The converter pads the token list to a multiple of 8 but not the embedding, and such a file does not load.
fn drop_padding(tokenizer: &mut Tokenizer, vocab_size: usize) -> Result<()> {
    let padding = tokenizer
        .tokens
        .drain(vocab_size.min(tokenizer.tokens.len())..);
    match padding
        .into_iter()
        .find(|token| token.token_type != TokenType::Unused)
    {
        Some(token) => Err(Error::Model(Fault::new(format!(
            "token `{}` has no row in the embedding of {vocab_size} rows",
            token.text.escape_debug()
        )))),
        None => Ok(()),
    }
}

/// The program itself and the mapped pages that are in use at a time.
const BASE_MEMORY_BYTES: u64 = 32 << 20;

fn describe(
    args: &ToGguf,
    checkpoint: &Checkpoint,
    json: &Value,
    plan: &Plan,
) -> Result<ModelDescription> {
    let folder = checkpoint.folder();
    let counts = ParameterCounts::of(
        plan.tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.dims.as_slice())),
    );
    let sources = DescriptionSources {
        folder,
        model_id: &model_id(folder),
        config: json,
        overrides: None,
        model_name: args.model_name.as_deref(),
        counts,
    };
    Ok(ModelDescription::read(&sources)?)
}

/// The folder's name, or `org/name` inside a hub cache (`models--org--name/snapshots/<sha>`).
pub fn model_id(folder: &Path) -> String {
    let folder = folder
        .canonicalize()
        .unwrap_or_else(|_| folder.to_path_buf());
    let hub = folder
        .ancestors()
        .nth(2)
        .and_then(Path::file_name)
        .and_then(|name| name.to_str());
    let hub = hub
        .and_then(|name| name.strip_prefix("models--"))
        .map(|id| id.replacen("--", "/", 1));
    hub.unwrap_or_else(|| {
        folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    })
}

/// `new` in the type that the key already has.
fn like(
    old: &nemoconv::formats::gguf::Value,
    new: &nemoconv::formats::gguf::Value,
) -> Option<nemoconv::formats::gguf::Value> {
    use nemoconv::formats::gguf::Value as V;
    Some(match (old, new) {
        (V::U32(_), V::I64(n)) => V::U32(u32::try_from(*n).ok()?),
        (V::I32(_), V::I64(n)) => V::I32(i32::try_from(*n).ok()?),
        (V::U64(_), V::I64(n)) => V::U64(u64::try_from(*n).ok()?),
        (V::F32(_), V::F64(x)) => V::F32(*x as f32),
        (V::Bool(_), V::Bool(_)) | (V::String(_), V::String(_)) => new.clone(),
        _ => return None,
    })
}

fn wrong_override(key: &str) -> Error {
    Error::Usage(Fault::new(format!(
        "`--override-kv {key}` has another type than the key, or is out of range"
    )))
}

fn outfile(args: &ToGguf, description: &ModelDescription, name: &str) -> PathBuf {
    match &args.outfile {
        Some(path) => PathBuf::from(path.to_string_lossy().replace("{ftype}", name)),
        None => PathBuf::from(format!("{}.gguf", description.file_stem(name))),
    }
}

/// What is worth knowing before a long run.
fn announce(args: &ToGguf, is_widened: bool, prepared: &Prepared, talk: &Talk) {
    let plan = &prepared.plan;
    for (field, from, to) in plan.widening.changes() {
        talk.say(format_args!("widened exactly: {field} {from} -> {to}"));
    }
    if is_widened && !plan.widening.is_widened() {
        talk.say("nothing to widen: every width is a multiple of 256");
    }
    let substituted: Vec<_> = plan
        .tensors
        .iter()
        .filter(|tensor| tensor.instead_of.is_some())
        .collect();
    if let Some(first) = substituted.first() {
        let weights: u64 = substituted.iter().map(|tensor| tensor.weights()).sum();
        talk.say(format_args!(
            "warning: {} tensors ({:.1} % of the weights) take a substitute, such as `{}`: {} instead of {}",
            substituted.len(),
            100.0 * weights as f64 / plan.weights() as f64,
            first.name,
            first.ty,
            first.instead_of.map_or("", |ty| ty.name()),
        ));
    }
    if let Some(odd) = plan.coverage.and_then(odd_coverage) {
        talk.say(format_args!("warning: {odd}"));
    }
    if let Some(packed) = packed_source(plan, args.calibration.calibration.is_some()) {
        talk.say(packed);
    }
    for (entry, fate) in prepared.checkpoint.tensors().iter().zip(&plan.fates) {
        match fate {
            Fate::Dropped { reason } => {
                talk.say(format_args!("dropped `{}`: {reason}", entry.name))
            }
            Fate::Written { into } => talk.detail(format_args!("`{}` -> `{into}`", entry.name)),
            Fate::Merged { into } => {
                talk.detail(format_args!("`{}` -> part of `{into}`", entry.name))
            }
        }
    }
}

/// What speaks against an importance matrix; `None` of one that is this model's.
fn odd_coverage(coverage: Coverage) -> Option<String> {
    let Coverage {
        steered,
        steerable,
        foreign,
    } = coverage;
    if steerable == 0 {
        return Some(
            "the importance matrix steers nothing: no tensor's type asks for importance".into(),
        );
    }
    (steered < steerable || foreign > 0).then(|| {
        format!(
            "the importance matrix covers {steered} of the {steerable} tensors that it could steer, and {foreign} of its entries name no tensor of this model: was it collected on another?"
        )
    })
}

/// What becomes of the codes of a packed checkpoint; `None` for others.
fn packed_source(plan: &Plan, calibrated: bool) -> Option<String> {
    let is_packed = |piece: &Piece| matches!(piece, Piece::Packed(_));
    let packed = || {
        let tensors = plan.tensors.iter();
        tensors.filter(|tensor| tensor.pieces.iter().any(is_packed))
    };
    // Calibration rounds every matrix anew.
    let is_kept = |tensor: &&PlannedTensor| !calibrated && keeps_codes(tensor);
    let kept = packed().filter(is_kept).count();
    let is_float = |tensor: &&PlannedTensor| {
        matches!(tensor.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
    };
    let float = packed().filter(is_float).count();
    let total = packed().count();
    (total > 0).then(|| {
        format!(
            "packed source: of {total} tensors {kept} keep their codes bit for bit, {} are decoded exactly and quantized again, {float} are decoded to floats",
            total - kept - float
        )
    })
}

fn totals(prepared: &Prepared) -> String {
    let Prepared {
        plan,
        parts,
        peak_bytes,
        ..
    } = prepared;
    format!(
        "{}: {} tensors, {} bytes ({}) in {} file{}, {:.3} bits per weight, about {} of memory",
        plan.file_type,
        plan.tensors.len(),
        parts.file_bytes(),
        human_bytes(parts.file_bytes()),
        parts.parts.len(),
        if parts.parts.len() == 1 { "" } else { "s" },
        plan.bits_per_weight(),
        human_bytes(*peak_bytes),
    )
}

fn plan_table(plan: &Plan) -> String {
    let header = ["tensor", "shape", "type", "bytes", ""]
        .map(String::from)
        .to_vec();
    let rows = plan.tensors.iter().map(|tensor| {
        vec![
            tensor.name.clone(),
            shape(&tensor.dims),
            tensor.ty.to_string(),
            tensor.bytes().to_string(),
            tensor
                .instead_of
                .map_or(String::new(), |ty| format!("instead of {ty}")),
        ]
    });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    table(&rows, &[false, false, false, true, false])
}

/// Beside the artifact: `NAME.gguf` gets `NAME.receipt.json`.
fn write_receipt(artifact: &Path, receipt: &Value) -> Result<()> {
    let path = artifact.with_extension("receipt.json");
    let write_error = |source| Error::Write {
        fault: Fault::new("cannot write").in_file(&path),
        source,
    };
    let mut file = create_sibling(&path)?;
    writeln!(file, "{receipt:#}").map_err(write_error)?;
    file.persist(&path)
        .map_err(|error| write_error(error.error))?;
    Ok(())
}
