//! Any README.md, generation_config.json and model name: an answer, or a fault that names the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nemoconv::formats::gguf::Metadata;
use nemoconv::model::description::{DescriptionSources, ModelDescription, ParameterCounts};
use nemoconv::write::gguf::general_keys::general_keys;
use serde_json::Value;

// The card, generation_config.json and the model's name, one NUL between them.
fuzz_target!(|text: &str| {
    let mut parts = text.splitn(3, '\0');
    let card = parts.next().unwrap_or_default();
    let generation_config = parts.next().map(str::as_bytes);
    let sources = DescriptionSources {
        folder: Path::new(""),
        model_id: parts.next().unwrap_or(card),
        config: &Value::Null,
        overrides: None,
        model_name: None,
        counts: ParameterCounts {
            total: 8_000_000_000,
            ..ParameterCounts::default()
        },
    };
    match ModelDescription::parse(&sources, Some(card), generation_config) {
        Ok(description) => general_keys(&description, &mut Metadata::new()),
        Err(error) => assert!(error.place.path.is_some(), "{error}"),
    }
});
