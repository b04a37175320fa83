//! Where tensor data lies: every offset recomputed from shapes, types and alignment.
//!
//! Enters: one file's header and length. Leaves: findings, one per fault: what follows a shifted tensor is measured
//! from there.

use nemoconv_formats::gguf::TensorInfo;

use super::{Part, layer_of};
use crate::report::{Finding, Rule, Severity};
use crate::validate::Found;

pub fn inspect(part: &Part, found: &mut Found) {
    let header = &part.header;
    let alignment = u64::from(header.alignment);
    let mut seen = std::collections::HashSet::new();
    // Where the next tensor begins if all before are as long as they say, and if the last is where it says.
    let (mut by_sizes, mut by_last) = (0u64, 0u64);
    let mut last: Option<&TensorInfo> = None;
    for tensor in &header.tensors {
        let at = header.data_offset.saturating_add(tensor.offset);
        let push = |found: &mut Found, rule, severity, message: String| {
            let mut finding = Finding::new(rule, message).severity(severity);
            finding.place.layer = layer_of(&tensor.name);
            found.push(part.place(finding.in_tensor(&tensor.name).at(at)));
        };
        if !seen.insert(&tensor.name) {
            let message = "the name is used twice".into();
            push(found, Rule::DuplicateTensor, Severity::Error, message);
        }
        let end = at.saturating_add(tensor.bytes());
        if end > part.file_bytes {
            let message = format!(
                "its data ends at {end:#x}, the file at {:#x}",
                part.file_bytes
            );
            push(found, Rule::OffsetOutsideFile, Severity::Error, message);
        }
        if tensor.offset != by_sizes && tensor.offset != by_last {
            let (rule, why) = misplaced(tensor, by_sizes, alignment, last);
            let message = format!(
                "its data must begin at {by_sizes:#x} of the data section, found {:#x}: {why}",
                tensor.offset
            );
            push(found, rule, Severity::Error, message);
        }
        let padded = tensor.bytes().checked_next_multiple_of(alignment);
        let padded = padded.unwrap_or(u64::MAX);
        by_sizes = by_sizes.saturating_add(padded);
        by_last = tensor.offset.saturating_add(padded);
        last = Some(tensor);
    }
    trailing(part, by_sizes.max(by_last), found);
}

fn misplaced(
    tensor: &TensorInfo,
    expected: u64,
    alignment: u64,
    last: Option<&TensorInfo>,
) -> (Rule, String) {
    if !tensor.offset.is_multiple_of(alignment) {
        let why = format!("not a multiple of the alignment {alignment}");
        return (Rule::MisalignedTensor, why);
    }
    match last {
        Some(last) if tensor.offset < last.offset.saturating_add(last.bytes()) => {
            let why = format!("it shares bytes with `{}`", last.name);
            (Rule::OverlappingTensors, why)
        }
        _ if tensor.offset > expected => {
            let why = format!("{} bytes before it are unused", tensor.offset - expected);
            (Rule::GapBetweenTensors, why)
        }
        _ => (Rule::OverlappingTensors, "it lies before its turn".into()),
    }
}

fn trailing(part: &Part, data_bytes: u64, found: &mut Found) {
    let end = part.header.data_offset.saturating_add(data_bytes);
    if part.file_bytes > end && !part.header.tensors.is_empty() {
        let message = format!(
            "{} bytes follow the last tensor, whose data ends at {end:#x}",
            part.file_bytes - end
        );
        found.push(part.place(Finding::new(Rule::TrailingBytes, message).at(end)));
    }
}
