//! `general.*` and `tokenizer.*` keys against the real converter's, case by case.

use nemoconv::formats::gguf::{Array, Metadata, Value};
use nemoconv::formats::{Error, Result};
use nemoconv::model::description::{DescriptionSources, ModelDescription, ParameterCounts};
use nemoconv::model::tokenizer::Tokenizer;
use nemoconv::write::gguf::general_keys::general_keys;
use nemoconv::write::gguf::tokenizer_keys::tokenizer_keys;
use nemoconv_fixtures::metadata::{Case, Expected, cases};
use serde_json::{Value as Json, json};

#[test]
fn metadata_is_the_converters() {
    let failures: Vec<String> = cases()
        .iter()
        .filter_map(|case| check(case).err().map(|why| format!("{}: {why}", case.name)))
        .collect();
    assert!(
        failures.is_empty(),
        "{} cases differ\n{}",
        failures.len(),
        failures.join("\n")
    );
}

fn check(case: &Case) -> std::result::Result<(), String> {
    let ours = convert(case);
    match (&case.differs, &case.expected, ours) {
        (None, Expected::Error(_), Err(error)) => names_a_file(&error),
        (None, Expected::Error(error), Ok(_)) => {
            Err(format!("accepted, the converter says {error}"))
        }
        (None, Expected::Written { keys, .. }, Ok(ours)) => same_keys(keys, &listed(&ours)),
        (None, Expected::Written { .. }, Err(error)) => Err(format!("refused: {error}")),
        (Some(reason), _, Err(error)) if reason.starts_with("refused") => names_a_file(&error),
        (Some(reason), _, Ok(ours)) if reason.starts_with("accepted") => has_keys(case, &ours),
        (Some(reason), _, ours) => Err(format!("{reason}, found {:?}", ours.map(|_| "keys"))),
    }
}

fn convert(case: &Case) -> Result<Metadata> {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let folder = case.write(parent.path()).expect("a written folder");
    let config: Json =
        serde_json::from_slice(case.file("config.json").expect("a config")).expect("JSON");
    let vocab_size = config["vocab_size"].as_u64().expect("a vocabulary") as usize;
    let [total, shared, expert, expert_count] = case.counts;
    let model = ModelDescription::read(&DescriptionSources {
        folder: &folder,
        model_id: &case.folder,
        config: &config,
        overrides: case.overrides.as_ref(),
        model_name: case.model_name.as_deref(),
        counts: ParameterCounts {
            total,
            shared,
            expert,
            expert_count,
        },
    })?;
    let tokenizer = Tokenizer::read(&folder, &config, vocab_size, None)?;
    let mut metadata = Metadata::new();
    general_keys(&model, &mut metadata);
    tokenizer_keys(&tokenizer, &mut metadata);
    Ok(metadata)
}

fn names_a_file(error: &Error) -> std::result::Result<(), String> {
    match error.place.path {
        Some(_) => Ok(()),
        None => Err(format!("no file in `{error}`")),
    }
}

fn has_keys(case: &Case, ours: &Metadata) -> std::result::Result<(), String> {
    for (key, expected) in &case.ours {
        let found = ours.get(key).map(|value| plain(value).1);
        if found.as_ref() != Some(expected) {
            return Err(format!("{key} is {found:?}, expected {expected}"));
        }
    }
    Ok(())
}

type Entry = (String, String, Json);

fn listed(metadata: &Metadata) -> Vec<Entry> {
    let entry = |(key, value): (&str, &Value)| {
        let (kind, value) = plain(value);
        (key.to_owned(), kind.to_owned(), value)
    };
    metadata.iter().map(entry).collect()
}

/// Order, types and values; `tokenizer.chat_templates` is a set that the converter writes in any order.
fn same_keys(expected: &[Entry], ours: &[Entry]) -> std::result::Result<(), String> {
    for (i, ours) in ours.iter().enumerate() {
        let Some(theirs) = expected.get(i) else {
            return Err(format!("unexpected {}", ours.0));
        };
        let same = match theirs.0.as_str() {
            "tokenizer.chat_templates" => sorted(&theirs.2) == sorted(&ours.2),
            _ => theirs.2 == ours.2,
        };
        if (&theirs.0, &theirs.1) != (&ours.0, &ours.1) || !same {
            return Err(format!("entry {i}: {}", difference(theirs, ours)));
        }
    }
    match expected.get(ours.len()) {
        Some(missing) => Err(format!("missing {}", missing.0)),
        None => Ok(()),
    }
}

fn sorted(names: &Json) -> Vec<String> {
    let mut names: Vec<String> = names
        .as_array()
        .into_iter()
        .flatten()
        .map(Json::to_string)
        .collect();
    names.sort();
    names
}

/// The first entry where long arrays part.
fn difference(theirs: &Entry, ours: &Entry) -> String {
    let head = format!(
        "expected {} ({}), found {} ({})",
        theirs.0, theirs.1, ours.0, ours.1
    );
    if let (Json::Array(theirs), Json::Array(ours)) = (&theirs.2, &ours.2) {
        let at = theirs
            .iter()
            .zip(ours)
            .position(|(theirs, ours)| theirs != ours);
        let at = at.unwrap_or(theirs.len().min(ours.len()));
        return format!(
            "{head}, item {at}: {:?}, found {:?}",
            theirs.get(at),
            ours.get(at)
        );
    }
    format!("{head}: {}, found {}", theirs.2, ours.2)
}

fn plain(value: &Value) -> (&'static str, Json) {
    match value {
        Value::String(text) => ("string", json!(text)),
        Value::U32(value) => ("uint32", json!(value)),
        Value::I32(value) => ("int32", json!(value)),
        Value::F32(value) => ("float32", json!(f64::from(*value))),
        Value::Bool(value) => ("bool", json!(value)),
        Value::Array(Array::String(texts)) => ("array string", json!(texts)),
        Value::Array(Array::I32(values)) => ("array int32", json!(values)),
        other => panic!("no such type in these keys: {other:?}"),
    }
}
