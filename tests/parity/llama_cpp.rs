//! An unmodified llama.cpp loads what we write and computes what the reference computes.
//!
//! Needs a Python with the `xllamacpp` wheel, named by `NEMOCONV_PYTHON`; `NEMOCONV_REQUIRE_LLAMA=1` makes
//! its absence a failure.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::cpu::{Cpu, Residence};
use nemoconv::formats::gguf::Gguf;
use nemoconv::forward::network::{Network, Sequence};
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::observer::Silent;
use nemoconv_fixtures::checkpoint::cases;
use nemoconv_fixtures::{models, nano};
use serde::Deserialize;
use serde_json::json;
use tempfile::{TempDir, tempdir};

use crate::support::{Tensors, copy_of, edit_config, read_tensors, to_gguf, write_tensors};

/// Largest difference of log-probabilities, as a share of the reference's range.
const LOGIT_TOLERANCE: f64 = 1e-3;
/// Mean KL divergence of two F32 files of the same function: rounding of the products alone.
const SAME_FUNCTION_KL: f64 = 1e-6;

/// Every type and mix that is written.
pub const TYPES: [&str; 23] = [
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q2_k_s", "q3_k_s",
    "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
    "mxfp4", "tq1_0", "tq2_0",
];

#[derive(Deserialize)]
struct Answer {
    logprobs: Vec<Vec<f64>>,
    generated: u32,
}

/// The interpreter, or `None` with a line that says why the test does nothing.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("NEMOCONV_PYTHON").map(PathBuf::from);
    if python.is_none() {
        assert!(
            std::env::var_os("NEMOCONV_REQUIRE_LLAMA").is_none(),
            "NEMOCONV_PYTHON is not set"
        );
        println!("skipped: NEMOCONV_PYTHON names no Python with xllamacpp");
    }
    python
}

/// Log-probabilities after each prompt, per file.
fn ask(python: &Path, files: &[PathBuf], prompts: &[Vec<i32>], vocab: usize) -> Vec<Answer> {
    ask_in_batches(python, files, prompts, vocab, 512)
}

/// The same, computing `ubatch` rows together: llama.cpp's sums then run in another order.
fn ask_in_batches(
    python: &Path,
    files: &[PathBuf],
    prompts: &[Vec<i32>],
    vocab: usize,
    ubatch: usize,
) -> Vec<Answer> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/llama_cpp.py");
    let request = json!({
        "files": files, "prompts": prompts, "vocab": vocab, "generate": 4, "ubatch": ubatch
    });
    let mut child = Command::new(python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the interpreter starts");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(request.to_string().as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    // The server may print lines of its own.
    let mut answers: Vec<Answer> = lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    // The server's probabilities sum to one within 1e-5 only, which a KL divergence would see.
    for row in answers.iter_mut().flat_map(|answer| &mut answer.logprobs) {
        *row = log_softmax(row);
    }
    assert_eq!(
        answers.len(),
        files.len(),
        "llama.cpp refused {:?}",
        files.get(answers.len())
    );
    answers
}

/// Prompts and reference logits `[rows][vocab]` of a model: prefixes that end at some of the last 16 positions.
fn reference(model: &Path) -> (Vec<Vec<i32>>, Vec<Vec<f64>>) {
    let outputs = read_tensors(&model.join("reference/outputs.safetensors"));
    let (mut prompts, mut rows) = (Vec::new(), Vec::new());
    for (name, positions) in [
        ("p64", [0, 5, 15]),
        ("p200", [3, 9, 15]),
        ("p512", [7, 11, 15]),
    ] {
        let ids = ids(&outputs, &format!("{name}.input_ids"));
        let (_, shape, bytes) = &outputs[&format!("{name}.logits_last16")];
        let logits: Vec<f64> = floats(bytes).into_iter().map(f64::from).collect();
        for position in positions {
            prompts.push(ids[..ids.len() - 15 + position].to_vec());
            rows.push(logits[position * shape[1]..][..shape[1]].to_vec());
        }
    }
    (prompts, rows)
}

