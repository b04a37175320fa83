//! The libraries that packed folders are written for load ours, hold our weights and compute what we compute.
//!
//! Needs a Python with `transformers` and `compressed-tensors`, named by `NEMOCONV_PACKED_PYTHON` (`gptqmodel` for GPTQ's
//! layout); `NEMOCONV_REQUIRE_PACKED=1` makes its absence a failure.
//!
//! The libraries give decoded weights the dtype of their scales, BF16; our forward keeps F32. So the logits are compared
//! with scales in F32 first, where both decode exactly: weight-only schemes then differ by the order of sums alone. With
//! scales as they are stored, every weight must be ours rounded to BF16, and the divergence is what that rounding costs.
//! Inputs of 8 bits per token are scaled by max / 127 here, as in vLLM's kernels, and by max / 127.5 in compressed-tensors:
//! their rounding errors are unrelated. So the comparison is made once more with its scale replaced.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use half::bf16;
use nemoconv::artifact::StoredModel;
use nemoconv::backend::cpu::Residence;
use nemoconv::forward::network::Sequence;
use nemoconv::forward::numerics::{Numerics, TimeStepRule};
use nemoconv::forward::observer::Silent;
use nemoconv::model::nemotron_h::{ValueRule, canonical_name, expected_tensors};
use nemoconv_fixtures::{data, nano};
use serde::Deserialize;
use serde_json::json;
use tempfile::tempdir;

use super::forward::open;
use crate::support::{Tensors, nemoconv, read_tensors, stderr};

/// Mean KL divergence of weight-only schemes, nats.
const WEIGHT_ONLY_KL: f64 = 1e-5;
/// Where both sides decode to F32 and take inputs as they are: the order of sums.
const EXACT_KL: f64 = 1e-9;
/// Where both scale inputs of 8 bits alike, but the order of sums moves some code by one. Noise of 2^-23 in the embedding
/// does as much to transformers itself: 5e-6, 1.7e-4 at one position.
const MOVED_CODE_KL: f64 = 1e-5;
/// With inputs of 8 bits.
const INT8_INPUTS_KL: f64 = 1e-3;

#[derive(Deserialize)]
struct Answer {
    file: Option<PathBuf>,
    skipped: Option<String>,
}

/// The interpreter, or `None` with a line that says why the test does nothing.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("NEMOCONV_PACKED_PYTHON").map(PathBuf::from);
    if python.is_none() {
        assert!(
            std::env::var_os("NEMOCONV_REQUIRE_PACKED").is_none(),
            "NEMOCONV_PACKED_PYTHON is not set"
        );
        println!("skipped: NEMOCONV_PACKED_PYTHON names no Python with compressed-tensors");
    }
    python
}

/// What the libraries make of each folder.
fn ask(python: &Path, folders: &[PathBuf], tokens: &[u32], out: &Path) -> Vec<Answer> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/packed_runtime.py");
    let request = json!({ "folders": folders, "tokens": tokens, "out": out });
    let mut child = Command::new(python)
        .arg(script)
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the interpreter starts");
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(request.to_string().as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Answer> = lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        answers.len(),
        folders.len(),
        "{:?} was refused: {said}",
        folders.get(answers.len())
    );
    answers
}

fn pack(model: &Path, to: PathBuf, flags: &[&str]) -> PathBuf {
    let fixed = [
        "to-safetensors",
        model.to_str().unwrap(),
        "-q",
        "-o",
        to.to_str().unwrap(),
    ];
    let output = nemoconv(fixed.iter().chain(flags));
    assert!(output.status.success(), "{}", stderr(&output));
    to
}

/// A text of a published reference.
fn tokens(model: &Path) -> Vec<u32> {
    let outputs = read_tensors(&model.join("reference/outputs.safetensors"));
    let (ids, _) = outputs["p200.input_ids"].2.as_chunks();
    ids.iter().map(|id| u32::from_le_bytes(*id)).collect()
}

