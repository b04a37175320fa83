//! The tensor set: what the architecture asks for is there, in the shape that the sizes imply and a usable type.
//!
//! Enters: headers and sizes. Leaves: findings. Looks at no weight.

use std::collections::HashMap;

use nemoconv_formats::GgmlType;
use nemoconv_formats::gguf::TensorInfo;

use super::{Part, layer_of};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{ExpectedTensor, Presence, Storage, Widths, expected_tensors};
use crate::report::{Finding, Rule, Severity};
use crate::validate::Found;

pub fn inspect(parts: &[Part], config: &NemotronHConfig, found: &mut Found) {
    let widths = Widths::of(config);
    let mut stored: HashMap<&str, (&Part, &TensorInfo)> = HashMap::new();
    for part in parts {
        let tensors = part.header.tensors.iter();
        stored.extend(tensors.map(|tensor| (tensor.name.as_str(), (part, tensor))));
    }
    for expected in expected_tensors(config, true) {
        let dims = expected_dims(&expected, config, &widths);
        match stored.remove(expected.name.as_str()) {
            Some((part, tensor)) => {
                shape(part, tensor, &expected, &dims, found);
                stored_type(part, tensor, expected.rule.storage, found);
            }
            // The runtime's graph adds the optional bias of the convolution unconditionally.
            None if expected.rule.presence != Presence::Optional => {
                let mut message = format!("the tensor is missing; its shape would be {dims:?}");
                if expected.sources.len() > 1 {
                    message.push_str(&format!(" ({} experts)", expected.sources.len()));
                }
                let mut finding = Finding::new(Rule::MissingTensor, message);
                finding.place.layer = layer_of(&expected.name);
                found.push(parts[0].place(finding.in_tensor(expected.name)));
            }
            None => {}
        }
    }
    stored.retain(|name, (_, tensor)| !is_second_scale(name, tensor, parts));
    let mut unknown: Vec<_> = stored.into_values().collect();
    unknown.sort_by_key(|(_, tensor)| &tensor.name);
    for (part, tensor) in unknown {
        let message = "the architecture has no such tensor; llama.cpp refuses the file";
        let finding = Finding::new(Rule::UnknownTensor, message).severity(Severity::Error);
        push(part, tensor, finding, found);
    }
}

/// `NAME.scale` and `NAME.input_scale` beside a matrix in NVFP4.
fn is_second_scale(name: &str, tensor: &TensorInfo, parts: &[Part]) -> bool {
    let stem = name.strip_suffix(".scale");
    let Some(stem) = stem.or(name.strip_suffix(".input_scale")) else {
        return false;
    };
    let weight = format!("{stem}.weight");
    let mut tensors = parts.iter().flat_map(|part| &part.header.tensors);
    let is_nvfp4 = |tensor: &TensorInfo| tensor.name == weight && tensor.ty == GgmlType::NVFP4;
    tensor.ty == GgmlType::F32 && tensors.any(is_nvfp4)
}

fn push(part: &Part, tensor: &TensorInfo, mut finding: Finding, found: &mut Found) {
    finding.place.layer = layer_of(&tensor.name);
    found.push(part.place(finding.in_tensor(&tensor.name)));
}

/// Fastest first, without trailing ones.
fn expected_dims(expected: &ExpectedTensor, config: &NemotronHConfig, widths: &Widths) -> Vec<u64> {
    let rule = expected.rule;
    let shape = rule.reshape.unwrap_or(rule.shape).iter().rev();
    let mut dims: Vec<u64> = shape.map(|dim| dim.size(config, widths) as u64).collect();
    if rule.is_stacked() {
        dims.push(expected.sources.len() as u64);
    }
    trimmed(&dims).to_vec()
}

fn trimmed(dims: &[u64]) -> &[u64] {
    let ones = dims.iter().rev().take_while(|dim| **dim == 1).count();
    &dims[..(dims.len() - ones).max(1).min(dims.len())]
}

fn shape(
    part: &Part,
    tensor: &TensorInfo,
    expected: &ExpectedTensor,
    dims: &[u64],
    found: &mut Found,
) {
    let stored = trimmed(&tensor.dims);
    if stored == dims {
        return;
    }
    let experts = |dims: &[u64]| dims.get(2).copied().unwrap_or(1);
    let message = if expected.rule.is_stacked() && stored[..2.min(stored.len())] == dims[..2] {
        format!(
            "holds {} of {} experts: its shape must be {dims:?}, found {stored:?}",
            experts(stored),
            experts(dims)
        )
    } else {
        format!("its shape must be {dims:?} by the sizes of the model, found {stored:?}")
    };
    push(part, tensor, Finding::new(Rule::WrongShape, message), found);
}

/// Integers and f64 are no weights; Q8_1 and Q8_K exist only while a runtime computes.
fn stored_type(part: &Part, tensor: &TensorInfo, storage: Storage, found: &mut Found) {
    use GgmlType::{F32, F64, I8, I16, I32, I64, Q8_1, Q8_K};
    let finding = match (tensor.ty, storage) {
        (I8 | I16 | I32 | I64 | F64 | Q8_1 | Q8_K, _) => {
            let message = format!("is stored as {}, which no runtime multiplies", tensor.ty);
            Finding::new(Rule::UnexpectedType, message).severity(Severity::Error)
        }
        (F32, _) | (_, Storage::OutType) => return,
        (ty, Storage::F32) => {
            let message = format!("is stored as {ty}; runtimes expect F32 here");
            Finding::new(Rule::UnexpectedType, message)
        }
    };
    push(part, tensor, finding, found);
}