fn ids(tensors: &Tensors, name: &str) -> Vec<i32> {
    tensors[name]
        .2
        .as_chunks()
        .0
        .iter()
        .map(|bytes| i32::from_le_bytes(*bytes))
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::MIN, f64::max);
    let log_sum = logits
        .iter()
        .map(|logit| (logit - max).exp())
        .sum::<f64>()
        .ln()
        + max;
    logits.iter().map(|logit| logit - log_sum).collect()
}

/// Largest difference of log-probabilities over the range of the reference's logits, over all rows.
fn relative_difference(answer: &Answer, reference: &[Vec<f64>]) -> f64 {
    let rows = answer.logprobs.iter().zip(reference).map(|(ours, logits)| {
        let range = logits.iter().copied().fold(f64::MIN, f64::max)
            - logits.iter().copied().fold(f64::MAX, f64::min);
        let worst = ours
            .iter()
            .zip(log_softmax(logits))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        worst / range
    });
    rows.fold(0.0, f64::max)
}

fn mean_kl(base: &Answer, other: &Answer) -> f64 {
    let row = |(p, q): (&Vec<f64>, &Vec<f64>)| {
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    };
    base.logprobs
        .iter()
        .zip(&other.logprobs)
        .map(row)
        .sum::<f64>()
        / base.logprobs.len() as f64
}

#[test]
fn f32_logits_are_the_references_widened_or_not() {
    let Some(python) = python() else { return };
    for model in models()
        .into_iter()
        .filter(|model| model.join("reference").is_dir())
    {
        let folder = tempdir().unwrap();
        let (prompts, logits) = reference(&model);
        let files =
            [("plain.gguf", &[][..]), ("widened.gguf", &["--widen"])].map(|(name, flags)| {
                let path = folder.path().join(name);
                to_gguf(&model, &path, &[&["-t", "f32"], flags].concat());
                path
            });
        for (answer, file) in ask(&python, &files, &prompts, logits[0].len())
            .iter()
            .zip(&files)
        {
            let difference = relative_difference(answer, &logits);
            println!("{} {}: {difference:.2e}", model.display(), file.display());
            assert!(
                difference <= LOGIT_TOLERANCE,
                "{}: {difference:e}",
                model.display()
            );
        }
    }
}

#[test]
fn every_type_loads_and_generates() {
    let Some(python) = python() else { return };
    for model in models() {
        let folder = tempdir().unwrap();
        let imatrix =
            nemoconv_fixtures::reference().join("quantization_error/nemotron-h-nano.imatrix.gguf");
        let mut files = Vec::new();
        for file_type in TYPES {
            let path = folder.path().join(format!("{file_type}.gguf"));
            to_gguf(&model, &path, &["-t", file_type]);
            files.push(path);
            if model == nano() {
                let path = folder.path().join(format!("{file_type}-imatrix.gguf"));
                to_gguf(
                    &model,
                    &path,
                    &["-t", file_type, "--imatrix", imatrix.to_str().unwrap()],
                );
                files.push(path);
            }
        }
        let vocab = if model == nano() { 1024 } else { 4096 };
        let prompts = [vec![1, 300, 301, 302, 303, 304, 305, 306]];
        for (answer, file) in ask(&python, &files, &prompts, vocab).iter().zip(&files) {
            assert!(
                answer.logprobs[0].iter().all(|logprob| logprob.is_finite()),
                "{}",
                file.display()
            );
            assert_eq!(answer.generated, 4, "{}", file.display());
        }
    }
}

