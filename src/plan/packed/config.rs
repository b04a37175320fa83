//! `quantization_config`: what readers are told.
//!
//! Enters: linears with their schemes. Leaves: JSON with every key that the formats' own tools write, nulls included.
//!
//! Source: compressed-tensors 0.19, `QuantizationConfig`; GPTQModel 7.7, `QuantizeConfig`.

use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::packed::{Group, Inputs, Layout, Scheme};
use serde_json::{Map, Value, json};

use super::linears::{Kind, Linear};
use super::scheme::LinearScheme;
use super::targets::{EVERY_LINEAR, targets};

/// The release whose layout is written.
const COMPRESSED_TENSORS: &str = "0.19.0";

/// The configuration of a folder.
pub fn quantization_config(
    checkpoint: &Checkpoint,
    linears: &[Linear],
    schemes: &[Option<LinearScheme>],
) -> Value {
    let mut groups: Vec<&LinearScheme> = Vec::new();
    for scheme in schemes.iter().flatten() {
        if !groups.contains(&scheme) {
            groups.push(scheme);
        }
    }
    match groups.first() {
        Some(first) if first.named.is_gptq() => gptq(linears, schemes, &groups),
        _ => compressed_tensors(checkpoint, linears, schemes, &groups),
    }
}

fn compressed_tensors(
    checkpoint: &Checkpoint,
    linears: &[Linear],
    schemes: &[Option<LinearScheme>],
    groups: &[&LinearScheme],
) -> Value {
    let groups = experts_first(linears, schemes, groups);
    let mut formats: Vec<&str> = groups
        .iter()
        .map(|group| group.scheme.layout.name())
        .collect();
    let is_single = groups.len() == 1;
    let config_groups: Map<String, Value> = groups
        .iter()
        .enumerate()
        .map(|(number, group)| {
            let is_member = |index: usize| schemes[index].as_ref() == Some(group);
            let targets = match is_single {
                true => every_linear(linears, is_member),
                false => targets(linears, is_member),
            };
            (
                format!("group_{number}"),
                group_json(&group.scheme, &targets),
            )
        })
        .collect();
    let kept = linears
        .iter()
        .zip(schemes)
        .filter(|(_, scheme)| scheme.is_none());
    let mut ignore: Vec<String> = kept.map(|(linear, _)| linear.module.clone()).collect();
    if checkpoint
        .tensors()
        .iter()
        .any(|entry| entry.name.starts_with("mtp."))
    {
        ignore.push("re:.*mtp\\..*".to_string());
    }
    formats.dedup();
    let format = match formats.as_slice() {
        [one] => one,
        _ => "mixed-precision",
    };
    json!({
        "config_groups": config_groups,
        "format": format,
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": COMPRESSED_TENSORS,
    })
}

/// The class of all linears, and the head by name if it is packed: vLLM's class of heads is not called a linear.
fn every_linear(linears: &[Linear], is_member: impl Fn(usize) -> bool) -> Vec<String> {
    let heads = linears.iter().enumerate();
    let heads = heads.filter(|(index, linear)| linear.kind == Kind::Head && is_member(*index));
    let names = heads.map(|(_, linear)| linear.module.clone());
    std::iter::once(EVERY_LINEAR.to_string())
        .chain(names)
        .collect()
}

/// transformers takes experts for what the first group with `experts` in an expression says, be they shared or routed;
/// where expressions overlap, other readers take the first too, and these do not.
///
/// Source: transformers 5.17, `integrations/compressed_tensors.py`, `get_experts_scheme`.
fn experts_first<'a>(
    linears: &[Linear],
    schemes: &[Option<LinearScheme>],
    groups: &[&'a LinearScheme],
) -> Vec<&'a LinearScheme> {
    let has_experts = |group: &LinearScheme| {
        let mut all = linears.iter().zip(schemes);
        all.any(|(linear, scheme)| linear.kind == Kind::Expert && scheme.as_ref() == Some(group))
    };
    let mut groups = groups.to_vec();
    groups.sort_by_key(|group| !has_experts(group));
    groups
}

