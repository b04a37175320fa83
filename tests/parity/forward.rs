//! The forward pass beside transformers: reference logits, hidden states and argmaxes of every model there is.

use std::path::Path;
use std::sync::Arc;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::cpu::{Cpu, Residence};
use nemoconv::error::Result;
use nemoconv::forward::network::{Network, Sequence};
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::observer::Observer;
use safetensors::SafeTensors;
use serde_json::Value;

/// Largest difference of two logits, as a share of the range of the reference's.
const LOGIT_TOLERANCE: f32 = 2e-4;
/// Difference of a layer's RMS over all positions and channels, relative.
const RMS_TOLERANCE: f64 = 1e-4;

/// RMS of the residual stream before each block and after the last.
#[derive(Default)]
struct Rms(Vec<f64>);

impl Observer<Cpu> for Rms {
    fn residual(&mut self, _: usize, _: &Cpu, residual: &Vec<f32>, _: usize) -> Result<()> {
        self.0.push(rms(residual));
        Ok(())
    }
}

fn rms(values: &[f32]) -> f64 {
    let squares: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
    (squares / values.len() as f64).sqrt()
}

pub fn open(model: &Path, residence: Residence, numerics: &Numerics) -> Network<Cpu> {
    let stored = Arc::new(StoredModel::open(model.to_str().unwrap()).unwrap());
    let backend = Cpu::new(Arc::clone(&stored), residence);
    Network::open(&stored, backend, numerics).unwrap()
}

#[test]
fn logits_and_hidden_states_equal_the_reference() {
    for model in nemoconv_fixtures::models() {
        let reference = model.join("reference");
        if !reference.is_dir() {
            continue;
        }
        for residence in [Residence::Mapped, Residence::Streamed] {
            compare(&model, &reference, residence);
        }
    }
}

fn compare(model: &Path, reference: &Path, residence: Residence) {
    let network = open(model, residence, &Numerics::EXACT);
    let outputs = std::fs::read(reference.join("outputs.safetensors")).unwrap();
    let outputs = SafeTensors::deserialize(&outputs).unwrap();
    let json: Value =
        serde_json::from_slice(&std::fs::read(reference.join("reference.json")).unwrap()).unwrap();
    for prompt in ["p64", "p200", "p512"] {
        let name = model.file_name().unwrap().to_string_lossy();
        let tokens: Vec<u32> =
            numbers(&outputs, &format!("{prompt}.input_ids"), u32::from_le_bytes);
        let expected: Vec<f32> = numbers(
            &outputs,
            &format!("{prompt}.logits_last16"),
            f32::from_le_bytes,
        );
        let mut state = network.empty_state().unwrap();
        let mut seen = Rms::default();
        let mut batch = [Sequence {
            tokens: &tokens,
            state: &mut state,
        }];
        let normed = network.run(&mut batch, &mut seen).unwrap();
        seen.0.pop();
        seen.0.push(rms(&normed));
        check_layers(
            &format!("{name} {prompt}"),
            &seen.0,
            &json["hidden_state_rms"][prompt],
        );
        let rows: Vec<u32> = (tokens.len() as u32 - 16..tokens.len() as u32).collect();
        let found = network
            .logits(&normed, &rows, &mut nemoconv::forward::observer::Silent)
            .unwrap();
        let (low, high) = expected
            .iter()
            .fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
        let worst = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        let share = worst / (high - low);
        println!("{name} {prompt}: largest logit difference {share:.1e} of the range");
        assert!(share <= LOGIT_TOLERANCE, "{name} {prompt}: {share}");
    }
}

/// Names the first layer that is off.
fn check_layers(what: &str, found: &[f64], expected: &Value) {
    let expected: Vec<f64> = expected
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect();
    assert_eq!(found.len(), expected.len(), "{what}");
    for (layer, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (found / expected - 1.0).abs();
        assert!(
            error <= RMS_TOLERANCE,
            "{what}: entry {layer} is the first that is off: {found} {expected}"
        );
    }
}

fn numbers<T>(tensors: &SafeTensors, name: &str, decode: fn([u8; 4]) -> T) -> Vec<T> {
    let (words, _) = tensors.tensor(name).unwrap().data().as_chunks::<4>();
    words.iter().map(|word| decode(*word)).collect()
}

/// Tokens of the longest prompt.
fn prompt(model: &Path) -> Vec<u32> {
    let outputs = std::fs::read(model.join("reference/outputs.safetensors")).unwrap();
    numbers(
        &SafeTensors::deserialize(&outputs).unwrap(),
        "p200.input_ids",
        u32::from_le_bytes,
    )
}

fn logits_of(network: &Network<Cpu>, normed: &Vec<f32>) -> Vec<f32> {
    let rows: Vec<u32> = (0..(normed.len() / network.config().hidden_size) as u32).collect();
    network
        .logits(normed, &rows, &mut nemoconv::forward::observer::Silent)
        .unwrap()
}

/// Sums run in one order whatever the batch, so these are equalities, not tolerances.
#[test]
fn decode_forks_and_batches_equal_prefill() {
    let silent = &mut nemoconv::forward::observer::Silent;
    for model in nemoconv_fixtures::models()
        .into_iter()
        .filter(|m| m.join("reference").is_dir())
    {
        let network = open(&model, Residence::Mapped, &Numerics::EXACT);
        let tokens = prompt(&model);
        let mut state = network.empty_state().unwrap();
        let normed = network
            .run(
                &mut [Sequence {
                    tokens: &tokens,
                    state: &mut state,
                }],
                silent,
            )
            .unwrap();
        let whole = logits_of(&network, &normed);
        let vocabulary = network.config().vocab_size;

        let mut state = network.empty_state().unwrap();
        network
            .run(
                &mut [Sequence {
                    tokens: &tokens[..150],
                    state: &mut state,
                }],
                silent,
            )
            .unwrap();
        let mut fork = network.fork(&state).unwrap();
        let mut pieces = Vec::new();
        for token in &tokens[150..] {
            let one = [*token];
            let normed = network
                .run(
                    &mut [Sequence {
                        tokens: &one,
                        state: &mut state,
                    }],
                    silent,
                )
                .unwrap();
            pieces.extend(logits_of(&network, &normed));
        }
        assert_eq!(
            pieces,
            whole[150 * vocabulary..],
            "decode differs from prefill"
        );

        let mut other = network.empty_state().unwrap();
        let mut batch = [
            Sequence {
                tokens: &tokens[..77],
                state: &mut other,
            },
            Sequence {
                tokens: &tokens[150..],
                state: &mut fork,
            },
        ];
        let normed = network.run(&mut batch, silent).unwrap();
        let both = logits_of(&network, &normed);
        assert_eq!(
            both[..77 * vocabulary],
            whole[..77 * vocabulary],
            "a batch changes a sequence"
        );
        assert_eq!(
            both[77 * vocabulary..],
            whole[150 * vocabulary..],
            "a fork differs"
        );
        assert_eq!(fork.position, tokens.len());

        let mut state = network.empty_state().unwrap();
        let sequence = Sequence {
            tokens: &tokens,
            state: &mut state,
        };
        let rows = [3, 149];
        let wanted = network.run_wanted(&mut [sequence], &rows, silent).unwrap();
        let wanted = network.logits(&wanted, &[0, 1], silent).unwrap();
        let expected = rows.map(|row| &whole[row as usize * vocabulary..][..vocabulary]);
        assert_eq!(wanted, expected.concat(), "a row by itself differs");
    }
}
