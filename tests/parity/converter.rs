//! Whole files beside those of the published converter and quantizer: every key, shape, type and byte.

use std::path::Path;

use nemoconv::formats::gguf::{Array, Gguf, Value};
use nemoconv_fixtures::{models, reference};
use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};
use tempfile::tempdir;

use crate::support::to_gguf;

/// Name in the digest and our flags.
const FILES: &[(&str, &[&str])] = &[
    ("f32", &["-t", "f32"]),
    ("f16", &["-t", "f16"]),
    ("bf16", &["-t", "bf16"]),
    ("q8_0", &["-t", "q8_0"]),
    ("llama_quantize_q8_0", &["-t", "q8_0"]),
    ("q4_0", &["-t", "q4_0"]),
    ("q4_0_pure", &["-t", "q4_0", "--pure"]),
];

/// Where our bytes may differ.
struct Accepted {
    file: &'static str,
    tensor: &'static str,
    reason: &'static str,
}

const ACCEPTED: &[Accepted] = &[Accepted {
    file: "q4_0",
    tensor: "output.weight",
    reason: "stored as Q6_K, whose scales we search for in our own way",
}];

/// Values up to this many bytes of JSON are in the digest as they are.
const LONG: usize = 120;

#[test]
fn files_are_the_converters() {
    let folder = tempdir().expect("a temporary folder");
    let mut failures = Vec::new();
    for model in models() {
        let digests = digests(&model);
        for (name, flags) in FILES {
            let path = folder.path().join("ours.gguf");
            to_gguf(&model, &path, flags);
            let ours = Gguf::open(&path).expect("our file can be read");
            let differing = [
                keys(&digests[*name], &ours),
                tensors(name, &digests[*name], &ours),
            ]
            .concat();
            let model = model.file_name().expect("models have names").display();
            failures.extend(
                differing
                    .into_iter()
                    .map(|why| format!("{model}, {name}: {why}")),
            );
        }
    }
    assert!(
        failures.is_empty(),
        "{} differences\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn sharded_digests_are_the_single_files() {
    let [single, sharded] =
        ["nemotron-h-tiny", "nemotron-h-tiny-sharded"].map(|name| digests(Path::new(name)));
    for (name, _) in FILES {
        assert_eq!(
            single[*name]["tensors"], sharded[*name]["tensors"],
            "{name}"
        );
    }
}

fn digests(model: &Path) -> Json {
    let name = model.file_name().expect("models have names").display();
    let path = reference().join(format!("converter/{name}.json"));
    let text = std::fs::read_to_string(path).expect("the digest is there");
    serde_json::from_str(&text).expect("the digest is JSON")
}

fn object<'a>(digest: &'a Json, part: &str) -> &'a Map<String, Json> {
    digest[part].as_object().expect("digests hold objects")
}

fn keys(digest: &Json, ours: &Gguf) -> Vec<String> {
    let expected = object(digest, "metadata");
    let metadata = &ours.header().metadata;
    let mut failures = Vec::new();
    for (key, expected) in expected {
        match metadata.get(key).map(plain) {
            None => failures.push(format!("key `{key}` is missing, expected {expected}")),
            Some(found) if found != *expected => {
                failures.push(format!("key `{key}`: expected {expected}, found {found}"));
            }
            Some(_) => {}
        }
    }
    let unexpected = metadata
        .iter()
        .filter(|(key, _)| !expected.contains_key(*key));
    failures
        .extend(unexpected.map(|(key, value)| format!("unexpected key `{key}`: {}", plain(value))));
    let order: Vec<_> = metadata.iter().map(|(key, _)| key).collect();
    if failures.is_empty() && !order.iter().eq(expected.keys()) {
        failures.push(format!("keys in another order: {order:?}"));
    }
    failures
}

fn tensors(file: &str, digest: &Json, ours: &Gguf) -> Vec<String> {
    let expected = object(digest, "tensors");
    let tensors = &ours.header().tensors;
    let mut failures = Vec::new();
    for tensor in tensors {
        let Some(expected) = expected.get(&tensor.name) else {
            failures.push(format!("unexpected tensor `{}`", tensor.name));
            continue;
        };
        let found = json!([
            tensor.dims,
            tensor.ty.to_string(),
            sha256(ours.tensor_bytes(tensor))
        ]);
        let same_head = expected[0] == found[0] && expected[1] == found[1];
        let may_differ = ACCEPTED
            .iter()
            .any(|a| a.file == file && a.tensor == tensor.name);
        if !same_head || (expected[2] != found[2] && !may_differ) {
            failures.push(format!(
                "tensor `{}`: expected {expected}, found {found}",
                tensor.name
            ));
        }
    }
    let missing = expected
        .keys()
        .filter(|name| !tensors.iter().any(|t| t.name == **name));
    failures.extend(missing.map(|name| format!("tensor `{name}` is missing")));
    let order: Vec<_> = tensors.iter().map(|t| t.name.as_str()).collect();
    if failures.is_empty() && !order.iter().eq(expected.keys()) {
        failures.push(format!("tensors in another order: {order:?}"));
    }
    failures
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A value as the digest has it; long ones as the hash of what GGUF stores.
fn plain(value: &Value) -> Json {
    match value {
        Value::U32(v) => json!(["uint32", v]),
        Value::I32(v) => json!(["int32", v]),
        Value::F32(v) => json!(["float32", f64::from(*v)]),
        Value::Bool(v) => json!(["bool", v]),
        Value::String(v) if v.chars().count() > LONG => {
            json!(["string", hashed(v.len(), v.as_bytes())])
        }
        Value::String(v) => json!(["string", v]),
        Value::Array(Array::String(v)) => {
            let stored = v
                .iter()
                .flat_map(|s| [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat());
            array("array string", v.len(), json!(v), stored.collect())
        }
        Value::Array(Array::I32(v)) => {
            let stored = v.iter().flat_map(|item| item.to_le_bytes());
            array("array int32", v.len(), json!(v), stored.collect())
        }
        other => json!(["unexpected type", format!("{other:?}")]),
    }
}

fn array(kind: &str, length: usize, items: Json, stored: Vec<u8>) -> Json {
    // The digest's writer puts a space behind every comma.
    let spaces = length.saturating_sub(1);
    let is_long = items.to_string().len() + spaces > LONG;
    json!([
        kind,
        if is_long {
            hashed(length, &stored)
        } else {
            items
        }
    ])
}

fn hashed(length: usize, stored: &[u8]) -> Json {
    json!({ "length": length, "sha256": sha256(stored) })
}