fn group_json(scheme: &Scheme, targets: &[String]) -> Value {
    let (strategy, group_size) = match scheme.layout.group() {
        Some(Group::Columns(size)) => ("group", Some(size)),
        Some(Group::Tensor) => ("tensor", None),
        Some(Group::Row) | None => ("channel", None),
    };
    let zero_points = (!scheme.layout.is_symmetric()).then_some("torch.int8");
    let weights = Arguments {
        bits: scheme.layout.bits(),
        strategy,
        group_size,
        dynamic: false,
        zero_points,
        observer: Some("memoryless_minmax"),
    };
    let inputs = |strategy, dynamic, observer| Arguments {
        bits: 8,
        strategy,
        group_size: None,
        dynamic,
        zero_points: None,
        observer,
    };
    let inputs = match scheme.inputs {
        Inputs::Int8PerToken => Some(inputs("token", true, None)),
        Inputs::Int8PerTensor => Some(inputs("tensor", false, Some("memoryless_minmax"))),
        // Floats are read, not written.
        _ => None,
    };
    json!({
        "format": scheme.layout.name(),
        "input_activations": inputs.map(Arguments::json),
        "output_activations": null,
        "targets": targets,
        "weights": weights.json(),
    })
}

/// How numbers are quantized.
struct Arguments {
    bits: usize,
    strategy: &'static str,
    group_size: Option<usize>,
    dynamic: bool,
    zero_points: Option<&'static str>,
    observer: Option<&'static str>,
}

impl Arguments {
    fn json(self) -> Value {
        json!({
            "actorder": null,
            "block_structure": null,
            "dynamic": self.dynamic,
            "group_size": self.group_size,
            "num_bits": self.bits,
            "observer": self.observer,
            "observer_kwargs": {},
            "scale_dtype": null,
            "strategy": self.strategy,
            "symmetric": self.zero_points.is_none(),
            "type": "int",
            "zp_dtype": self.zero_points,
        })
    }
}

/// GPTQ's own configuration: the settings of most linears, and where others differ.
fn gptq(linears: &[Linear], schemes: &[Option<LinearScheme>], groups: &[&LinearScheme]) -> Value {
    let count = |group: &LinearScheme| {
        schemes
            .iter()
            .flatten()
            .filter(|scheme| *scheme == group)
            .count()
    };
    let usual = groups
        .iter()
        .max_by_key(|group| count(group))
        .expect("there is a group");
    let settings = |scheme: &LinearScheme| (scheme.scheme.layout.bits(), scheme.grid.group_size);
    let mut dynamic = Map::new();
    // Negatives first: GPTQModel moves them there.
    let kept = |index: usize| schemes[index].is_none() && linears[index].kind != Kind::Head;
    for pattern in patterns(linears, kept) {
        dynamic.insert(format!("-:{pattern}"), json!({}));
    }
    for group in groups.iter().filter(|group| *group != usual) {
        let (bits, group_size) = settings(group);
        let is_member = |index: usize| schemes[index].as_ref() == Some(group);
        for pattern in patterns(linears, is_member) {
            let over =
                json!({ "bits": bits, "group_size": group_size, "sym": true, "desc_act": false });
            dynamic.insert(format!("+:{pattern}"), over);
        }
    }
    let (bits, group_size) = settings(usual);
    let has_head = linears
        .iter()
        .zip(schemes)
        .any(|(linear, scheme)| linear.kind == Kind::Head && scheme.is_some());
    let symmetric = matches!(
        usual.scheme.layout,
        Layout::Gptq {
            symmetric: true,
            ..
        }
    );
    let mut config = json!({
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": false,
        "sym": symmetric,
        "lm_head": has_head,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "meta": { "quantizer": [concat!("nemoconv:", env!("CARGO_PKG_VERSION"))] },
    });
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    config
}

/// Targets as GPTQ wants them, without `re:`, and such that they match the names that vLLM gives fused matrices too.
fn patterns(linears: &[Linear], is_member: impl Fn(usize) -> bool) -> Vec<String> {
    let expressions = targets(linears, is_member).into_iter();
    let fused = |target: String| {
        let pattern = target.strip_prefix("re:").unwrap_or(&target);
        match pattern.split_once("experts\\.\\d+") {
            Some((before, _)) => format!("{before}experts(\\..*)?$"),
            None => pattern.replace("q_proj", "q_proj|qkv_proj"),
        }
    };
    expressions.map(fused).collect()
}
