//! `general.*` keys that describe a model, in the stock converter's order and types.
//!
//! Enters: a [`ModelDescription`]. Leaves: entries of [`Metadata`]. Reads no files.

use nemoconv_formats::gguf::{Metadata, Value};

use crate::model::description::{ModelDescription, Origin, Sampling};

/// Appends `general.type` and everything known about the model. Empty texts and lists are left out,
/// as the converter does.
///
/// Source: llama.cpp `gguf-py/gguf/metadata.py` (`set_gguf_meta_model`).
pub fn general_keys(model: &ModelDescription, metadata: &mut Metadata) {
    metadata.set("general.type", "model");
    sampling_keys(&model.sampling, metadata);
    let texts = [
        ("name", &model.name),
        ("author", &model.author),
        ("version", &model.version),
        ("organization", &model.organization),
        ("finetune", &model.finetune),
        ("basename", &model.basename),
        ("description", &model.description),
        ("quantized_by", &model.quantized_by),
        ("size_label", &model.size_label),
        ("license", &model.license),
        ("license.name", &model.license_name),
        ("license.link", &model.license_link),
        ("url", &model.url),
        ("doi", &model.doi),
        ("uuid", &model.uuid),
        ("repo_url", &model.repo_url),
        ("source.url", &model.source_url),
        ("source.doi", &model.source_doi),
        ("source.uuid", &model.source_uuid),
        ("source.repo_url", &model.source_repo_url),
    ];
    text_keys("general", &texts, metadata);
    origin_keys("general.base_model", model.base_models.as_deref(), metadata);
    origin_keys("general.dataset", model.datasets.as_deref(), metadata);
    for (key, list) in [
        ("general.tags", &model.tags),
        ("general.languages", &model.languages),
    ] {
        if !list.is_empty() {
            metadata.set(key, list.clone());
        }
    }
}

fn sampling_keys(sampling: &Sampling, metadata: &mut Metadata) {
    let sequence = sampling
        .sequence
        .as_deref()
        .filter(|sequence| !sequence.is_empty());
    let values: [(&str, Option<Value>); 12] = [
        ("sequence", sequence.map(Value::from)),
        ("top_k", sampling.top_k.map(Value::from)),
        ("top_p", sampling.top_p.map(Value::from)),
        ("min_p", sampling.min_p.map(Value::from)),
        ("xtc_probability", sampling.xtc_probability.map(Value::from)),
        ("xtc_threshold", sampling.xtc_threshold.map(Value::from)),
        ("temp", sampling.temp.map(Value::from)),
        ("penalty_last_n", sampling.penalty_last_n.map(Value::from)),
        ("penalty_repeat", sampling.penalty_repeat.map(Value::from)),
        ("mirostat", sampling.mirostat.map(Value::from)),
        ("mirostat_tau", sampling.mirostat_tau.map(Value::from)),
        ("mirostat_eta", sampling.mirostat_eta.map(Value::from)),
    ];
    for (key, value) in values {
        if let Some(value) = value {
            metadata.set(format!("general.sampling.{key}"), value);
        }
    }
}

fn origin_keys(prefix: &str, origins: Option<&[Origin]>, metadata: &mut Metadata) {
    let Some(origins) = origins else { return };
    metadata.set(
        format!("{prefix}.count"),
        u32::try_from(origins.len()).unwrap_or(u32::MAX),
    );
    for (i, origin) in origins.iter().enumerate() {
        let texts = [
            ("name", &origin.name),
            ("author", &origin.author),
            ("version", &origin.version),
            ("organization", &origin.organization),
            ("description", &origin.description),
            ("url", &origin.url),
            ("doi", &origin.doi),
            ("uuid", &origin.uuid),
            ("repo_url", &origin.repo_url),
        ];
        text_keys(&format!("{prefix}.{i}"), &texts, metadata);
    }
}

fn text_keys(prefix: &str, texts: &[(&str, &Option<String>)], metadata: &mut Metadata) {
    for (key, text) in texts {
        if let Some(text) = text.as_deref().filter(|text| !text.is_empty()) {
            metadata.set(format!("{prefix}.{key}"), text);
        }
    }
}
