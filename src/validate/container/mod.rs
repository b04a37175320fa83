//! The container level: whether the files are whole and describe one model of a known architecture.
//!
//! Enters: a path. Leaves: findings. Reads headers only: no weight is looked at.

mod checkpoint;
mod keys;
mod places;
mod split_set;
mod tensors;

use std::path::{Path, PathBuf};

use nemoconv_formats::gguf::Header;
use nemoconv_formats::{ErrorKind, MappedFile, Place};

use super::Found;
use crate::error::{Error, Fault, Result};
use crate::report::{Finding, FindingPlace, Rule};

/// One file of a GGUF model, its header read without trust in where tensors lie.
struct Part {
    path: PathBuf,
    file_bytes: u64,
    header: Header,
}

impl Part {
    fn open(path: &Path) -> nemoconv_formats::Result<Self> {
        let file = MappedFile::open(path)?;
        let header = Header::parse_unplaced(file.bytes()).map_err(|e| e.in_file(path))?;
        Ok(Self {
            path: path.to_owned(),
            file_bytes: file.bytes().len() as u64,
            header,
        })
    }

    fn place(&self, finding: Finding) -> Finding {
        finding.in_file(self.path.display().to_string())
    }
}

/// Inspects a GGUF file (the first of a split set) or a checkpoint folder.
///
/// # Errors
/// The artifact is not there or cannot be read. That it is corrupt is a finding.
pub fn inspect(artifact: &Path) -> Result<Found> {
    let mut found = Found::default();
    if artifact.extension().is_some_and(|e| e == "gguf") {
        inspect_gguf(artifact, &mut found)?;
    } else {
        checkpoint::inspect(artifact, &mut found)?;
    }
    Ok(found)
}

fn inspect_gguf(path: &Path, found: &mut Found) -> Result<()> {
    let first = match Part::open(path) {
        Ok(part) => part,
        Err(error) => return unreadable(error.into(), found),
    };
    let parts = split_set::open_rest(first, found)?;
    for part in &parts {
        places::inspect(part, found);
    }
    found.looked_at("files", parts.len());
    found.looked_at("keys", parts[0].header.metadata.iter().len());
    let tensors: usize = parts.iter().map(|part| part.header.tensors.len()).sum();
    found.looked_at("tensors", tensors);
    if let Some(config) = keys::inspect(&parts, found) {
        tensors::inspect(&parts, &config, found);
    }
    Ok(())
}

/// A corrupt file is a finding, one that cannot be read at all an error.
fn unreadable(error: Error, found: &mut Found) -> Result<()> {
    if let Error::Input(input) = &error
        && matches!(input.kind, ErrorKind::Io(_))
    {
        return Err(error);
    }
    found.push(of_error(Rule::Unreadable, &error));
    Ok(())
}

/// An error as a finding: the fact apart from its place.
fn of_error(rule: Rule, error: &Error) -> Finding {
    let what = match error {
        Error::Input(error) => error.kind.to_string(),
        Error::Model(fault) | Error::Plan(fault) | Error::Weights(fault) => fault.what.clone(),
        other => other.to_string(),
    };
    let mut finding = Finding::new(rule, what);
    finding.place = place_of(error.place());
    finding
}

fn of_fault(rule: Rule, fault: &Fault) -> Finding {
    let mut finding = Finding::new(rule, fault.what.clone());
    finding.place = place_of(Some(&fault.place));
    finding
}

fn place_of(place: Option<&Place>) -> FindingPlace {
    place.map(FindingPlace::from).unwrap_or_default()
}

/// The index in `blk.N.`.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    let (index, _) = name.strip_prefix("blk.")?.split_once('.')?;
    index.parse().ok()
}

#[cfg(test)]
mod tests;
