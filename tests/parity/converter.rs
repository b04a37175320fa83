//! The stock converter and llama-quantize write the same bytes and keys, by digests of their files.

use std::collections::BTreeMap;
use std::path::Path;

use nemoconv::formats::gguf::{Array, Gguf, Value};
use nemoconv_fixtures::checkpoint::cases;
use nemoconv_fixtures::{models, reference};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::tempdir;

use crate::support::to_gguf;

/// What `fixtures/reference/converter/make.py` wrote of one file.
#[derive(Deserialize)]
struct Expected {
    /// Type as the gguf package names it, value as JSON or its sha256.
    metadata: BTreeMap<String, (String, String)>,
    /// Dimensions, type, first half of the sha256 of the bytes.
    tensors: BTreeMap<String, (Vec<u64>, String, String)>,
}

type Digests = BTreeMap<String, BTreeMap<String, Expected>>;

/// The types whose bytes may differ from ggml's, because the search is our own. Q4_0 files have one such tensor,
/// `output.weight` in Q6_K; its error is held against llama-quantize's in `quantization_error`.
const SEARCHED: [&str; 1] = ["Q6_K"];

/// Tensors that the converter stores otherwise, by model and ending of the name.
const OTHERWISE: [(&str, &str, &str); 2] = [
    (
        "f16-source",
        ".ssm_a",
        "-exp(A_log) in half precision when the checkpoint is F16; ours is in F32 always",
    ),
    (
        "latent-mtp",
        "blk.5.ffn_gate_inp.weight",
        "the router of the multi-token-prediction block in the out type, since the rule that keeps routers in F32 \
         looks for it under its old block number; ours is F32 like every router",
    ),
];

fn digests(file: &str) -> Digests {
    let text = std::fs::read_to_string(reference().join("converter").join(file)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Type and value as the script spells them.
fn spelled(value: &Value) -> (String, serde_json::Value) {
    let scalar = |name: &str, value| (name.to_string(), value);
    match value {
        Value::U32(v) => scalar("UINT32", json!(v)),
        Value::I32(v) => scalar("INT32", json!(v)),
        Value::F32(v) => scalar("FLOAT32", json!(f64::from(*v))),
        Value::Bool(v) => scalar("BOOL", json!(v)),
        Value::String(v) => scalar("STRING", json!(v)),
        Value::Array(Array::I32(v)) => scalar("ARRAY/INT32", json!(v)),
        Value::Array(Array::String(v)) => scalar("ARRAY/STRING", json!(v)),
        other => panic!("the converter writes no {other:?}"),
    }
}

/// Whether the script's text says the same value.
fn same_value(ours: &serde_json::Value, theirs: &str) -> bool {
    match theirs.strip_prefix("sha256:") {
        Some(digest) => sha256(python_json(ours).as_bytes()) == digest,
        None => {
            let theirs: serde_json::Value = serde_json::from_str(theirs).unwrap();
            // Numbers may be spelled in two ways.
            theirs == *ours || (theirs.is_number() && theirs.as_f64() == ours.as_f64())
        }
    }
}

/// JSON with Python's separators.
fn python_json(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Array(items) => {
            format!(
                "[{}]",
                items
                    .iter()
                    .map(|item| item.to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            )
        }
        other => other.to_string(),
    }
}

fn check(model: &Path, name: &str, flags: &[&str], expected: &Expected) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut words = name.split(' ');
    let file_type = words.next().unwrap();
    let pure: &[&str] = if words.next() == Some("pure") {
        &["--pure"]
    } else {
        &[]
    };
    to_gguf(model, &path, &[&["-t", file_type], pure, flags].concat());
    let gguf = Gguf::open(&path).unwrap();
    let context = format!("{} {name}", model.display());

    let ours: BTreeMap<_, _> = gguf.header().metadata.iter().collect();
    assert!(
        ours.keys()
            .copied()
            .eq(expected.metadata.keys().map(String::as_str)),
        "{context}: {:?}",
        ours.keys()
    );
    for (key, (ty, value)) in &expected.metadata {
        let (our_type, our_value) = spelled(ours[key.as_str()]);
        assert_eq!(our_type, *ty, "{context} {key}");
        assert!(
            same_value(&our_value, value),
            "{context} {key}: {our_value} is not {value}"
        );
    }

    assert_eq!(
        gguf.header().tensors.len(),
        expected.tensors.len(),
        "{context}"
    );
    for tensor in &gguf.header().tensors {
        let (dims, ty, digest) = &expected.tensors[&tensor.name];
        let trimmed = |dims: &[u64]| {
            dims.iter()
                .rev()
                .skip_while(|dim| **dim == 1)
                .copied()
                .collect::<Vec<_>>()
        };
        assert_eq!(
            trimmed(&tensor.dims),
            trimmed(dims),
            "{context} {}",
            tensor.name
        );
        let otherwise = OTHERWISE
            .iter()
            .any(|(of, ending, _)| model.ends_with(of) && tensor.name.ends_with(ending));
        if otherwise {
            assert_eq!(tensor.ty.name(), "F32", "{context} {}", tensor.name);
            continue;
        }
        assert_eq!(tensor.ty.name(), ty, "{context} {}", tensor.name);
        if !SEARCHED.contains(&ty.as_str()) {
            let ours = sha256(gguf.tensor_bytes(tensor));
            assert_eq!(
                ours[..32],
                *digest,
                "{context} {}: other bytes",
                tensor.name
            );
        }
    }
}

#[test]
fn the_same_bytes_and_keys() {
    let digests = digests("digests.json");
    for model in models() {
        let name = model.file_name().unwrap().to_str().unwrap();
        for (file, expected) in &digests[name] {
            check(&model, file, &[], expected);
        }
    }
}

/// Latent experts, multi-token prediction, biases, FP8, tied embeddings, widths that no block divides.
#[test]
fn the_same_bytes_and_keys_of_random_checkpoints() {
    let digests = digests("random.json");
    let folder = tempdir().unwrap();
    for case in cases() {
        let model = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        for (file, expected) in &digests[case.name] {
            check(&model, file, &["--allow-fallback"], expected);
        }
    }
}
