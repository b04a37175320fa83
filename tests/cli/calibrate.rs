//! `calibrate` from outside: files, ledger, documents, errors, and `to-gguf` that goes on from its statistics.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nemoconv::calibrate::statistics::Statistics;
use nemoconv::formats::Imatrix;
use nemoconv_fixtures::checkpoint::{Experts, RandomCheckpoint};
use nemoconv_fixtures::nano;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::support::{copy_of, nemoconv, read_tensors, stderr, try_to_gguf, write_tensors};

fn calibrate(model: &Path, flags: &[&str]) -> Output {
    let fixed = ["-q", "calibrate", model.to_str().unwrap()];
    nemoconv([&fixed[..], flags].concat())
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn refused(output: &Output, code: i32, expected: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{message}");
    for part in expected {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
}

/// A folder with a text that is long enough for a few short sequences.
struct Scratch {
    folder: TempDir,
}

impl Scratch {
    fn new() -> Self {
        let folder = tempdir().unwrap();
        let text: String = (0..400)
            .map(|i| format!("word {} of the text. ", i % 37))
            .collect();
        std::fs::write(folder.path().join("text.txt"), text).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, content: &str) -> String {
        std::fs::write(self.path(name), content).unwrap();
        self.text(name)
    }

    /// Files that are there.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.unwrap().file_name().to_string_lossy().into_owned()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }
}

/// A document with the kinds of its values in their place; of arrays the first element.
fn shape(value: &Value) -> Value {
    match value {
        Value::Array(values) => json!(values.iter().take(1).map(shape).collect::<Vec<_>>()),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| (key.clone(), shape(value)))
            .collect(),
        Value::String(_) => json!("text"),
        Value::Number(_) => json!("number"),
        other => other.clone(),
    }
}

/// Few experts of which some see little.
fn with_experts(to: &Path) -> PathBuf {
    let checkpoint = RandomCheckpoint {
        pattern: "ME*".into(),
        hidden_size: 128,
        num_attention_heads: 4,
        head_dim: 32,
        mamba_num_heads: 4,
        ssm_state_size: 32,
        experts: Experts {
            n_routed_experts: 8,
            num_experts_per_tok: 2,
            moe_intermediate_size: 64,
            moe_shared_expert_intermediate_size: 128,
            moe_latent_size: None,
        },
        ..RandomCheckpoint::default()
    };
    let model = checkpoint.write_as(to, "experts").unwrap();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        std::fs::copy(nano().join(name), model.join(name)).unwrap();
    }
    model
}

#[test]
fn statistics_and_an_importance_matrix_appear() {
    let scratch = Scratch::new();
    let (text, out, imatrix) = (
        scratch.text("text.txt"),
        scratch.text("s.safetensors"),
        scratch.text("i.gguf"),
    );
    let flags = [
        "--text",
        &text,
        "--calibration-context",
        "64",
        "-o",
        &out,
        "--imatrix",
        &imatrix,
    ];
    let shown = succeeded(&calibrate(&nano(), &flags));
    assert!(
        shown.contains(" sequences, sha256 ") && shown.ends_with(&format!("{out}\n{imatrix}\n")),
        "{shown}"
    );
    let (statistics, origin) = Statistics::open(&scratch.path("s.safetensors")).unwrap();
    assert_eq!(origin.context_tokens, 64);
    assert_eq!(statistics.residual.len(), 6);
    assert!(statistics.inputs.contains_key("output.weight"));
    let read = Imatrix::open(&scratch.path("i.gguf")).unwrap();
    assert_eq!(u64::from(read.chunk_count), origin.sequences);
    assert_eq!(read.datasets, [text.as_str()]);
    let names: Vec<_> = read.entries().map(|(name, _)| name).collect();
    assert!(names.contains(&"blk.0.ssm_in.weight") && !names.contains(&"output.weight"));
    let again = scratch.text("again.safetensors");
    let flags = [
        "--text",
        &text,
        "--calibration-context",
        "64",
        "-o",
        &again,
        "--threads",
        "1",
    ];
    succeeded(&calibrate(&nano(), &flags));
    assert!(std::fs::read(&again).unwrap() == std::fs::read(&out).unwrap());
}