/// Nano with widths that no super-block divides: the last rows or columns of every widened axis cut off.
fn narrow_nano() -> TempDir {
    let folder = tempdir().unwrap();
    let model = copy_of(&nano(), folder.path());
    let (hidden, intermediate) = (224, 480);
    edit_config(&model, |config| {
        config["hidden_size"] = json!(hidden);
        config["intermediate_size"] = json!(intermediate);
    });
    let path = model.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    for (name, (_, shape, bytes)) in &mut tensors {
        let up = name.contains("up_proj");
        let down = name.contains("down_proj");
        let writes = down || name.contains("out_proj") || name.contains("o_proj");
        let stream_norm = name.ends_with("norm_f.weight")
            || (name.ends_with(".norm.weight") && !name.contains("mixer"));
        let inner = ["conv1d", "A_log", ".D", "dt_bias", "mixer.norm"]
            .iter()
            .any(|part| name.contains(part));
        let (rows, columns) = match shape.as_slice() {
            _ if inner => continue,
            [_] if stream_norm => (hidden, 1),
            &[_, columns] if down => (hidden, intermediate.min(columns)),
            &[_, columns] if writes => (hidden, columns),
            _ if up => (intermediate, hidden),
            &[rows, _] => (rows, hidden),
            _ => continue,
        };
        let old_columns = shape.get(1).copied().unwrap_or(1);
        let cut = bytes
            .chunks(2 * old_columns)
            .take(rows)
            .flat_map(|row| row[..2 * columns].to_vec());
        *bytes = cut.collect();
        shape[0] = rows;
        if let Some(last) = shape.get_mut(1) {
            *last = columns;
        }
    }
    write_tensors(&path, &tensors);
    folder
}

#[test]
fn widening_keeps_the_function_and_makes_super_blocks_legal() {
    let Some(python) = python() else { return };
    let source = narrow_nano();
    let model = source.path().join("model");
    let folder = tempdir().unwrap();
    let convert = |name: &str, flags: &[&str]| {
        let path = folder.path().join(name);
        to_gguf(&model, &path, flags);
        path
    };
    let files = [
        convert("plain.gguf", &["-t", "f32"]),
        convert("widened.gguf", &["-t", "f32", "--widen"]),
        convert("q4_k_m.gguf", &["-t", "q4_k_m", "--widen"]),
    ];
    let (prompts, _) = reference(&nano());
    let answers = ask(&python, &files, &prompts, 1024);
    let kl = mean_kl(&answers[0], &answers[1]);
    println!("widened against plain: mean KL {kl:.2e}");
    assert!(kl.abs() < SAME_FUNCTION_KL, "{kl:e}");
    assert!(
        mean_kl(&answers[0], &answers[2]) < 0.2,
        "Q4_K_M of the widened model is another function"
    );
}

/// Experts with and without a latent space, multi-token prediction, biases, FP8, tied embeddings.
#[test]
fn random_checkpoints_load_and_keep_their_function_when_widened() {
    let Some(python) = python() else { return };
    let folder = tempdir().unwrap();
    for case in cases() {
        let model = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        let files = [
            ("plain", &["-t", "f32"][..]),
            ("widened", &["-t", "f32", "--widen", "--no-mtp"]),
            ("q8_0", &["-t", "q8_0", "--allow-fallback"]),
            ("q4_k_m", &["-t", "q4_k_m", "--allow-fallback"]),
        ]
        .map(|(name, flags)| {
            let path = folder.path().join(format!("{}-{name}.gguf", case.name));
            to_gguf(&model, &path, flags);
            path
        });
        let prompts = [(20..28).collect(), (300..340).rev().collect()];
        let answers = ask(&python, &files, &prompts, case.checkpoint.vocab_size);
        assert!(
            answers.iter().all(|answer| answer.generated == 4),
            "{}",
            case.name
        );
        let finite = |answer: &Answer| answer.logprobs.iter().flatten().all(|l| l.is_finite());
        assert!(answers.iter().all(finite), "{}", case.name);
        let difference = relative_difference(&answers[1], &answers[0].logprobs);
        println!("{} widened: {difference:.2e}", case.name);
        assert!(
            difference <= LOGIT_TOLERANCE,
            "{}: {difference:e}",
            case.name
        );
    }
}

/// Mean KL divergence of our logits from llama.cpp's on the same file.
const SAME_FILE_KL: f64 = 1e-4;
/// Where a program differs from itself by more: llama.cpp when it computes 3 rows at a time instead of 512, we as in
/// [`our_spread`]. A sum in another order moves some 8-bit activations by a step, and after a few layers the rounding
/// errors of two runs are unrelated.
const OWN_KL_FACTOR: f64 = 4.0;
/// Runs with other last bits.
const NUDGES: u64 = 4;

