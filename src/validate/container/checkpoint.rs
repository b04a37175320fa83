//! A Hugging Face folder as container: shards, index, config.json, and the tensors it implies.
//!
//! Enters: a path. Leaves: findings. Looks at no weight.

use std::collections::HashMap;
use std::path::Path;

use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv_formats::{Error as FormatError, ErrorKind};

use super::{of_error, of_fault, unreadable};
use crate::error::{Error, Result};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{Presence, Widths, canonical_name, expected_tensors};
use crate::plan::sources;
use crate::report::{Finding, Rule, Severity};
use crate::validate::Found;

const CONFIG: &str = "config.json";

pub fn inspect(path: &Path, found: &mut Found) -> Result<()> {
    let checkpoint = match Checkpoint::open(path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(path, error, found),
    };
    found.looked_at("files", checkpoint.shards().len());
    found.looked_at("tensors", checkpoint.tensors().len());
    let config_path = checkpoint.folder().join(CONFIG);
    let in_config = |finding: Finding| finding.in_file(config_path.display().to_string());
    let json = match checkpoint.read_json(CONFIG) {
        Ok(Some(json)) => json,
        Ok(None) => {
            let message = "there is no config.json beside the weights";
            found.push(in_config(Finding::new(Rule::MissingKey, message)));
            return Ok(());
        }
        Err(error) => return unreadable(error.into(), found),
    };
    match NemotronHConfig::parse(&json) {
        Ok(config) => tensors(&checkpoint, &config, found),
        Err(fault) => {
            let rule = match fault.what.contains("`architectures`") {
                true => Rule::UnsupportedArchitecture,
                false => Rule::ContradictingKey,
            };
            found.push(in_config(of_fault(rule, &fault)));
        }
    }
    Ok(())
}

/// What is not there at all is the user's error; what is there and wrong is a finding.
fn refused(path: &Path, error: FormatError, found: &mut Found) -> Result<()> {
    match &error.kind {
        ErrorKind::Missing(_) if path.exists() && error.place.path.as_deref() != Some(path) => {
            let rule = match error.place.tensor {
                Some(_) => Rule::MissingTensor,
                None => Rule::SplitPartMissing,
            };
            found.push(of_error(rule, &error.into()));
            Ok(())
        }
        ErrorKind::Missing(_) | ErrorKind::Unsupported(_) if !path.exists() || path.is_dir() => {
            Err(error.into())
        }
        _ => unreadable(error.into(), found),
    }
}

fn tensors(checkpoint: &Checkpoint, config: &NemotronHConfig, found: &mut Found) {
    let Err(error) = sources::resolve(checkpoint, config, true) else {
        return;
    };
    // It stops at the first; here all of them are wanted.
    let widths = Widths::of(config);
    let entries = checkpoint.tensors().iter();
    let by_name: HashMap<String, &TensorEntry> = entries
        .map(|entry| (canonical_name(&entry.name), entry))
        .collect();
    let mut explained = false;
    for expected in expected_tensors(config, true) {
        let stacked = expected.stacked_source.as_ref();
        if stacked.is_some_and(|name| by_name.contains_key(name)) {
            continue;
        }
        let shape = expected.rule.shape.iter();
        let shape: Vec<_> = shape.map(|dim| dim.size(config, &widths)).collect();
        for name in &expected.sources {
            let finding = match by_name.get(name) {
                None if expected.rule.presence == Presence::Required => {
                    let message = format!("the tensor is missing; its shape would be {shape:?}");
                    let finding = Finding::new(Rule::MissingTensor, message).in_tensor(name);
                    finding.in_file(checkpoint.folder().display().to_string())
                }
                Some(entry) if entry.shape != shape => {
                    let message = format!(
                        "its shape must be {shape:?} by config.json, found {:?}",
                        entry.shape
                    );
                    let path = checkpoint.shards()[entry.shard].path();
                    let finding = Finding::new(Rule::WrongShape, message).in_tensor(&entry.name);
                    let finding = finding.in_file(path.display().to_string());
                    finding.at(entry.offset)
                }
                _ => continue,
            };
            explained = true;
            found.push(finding);
        }
    }
    if !explained {
        found.push(unexplained(&error));
    }
}

fn unexplained(error: &Error) -> Finding {
    of_error(Rule::UnknownTensor, error).severity(Severity::Error)
}