#[test]
fn experts_are_listed() {
    let scratch = Scratch::new();
    let model = with_experts(scratch.folder.path());
    let (text, imatrix) = (scratch.text("text.txt"), scratch.text("i.gguf"));
    let flags = [
        "--text",
        &text,
        "--calibration-context",
        "32",
        "--calibration-sequences",
        "3",
        "--imatrix",
        &imatrix,
    ];
    let table = succeeded(&calibrate(&model, &flags));
    assert!(table.contains("block  expert  tokens"), "{table}");
    assert!(table.contains("second moments shrunk"), "{table}");
    let document: Value = serde_json::from_str(&succeeded(&calibrate(
        &model,
        &[&flags[..], &["--json"]].concat(),
    )))
    .unwrap();
    let experts = document["experts"].as_array().unwrap();
    assert_eq!(experts.len(), 8);
    let tokens: u64 = experts
        .iter()
        .map(|expert| expert["tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(tokens, 2 * document["samples"]["tokens"].as_u64().unwrap());
    insta::assert_snapshot!("calibrate_json", format!("{:#}", shape(&document)));
}

#[test]
fn documents_and_conversations_are_read() {
    let scratch = Scratch::new();
    let rows = "{\"text\": \"one document\"}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"a question\"}]}\n";
    let dataset = scratch.write("d.jsonl", rows);
    let out = scratch.text("s.safetensors");
    let flags = ["--dataset", &dataset, "-o", &out, "--json"];
    let hint = ["d.jsonl", "line 3: the model has no chat template", "hint"];
    refused(&calibrate(&nano(), &flags), 1, &hint);
    let model = copy_of(&nano(), scratch.folder.path());
    let path = model.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["chat_template"] =
        json!("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}");
    std::fs::write(&path, config.to_string()).unwrap();
    let document: Value = serde_json::from_str(&succeeded(&calibrate(&model, &flags))).unwrap();
    assert_eq!(document["samples"]["sequences"], 1);
    // The same file serves a conversion.
    let gguf = scratch.path("m.gguf");
    let flags = [
        "-t",
        "q4_0",
        "--calibration",
        &dataset,
        "--statistics",
        &out,
        "--passes",
        "0",
    ];
    let output = try_to_gguf(&model, &gguf, &flags);
    assert!(output.status.success(), "{}", stderr(&output));
    let receipt = std::fs::read_to_string(scratch.path("m.receipt.json")).unwrap();
    let receipt: Value = serde_json::from_str(&receipt).unwrap();
    assert_eq!(
        receipt["calibration"]["statistics_sha256"],
        document["files"][0]["sha256"]
    );
    assert_eq!(
        receipt["calibration"]["samples_sha256"],
        document["samples"]["sha256"]
    );
}

#[test]
fn given_statistics_change_no_byte_and_must_belong_to_model_and_samples() {
    let scratch = Scratch::new();
    let (text, out) = (scratch.text("text.txt"), scratch.text("s.safetensors"));
    succeeded(&calibrate(
        &nano(),
        &["--text", &text, "--calibration-context", "64", "-o", &out],
    ));
    let convert = |model: &Path, name: &str, flags: &[&str]| {
        let fixed = [
            "-t",
            "q4_0",
            "--calibration",
            &text,
            "--calibration-context",
        ];
        let path = scratch.path(name);
        (
            try_to_gguf(model, &path, &[&fixed[..], flags].concat()),
            path,
        )
    };
    let (plain, a) = convert(&nano(), "a.gguf", &["64", "--passes", "0"]);
    let (given, b) = convert(
        &nano(),
        "b.gguf",
        &["64", "--passes", "0", "--statistics", &out],
    );
    assert!(
        plain.status.success() && given.status.success(),
        "{}",
        stderr(&given)
    );
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
    let (other, _) = convert(&nano(), "c.gguf", &["32", "--statistics", &out]);
    refused(&other, 1, &["of other samples", "at most 64 tokens"]);
    let model = copy_of(&nano(), scratch.folder.path());
    let path = model.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    let (_, _, bytes) = tensors
        .get_mut("backbone.layers.0.mixer.in_proj.weight")
        .unwrap();
    bytes[0] ^= 1;
    write_tensors(&path, &tensors);
    let (other, _) = convert(&model, "d.gguf", &["64", "--statistics", &out]);
    refused(&other, 1, &["of another model"]);
    let broken = scratch.write("broken.safetensors", "no statistics");
    let (other, _) = convert(&nano(), "e.gguf", &["64", "--statistics", &broken]);
    refused(&other, 1, &["broken.safetensors"]);
    let weights = nano().join("model.safetensors");
    let (other, _) = convert(
        &nano(),
        "f.gguf",
        &["64", "--statistics", weights.to_str().unwrap()],
    );
    refused(
        &other,
        1,
        &[
            "must be `nemoconv.statistics`, found `pt`",
            "nemoconv calibrate",
        ],
    );
    assert!(
        !scratch
            .names()
            .iter()
            .any(|name| name.ends_with(".partial"))
    );
}

#[test]
fn faults_are_explained_and_leave_nothing() {
    let scratch = Scratch::new();
    let text = scratch.text("text.txt");
    let out = scratch.text("s.safetensors");
    let empty = scratch.write("empty.txt", "");
    let short = scratch.write("short.txt", "a few words");
    let run = |model: &Path, flags: &[&str]| calibrate(model, &[flags, &["-o", &out]].concat());
    refused(
        &run(&nano(), &["--text", &empty]),
        1,
        &["the calibration text is empty", "empty.txt"],
    );
    let expected = [
        "one sequence needs 512",
        "short.txt",
        "--calibration-context",
    ];
    refused(&run(&nano(), &["--text", &short]), 1, &expected);
    refused(
        &run(&nano(), &["--text", "/nowhere.txt"]),
        1,
        &["/nowhere.txt"],
    );
    refused(&run(&nano(), &[]), 64, &["--text"]);
    refused(
        &run(&nano(), &["--text", &text, "--dataset", &text]),
        64,
        &["--dataset"],
    );
    let elsewhere = ["--text", &text, "-o", "/nowhere/s.safetensors"];
    refused(&calibrate(&nano(), &elsewhere), 1, &["output folder"]);
    let before = scratch.names();
    let model = copy_of(&nano(), scratch.folder.path());
    let path = model.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    let (_, _, bytes) = tensors
        .get_mut("backbone.layers.2.mixer.in_proj.weight")
        .unwrap();
    bytes[..2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
    write_tensors(&path, &tensors);
    let small = ["--text", &text, "--calibration-context", "64"];
    let expected = ["blk.2.ssm_in.weight", "not finite", "model.safetensors"];
    refused(&run(&model, &small), 1, &expected);
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    refused(&run(&model, &small), 1, &["there is no tokenizer.json"]);
    std::fs::remove_dir_all(model).unwrap();
    assert_eq!(scratch.names(), before);
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let scratch = Scratch::new();
    let long: String = (0..200_000).map(|i| format!("word {i} ")).collect();
    let text = scratch.write("long.txt", &long);
    let out = scratch.text("s.safetensors");
    let before = scratch.names();
    let mut child = Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .args([
            "calibrate",
            nano().to_str().unwrap(),
            "--text",
            &text,
            "-o",
            &out,
        ])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The temporary file is made when the samples are read and the work begins.
    while scratch.names() == before && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let id = child.id().to_string();
    Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(scratch.names(), before);
}
