//! The three levels that need no forward pass, one after the other.
//!
//! Enters: an artifact and, if given, a reference, each a path or hub id. Leaves: a [`ValidationReport`] without the
//! logits level. Computes no logit.

use nemoconv_formats::gguf::Value;

use super::{Found, container, tokenizer, weights};
use crate::artifact::{Container, StoredModel, StoredTensor, locate};
use crate::error::Result;
use crate::plan::file_type::FileType;
use crate::report::{Finding, Level, LevelReport, Rule, Subject, ValidationReport};
use crate::rewrite::Mixer;

/// Runs the container, weights and tokenizer levels, with rewrites left to `mixer` if there is one. The report has not been
/// judged.
///
/// # Errors
/// The artifact is not there, a file cannot be read, or the reference is no model. That the artifact is corrupt, of
/// another architecture or another model is a finding.
pub fn inspect(
    artifact: &str,
    reference: Option<&str>,
    mixer: Option<&dyn Mixer>,
) -> Result<ValidationReport> {
    let path = locate(artifact)?;
    let mut report = ValidationReport::new(
        Subject {
            path: artifact.into(),
            ..Subject::default()
        },
        None,
    );
    let found = container::inspect(&path)?;
    let broken = found.has_errors();
    ran(&mut report, Level::Container, found);
    // A reference that cannot be opened is the user's error whatever the artifact is.
    let reference_model = reference.map(StoredModel::open).transpose()?;
    report.reference = reference_model
        .as_ref()
        .zip(reference)
        .map(|(model, path)| subject(model, path));
    let model = match StoredModel::open(artifact) {
        Ok(model) => model,
        Err(error) => {
            if !broken {
                let finding = Finding::new(Rule::Unreadable, error.to_string());
                report.findings.push(finding.in_file(artifact));
            }
            let why = "the container level found the artifact unreadable";
            report
                .levels
                .push(LevelReport::skipped(Level::Weights, why));
            report
                .levels
                .push(LevelReport::skipped(Level::Tokenizer, why));
            return Ok(report);
        }
    };
    report.artifact = subject(&model, artifact);
    let weights = weights::inspect(&model, reference_model.as_ref(), mixer)?;
    report.tensors = weights.tensors;
    ran(&mut report, Level::Weights, weights.found);
    let found = tokenizer::inspect(&model, reference_model.as_ref())?;
    ran(&mut report, Level::Tokenizer, found);
    Ok(report)
}

fn ran(report: &mut ValidationReport, level: Level, found: Found) {
    let mut entry = LevelReport::ran(level);
    entry.scope = found.scope.clone();
    report.levels.push(entry);
    report.findings.extend(found.into_findings());
}

/// What a model says about itself.
pub fn subject(model: &StoredModel, path: &str) -> Subject {
    let text = |key: &str| match model.metadata()?.get(key)? {
        Value::String(text) => Some(text.clone()),
        _ => None,
    };
    let own = match model.config().moe {
        Some(_) => "nemotron_h_moe",
        None => "nemotron_h",
    };
    let file_type = model.metadata().and_then(|metadata| {
        let Value::U32(id) = metadata.get("general.file_type")? else {
            return None;
        };
        FileType::of_id(*id).map(|file_type| file_type.name().to_owned())
    });
    Subject {
        path: path.into(),
        format: match model.container() {
            Container::Gguf => "GGUF".into(),
            Container::Checkpoint if model.tensors().iter().any(|tensor| tensor.is_packed) => {
                "packed checkpoint".into()
            }
            Container::Checkpoint => "checkpoint".into(),
            Container::Memory => "memory".into(),
        },
        name: text("general.name"),
        architecture: text("general.architecture").or(Some(own.into())),
        file_type,
        bytes: Some(model.weight_bytes()),
        weights: Some(model.tensors().iter().map(StoredTensor::weights).sum()),
    }
}