/// Our logits `[tokens][vocab]`, the time step bounded as transformers does.
fn ours(folder: &Path, tokens: &[u32]) -> Vec<f32> {
    let stored = StoredModel::open(folder.to_str().unwrap()).unwrap();
    let numerics = Numerics {
        time_step: TimeStepRule::Minimum,
        ..Numerics::of_target(&stored)
    };
    let network = open(folder, Residence::Mapped, &numerics);
    let mut state = network.empty_state().unwrap();
    let mut batch = [Sequence {
        tokens,
        state: &mut state,
    }];
    let normed = network.run(&mut batch, &mut Silent).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    network.logits(&normed, &rows, &mut Silent).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks();
    values
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    let log_sum = sum.ln() + max;
    logits.iter().map(|x| f64::from(*x) - log_sum).collect()
}

/// KL divergence at every position.
fn divergences(p: &[f32], q: &[f32], vocab: usize) -> Vec<f64> {
    let rows = p.chunks_exact(vocab).zip(q.chunks_exact(vocab));
    let divergences = rows.map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
    });
    divergences.collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Every linear that they decoded is ours bit for bit; experts may be ours rounded to BF16. Gives how many there were.
fn compare_weights(folder: &Path, theirs: &Tensors) -> usize {
    let stored = StoredModel::open(folder.to_str().unwrap()).unwrap();
    let expected = expected_tensors(stored.config(), false);
    let head_dim = stored.config().head_dim;
    let mut compared = 0;
    for (name, (_, shape, bytes)) in theirs.iter().filter(|(name, _)| name.ends_with(".weight")) {
        let source = canonical_name(name);
        let place = expected.iter().find_map(|tensor| {
            let matrix = tensor.sources.iter().position(|name| *name == source)?;
            Some((tensor.rule.value, stored.tensor(&tensor.name)?, matrix))
        });
        let (value, tensor, matrix) =
            place.unwrap_or_else(|| panic!("{name} is no tensor of ours"));
        assert_eq!(*shape, [tensor.rows, tensor.columns], "{name}");
        let mut ours = vec![0.0; tensor.rows * tensor.columns];
        stored
            .dequantize_rows(tensor, matrix, 0, &mut Vec::new(), &mut ours)
            .unwrap();
        let rounds = tensor.matrices > 1;
        let theirs = floats(bytes);
        for (row, theirs) in theirs.chunks_exact(tensor.columns).enumerate() {
            let row = row_of(value, row, head_dim);
            let ours = &ours[row * tensor.columns..][..tensor.columns];
            for (ours, theirs) in ours.iter().zip(theirs) {
                let rounded = bf16::from_f32(*ours).to_f32();
                assert!(
                    ours == theirs || rounds && rounded == *theirs,
                    "{name}: {ours} is {theirs} to them"
                );
            }
        }
        compared += 1;
    }
    compared
}

/// Where we hold a row of the checkpoint: those of query and key heads are interleaved as llama.cpp has them.
fn row_of(value: ValueRule, row: usize, head_dim: usize) -> usize {
    match value {
        ValueRule::InterleaveQueryHeads | ValueRule::InterleaveKeyHeads => {
            let (head, within) = (row / head_dim, row % head_dim);
            let (half, place) = (within / (head_dim / 2), within % (head_dim / 2));
            head * head_dim + 2 * place + half
        }
        ValueRule::Copy | ValueRule::NegExp => row,
    }
}

