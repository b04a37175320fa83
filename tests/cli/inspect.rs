//! `inspect` on everything it reads, and the first screen of the help.

use nemoconv_fixtures::{nano, reference};
use tempfile::tempdir;

use crate::support::{nemoconv, stderr, to_gguf};

fn inspect(path: &std::path::Path, json: bool) -> String {
    let mut args = vec!["inspect", path.to_str().unwrap()];
    args.extend(json.then_some("--json"));
    let output = nemoconv(args);
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_gguf_file_shows_keys_tensors_and_bits_per_weight() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    to_gguf(&nano(), &path, &["-t", "q4_k_m"]);
    insta::assert_snapshot!("inspect_gguf", inspect(&path, false));
    let json: serde_json::Value = serde_json::from_str(&inspect(&path, true)).unwrap();
    assert_eq!(json["metadata"]["nemotron_h.block_count"], 5);
    assert_eq!(json["tensors"].as_array().unwrap().len(), 32);
    assert_eq!(
        json["metadata"]["tokenizer.ggml.tokens"]
            .as_array()
            .unwrap()
            .len(),
        1024
    );
}

#[test]
fn checkpoints_and_importance_matrices_are_read_too() {
    let json: serde_json::Value = serde_json::from_str(&inspect(&nano(), true)).unwrap();
    assert_eq!(json["tensors"].as_array().unwrap().len(), 32);
    assert!(inspect(&nano().join("model.safetensors"), false).contains("BF16"));
    let imatrix = reference().join("quantization_error/nemotron-h-nano.imatrix.gguf");
    assert!(inspect(&imatrix, false).contains("blk.0.ssm_in.weight"));
}

#[test]
fn the_help_fits_its_readers() {
    let help = |args: &[&str]| String::from_utf8(nemoconv(args).stdout).unwrap();
    insta::assert_snapshot!("help", help(&["--help"]));
    insta::assert_snapshot!("help_to_gguf", help(&["to-gguf", "--help"]));
    insta::assert_snapshot!("help_to_safetensors", help(&["to-safetensors", "--help"]));
}
