//! Packed folders beside those of llm-compressor 0.14 (compressed-tensors 0.19), byte for byte.
//!
//! Needs the folder of published outputs, `gold/`, in `NEMOCONV_SHARED`.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::tempdir;

use crate::support::{nemoconv, stderr};

fn gold() -> Option<PathBuf> {
    let shared = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from);
    if shared.is_none() {
        println!("skipped: NEMOCONV_SHARED names no folder");
    }
    shared.map(|shared| shared.join("gold"))
}

fn quantization_config(folder: &Path) -> Value {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config.replace("Infinity", "1e30")).unwrap();
    config["quantization_config"].clone()
}

#[test]
fn every_folder_is_theirs_when_we_round_as_they_do() {
    let Some(gold) = gold() else { return };
    let check = |source: &str, expected: &str, flags: &[&str]| {
        let out = tempdir().unwrap();
        let ours = out.path().join("packed");
        let model = gold.join(format!("compressed-tensors-source-{source}"));
        let fixed = [
            "to-safetensors",
            model.to_str().unwrap(),
            "-q",
            "-o",
            ours.to_str().unwrap(),
        ];
        let rounding = ["--rounding", "llmcompressor"];
        let output = nemoconv(fixed.iter().chain(&rounding).chain(flags));
        assert!(output.status.success(), "{}", stderr(&output));
        let theirs = gold.join(format!("compressed-tensors-{expected}"));
        let shard = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(
            shard(&ours) == shard(&theirs),
            "{expected}: the shards differ"
        );
        assert_eq!(
            quantization_config(&ours),
            quantization_config(&theirs),
            "{expected}"
        );
    };
    check(
        "dense",
        "w4a16-g128",
        &["--scheme", "w4a16", "--group-size", "128"],
    );
    check("dense", "w4a16-g128-asym", &["--scheme", "w4a16-asym"]);
    check("dense", "w8a8-int8-rtn", &["--scheme", "w8a8"]);
    check("dense", "w4a8-int", &["--scheme", "w4a8"]);
    let mixed = [
        "--linear",
        "in_proj|out_proj=w8a8",
        "--linear",
        "up_proj|down_proj=w4a16",
        "--linear",
        ".=keep",
        "--group-size",
        "64",
    ];
    check("dense", "mixed-w8a8-w4a16g64", &mixed);
    check("moe", "moe-w4a16-g128", &["--scheme", "w4a16"]);
    check(
        "moe",
        "moe-w8a8-int8",
        &["--scheme", "w8a8", "--readers", "vllm"],
    );
}