/// Packs a model by each of `schemes` and has both sides run the folders.
fn check(model: &Path, linears: usize, schemes: &[(&str, &[&str])]) {
    let Some(python) = python() else { return };
    let place = tempdir().unwrap();
    let pack = |(name, flags): &(&str, &[&str])| pack(model, place.path().join(name), flags);
    let folders: Vec<PathBuf> = schemes.iter().map(pack).collect();
    let tokens = tokens(model);
    let answers = ask(&python, &folders, &tokens, place.path());
    for (folder, answer) in folders.iter().zip(answers) {
        let name = folder.file_name().unwrap().to_string_lossy();
        let Some(file) = answer.file else {
            println!("skipped: {name}: {}", answer.skipped.unwrap());
            continue;
        };
        let theirs = read_tensors(&file);
        assert!(compare_weights(folder, &theirs) >= linears, "{name}");
        if !theirs.contains_key("logits.exact") {
            println!("{name}: every weight is theirs");
            continue;
        }
        let ours = ours(folder, &tokens);
        let stored = StoredModel::open(folder.to_str().unwrap()).unwrap();
        let (vocab, has_experts) = (stored.config().vocab_size, stored.config().moe.is_some());
        let limit = match stored.declared_inputs().is_empty() {
            true => WEIGHT_ONLY_KL,
            false => INT8_INPUTS_KL,
        };
        let kl = |way: &str| divergences(&ours, &floats(&theirs[way].2), vocab);
        let alike = kl("logits.kernels");
        let (exact, kernels) = (mean(&kl("logits.exact")), mean(&alike));
        let dequantized = mean(&kl("logits.dequantized"));
        println!(
            "{name}: mean KL {exact:.1e}, scaled as kernels do {kernels:.1e}, decoded to BF16 {dequantized:.1e}"
        );
        assert!(
            exact < limit && kernels < limit && dequantized < limit,
            "{name}"
        );
        if !has_experts {
            let usual = median(&alike);
            assert!(
                usual < EXACT_KL,
                "{name}: {usual:e} at half of the positions"
            );
            let all = match limit == WEIGHT_ONLY_KL {
                true => EXACT_KL,
                false => MOVED_CODE_KL,
            };
            assert!(kernels < all, "{name}: {kernels:e}");
        }
        assert!(
            theirs["logits.plain"] == theirs["logits.dequantized"],
            "{name}: decoding by the first pass gives others"
        );
    }
}

#[test]
fn dense_folders_are_to_them_what_they_are_to_us() {
    let text = data().join("calibration.txt");
    let calibrated = [
        "--scheme",
        "w8a8-static",
        "--calibration",
        text.to_str().unwrap(),
        "--calibration-context",
        "64",
        "--calibration-sequences",
        "8",
    ];
    let feedback = [&["--scheme", "w4a16"], &calibrated[2..]].concat();
    check(
        &nano(),
        12,
        &[
            ("w4a16", &["--scheme", "w4a16"]),
            ("w4a16 calibrated", &feedback),
            ("w4a16-asym", &["--scheme", "w4a16-asym"]),
            ("w8a16", &["--scheme", "w8a16"]),
            ("w8a8", &["--phase", "1"]),
            ("w8a8-static", &calibrated),
            ("w4a8", &["--phase", "2"]),
            ("phase 3", &["--phase", "3"]),
        ],
    );
}

#[test]
fn folders_with_experts_are_to_them_what_they_are_to_us() {
    let Some(shared) = std::env::var_os("NEMOCONV_SHARED") else {
        println!("skipped: NEMOCONV_SHARED names no folder with a larger model");
        return;
    };
    check(
        &Path::new(&shared).join("models/nemotron-h-moe-tiny"),
        112,
        &[
            ("w4a16", &["--scheme", "w4a16"]),
            ("w8a16", &["--scheme", "w8a16"]),
            ("w4a16-asym, experts without", &["--scheme", "w4a16-asym"]),
            ("phase 1", &["--phase", "1"]),
            ("phase 3", &["--phase", "3"]),
        ],
    );
}

/// in_proj has 1288 rows, and GPTQ's kernels want multiples of 32.
#[test]
fn gptq_folders_hold_the_weights_that_gptqmodel_decodes() {
    let keep = ["--linear", "in_proj=keep", "--scheme"];
    let of = |scheme| [&keep[..], &[scheme]].concat();
    check(
        &nano(),
        10,
        &[("gptq-4", &of("gptq-4")), ("gptq-8", &of("gptq-8"))],
    );
}