/// Our log-probabilities after each prompt, in llama.cpp's arithmetic.
fn ours(
    file: &Path,
    prompts: &[Vec<i32>],
    backend: fn(Arc<StoredModel>, Residence) -> Cpu,
) -> Answer {
    let model = Arc::new(StoredModel::open(file.to_str().unwrap()).unwrap());
    let backend = backend(Arc::clone(&model), Residence::Mapped);
    let network = Network::open(&model, backend, &Numerics::of_target(&model)).unwrap();
    let rows = prompts.iter().map(|prompt| {
        let tokens: Vec<u32> = prompt.iter().map(|id| *id as u32).collect();
        let mut state = network.empty_state().unwrap();
        let sequence = Sequence {
            tokens: &tokens,
            state: &mut state,
        };
        let normed = network.run(&mut [sequence], &mut Silent).unwrap();
        let last = tokens.len() as u32 - 1;
        let logits = network.logits(&normed, &[last], &mut Silent).unwrap();
        let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
        log_softmax(&logits)
    });
    Answer {
        logprobs: rows.collect(),
        generated: 0,
    }
}

/// How far our own answers lie apart where a program may round as it likes: without vector instructions, and with every
/// weight of the norms moved by its last bit.
fn our_spread(file: &Path, prompts: &[Vec<i32>], fast: &Answer) -> f64 {
    let portable = mean_kl(fast, &ours(file, prompts, Cpu::portable));
    let folder = tempdir().unwrap();
    let nudged = (0..NUDGES).map(|seed| {
        let path = folder.path().join("nudged.gguf");
        nudge_norms(file, seed, &path);
        mean_kl(fast, &ours(&path, prompts, Cpu::new))
    });
    nudged.fold(portable, f64::max)
}

/// A copy of a file with the last bit of every norm's weight moved up or down.
fn nudge_norms(file: &Path, seed: u64, to: &Path) {
    let gguf = Gguf::open(file).unwrap();
    let mut bytes = std::fs::read(file).unwrap();
    let mut state = seed;
    let header = gguf.header();
    let norms = header
        .tensors
        .iter()
        .filter(|tensor| tensor.name.ends_with("norm.weight"));
    for tensor in norms {
        let begin = (header.data_offset + tensor.offset) as usize;
        let (weights, _) = bytes[begin..begin + tensor.bytes() as usize].as_chunks_mut::<4>();
        for weight in weights {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let bits = u32::from_le_bytes(*weight);
            let moved = if state >> 63 == 1 { bits + 1 } else { bits - 1 };
            *weight = moved.to_le_bytes();
        }
    }
    std::fs::write(to, bytes).unwrap();
}

#[test]
fn our_logits_are_llama_cpps_on_every_type() {
    let Some(python) = python() else { return };
    for model in models()
        .into_iter()
        .filter(|model| model.join("reference").is_dir())
    {
        let folder = tempdir().unwrap();
        let files = TYPES.map(|file_type| {
            let path = folder.path().join(format!("{file_type}.gguf"));
            to_gguf(&model, &path, &["-t", file_type]);
            path
        });
        let (prompts, logits) = reference(&model);
        let answers = ask(&python, &files, &prompts, logits[0].len());
        let small = ask_in_batches(&python, &files, &prompts, logits[0].len(), 3);
        for ((theirs, file), again) in answers.iter().zip(&files).zip(&small) {
            let fast = ours(file, &prompts, Cpu::new);
            let kl = mean_kl(theirs, &fast);
            let own = mean_kl(theirs, again);
            let mut allowed = SAME_FILE_KL.max(OWN_KL_FACTOR * own);
            if kl > allowed {
                allowed = allowed.max(OWN_KL_FACTOR * our_spread(file, &prompts, &fast));
            }
            let name = file.display();
            println!("{name}: KL {kl:.2e}, llama.cpp's own {own:.2e}, allowed {allowed:.2e}");
            assert!(kl.abs() <= allowed, "{name}: {kl:e}, allowed {allowed:e}");
        }
    }
}
