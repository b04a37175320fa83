//! Packed folders that llm-compressor wrote, run here and in the runtimes that they are written for. Needs
//! `NEMOCONV_SHARED`.

use std::path::{Path, PathBuf};

use nemoconv::backend::cpu::Residence;
use nemoconv::forward::network::Sequence;
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::observer::Silent;
use serde_json::Value;

use super::forward::open;

/// Mean difference of log-probabilities. The runtimes compute in BF16: on the source itself they differ from each other and
/// from us by about a hundredth, with inputs of 8 bits by up to three.
const TOLERANCE: f64 = 0.03;

/// Log-probability of each next token, with inputs taken as the folder declares.
fn log_probabilities(folder: &Path, tokens: &[u32]) -> Vec<f64> {
    let stored = nemoconv::artifact::StoredModel::open(folder.to_str().unwrap()).unwrap();
    let network = open(folder, Residence::Mapped, &Numerics::of_target(&stored));
    let mut state = network.empty_state().unwrap();
    let mut batch = [Sequence {
        tokens,
        state: &mut state,
    }];
    let normed = network.run(&mut batch, &mut Silent).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32 - 1).collect();
    let logits = network.logits(&normed, &rows, &mut Silent).unwrap();
    let vocabulary = network.config().vocab_size;
    let rows = logits.chunks_exact(vocabulary).zip(&tokens[1..]);
    rows.map(|(row, next)| {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        f64::from(row[*next as usize]) - sum.ln()
    })
    .collect()
}

#[test]
fn predictions_are_those_of_the_runtimes() {
    let Some(shared) = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from) else {
        println!("skipped: NEMOCONV_SHARED is not set");
        return;
    };
    let gold = shared.join("gold");
    let text = std::fs::read_to_string(gold.join("packed-expected-logprobs.json")).unwrap();
    let expected: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        let numbers = value.as_array().unwrap().iter();
        numbers.map(|number| number.as_f64().unwrap()).collect()
    };
    let tokens = numbers(&expected["_input_ids"]);
    let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
    for (name, runtimes) in expected.iter().filter(|(name, _)| *name != "_input_ids") {
        let folder = match name.starts_with("gptq") {
            true => gold.join(name),
            false => gold.join(format!("compressed-tensors-{name}")),
        };
        let ours = log_probabilities(&folder, &tokens);
        for (runtime, of_runtime) in runtimes.as_object().unwrap() {
            let theirs = numbers(&of_runtime["next_token_logprob"]);
            let differences = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
            let mean = differences.sum::<f64>() / theirs.len() as f64;
            println!("{name} {runtime}: {mean:.4}");
            assert!(mean < TOLERANCE, "{name} {runtime}: {mean}");
        }
    }
}
