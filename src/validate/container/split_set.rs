//! Whether the parts of a split model are all there and belong together.
//!
//! Enters: the first part. Leaves: the parts that could be opened. Knows no tensors but their number.

use nemoconv_formats::ErrorKind;

use super::{Part, of_error, unreadable};
use crate::artifact::gguf::{part_path, split_number};
use crate::error::Result;
use crate::report::{Finding, Rule};
use crate::validate::Found;

/// Opens what the first part names.
pub fn open_rest(first: Part, found: &mut Found) -> Result<Vec<Part>> {
    let number = |part: &Part, key: &str| split_number(&part.header.metadata, key);
    let count = number(&first, "split.count").unwrap_or(1);
    let mut parts = vec![first];
    if count <= 1 {
        return Ok(parts);
    }
    if let Some(index) = number(&parts[0], "split.no").filter(|index| *index != 0) {
        let message = format!(
            "this is part {} of {count}; validate the first",
            index.saturating_add(1)
        );
        let finding = Finding::new(Rule::SplitPartMissing, message).in_tensor("split.no");
        found.push(parts[0].place(finding));
        return Ok(parts);
    }
    for index in 1..count {
        let path = match part_path(&parts[0].path, index, count) {
            Ok(path) => path,
            Err(error) => {
                found.push(of_error(Rule::SplitPartMissing, &error));
                return Ok(parts);
            }
        };
        match Part::open(&path) {
            Ok(part) => {
                numbers(&part, index, count, found);
                parts.push(part);
            }
            Err(error) if matches!(&error.kind, ErrorKind::Io(io) if io.kind() == std::io::ErrorKind::NotFound) =>
            {
                let message = format!("part {} of {count} is not there", index + 1);
                let finding = Finding::new(Rule::SplitPartMissing, message);
                found.push(finding.in_file(path.display().to_string()));
            }
            Err(error) => unreadable(error.into(), found)?,
        }
    }
    if parts.len() as u64 == count {
        total(&parts, found);
    }
    Ok(parts)
}

fn numbers(part: &Part, index: u64, count: u64, found: &mut Found) {
    for (key, expected) in [("split.no", index), ("split.count", count)] {
        let stored = split_number(&part.header.metadata, key);
        if stored != Some(expected) {
            let message = match stored {
                Some(stored) => format!("must be {expected} by the file's name, found {stored}"),
                None => format!("must be {expected} by the file's name, and is missing"),
            };
            found.push(part.place(Finding::new(Rule::ContradictingKey, message).in_tensor(key)));
        }
    }
}

fn total(parts: &[Part], found: &mut Found) {
    const KEY: &str = "split.tensors.count";
    let tensors: usize = parts.iter().map(|part| part.header.tensors.len()).sum();
    let mut names = std::collections::HashSet::new();
    for part in parts {
        for tensor in &part.header.tensors {
            if !names.insert(&tensor.name) && !found.has(Rule::DuplicateTensor) {
                let message = "the tensor is in two parts";
                let finding = Finding::new(Rule::DuplicateTensor, message);
                found.push(part.place(finding.in_tensor(&tensor.name)));
            }
        }
        let Some(stored) = split_number(&part.header.metadata, KEY) else {
            continue;
        };
        if stored != tensors as u64 {
            let message = format!("is {stored}, but the parts hold {tensors} tensors");
            let rule = match stored < tensors as u64 {
                true => Rule::TooManyTensors,
                false => Rule::ContradictingKey,
            };
            found.push(part.place(Finding::new(rule, message).in_tensor(KEY)));
        }
    }
}
