//! Predictions on every device that is there, and on the emulator of CUDA: their drift and their scores are the CPU's, and no
//! row of logits leaves the device.

use std::path::Path;
use std::sync::Arc;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::cpu::Residence;
use nemoconv::backend::device::OpenDevice;
use nemoconv::backend::{Machine, Machines};
use nemoconv::forward::network::Network;
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::scoring::{Continuation, NetworkScorer, PrefixGroup, Scorer};
use nemoconv::report::LogitsDrift;
use nemoconv::rewrite::Rewrites;
use nemoconv::validate::logits::perplexity::ChunkedText;
use nemoconv::validate::side_by_side::side_by_side;
use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::Device;

use super::device::machines;
use crate::support::{copy_of, read_tensors, to_gguf, write_tensors};

/// Largest difference of a figure from the CPU's: relative where it is above 1, absolute below. Log-probabilities follow the
/// logits, which differ by 1e-6 of the largest.
const FIGURES: f64 = 2e-5;
/// Largest difference of a KL divergence, as a share of it.
const DIVERGENCE: f64 = 1e-3;
/// The same in nats, of networks that hardly differ.
const LEAST_DIVERGENCE: f64 = 1e-6;

/// The text's.
const CHUNKS: usize = 2;
const CONTEXT: usize = 48;

fn open(path: &Path, machines: &Machines) -> Network<Machine> {
    let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
    let all = machines.all(&model, Residence::Mapped);
    Network::open_on(&model, all, &Numerics::EXACT).unwrap()
}

fn text(vocabulary: usize) -> ChunkedText {
    let tokens = (0..CHUNKS * CONTEXT).map(|i| (i * 7919 % vocabulary) as u32);
    ChunkedText::new(tokens.collect(), CONTEXT, None, None).unwrap()
}

fn drift(
    reference: &Network<Machine>,
    artifact: &Network<Machine>,
) -> nemoconv::error::Result<LogitsDrift> {
    let text = text(reference.config().vocab_size);
    let none = Rewrites::none();
    let measured = side_by_side(reference, artifact, &none, &text, &|_, _| Ok(()))?;
    Ok(measured.logits)
}

fn check_figures(name: &str, found: &LogitsDrift, expected: &LogitsDrift) {
    let figures = |drift: &LogitsDrift| {
        [
            drift.perplexity.value,
            drift.perplexity_reference.value,
            drift.perplexity_ratio.value,
            drift.top1_agreement.value,
            drift.delta_p.mean.value,
            drift.delta_p.max,
            drift.correlation.unwrap(),
        ]
    };
    for (index, (found, expected)) in figures(found)
        .into_iter()
        .zip(figures(expected))
        .enumerate()
    {
        let distance = (found - expected).abs() / expected.abs().max(1.0);
        assert!(
            distance <= FIGURES,
            "{name}: figure {index} is {found}, expected {expected}"
        );
    }
    let kl = |drift: &LogitsDrift| [drift.kl_divergence.mean.value, drift.kl_divergence.max];
    for (found, expected) in kl(found).into_iter().zip(kl(expected)) {
        println!("{name}: KL divergence {found:.3e}, of the CPU {expected:.3e}");
        let allowed = (DIVERGENCE * expected).max(LEAST_DIVERGENCE);
        assert!(
            (found - expected).abs() <= allowed,
            "{name}: KL divergence {found}, expected {expected}"
        );
    }
    assert_eq!(found.positions, expected.positions, "{name}");
}

#[test]
fn drift_is_that_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let nano = vec![nemoconv_fixtures::nano()];
    for (mix, references) in [("q8_0", nano), ("q4_k_m", nemoconv_fixtures::models())] {
        for reference in references {
            let artifact = folder.path().join(format!("{mix}.gguf"));
            to_gguf(&reference, &artifact, &["-t", mix, "--allow-fallback"]);
            let drift_on = |machines: &Machines| {
                drift(&open(&reference, machines), &open(&artifact, machines)).unwrap()
            };
            let expected = drift_on(&Machines::Cpu);
            assert!(expected.kl_divergence.mean.value > 0.0);
            for (name, machines) in machines() {
                let name = format!("{name}, {}, {mix}", reference.display());
                check_figures(&name, &drift_on(&machines), &expected);
                let counts = machines.tallies()[0].counts();
                let compared = counts["kl_divergence"];
                assert!(compared.device > 0 && compared.host == 0, "{name}");
            }
        }
    }
}

fn emulator(order: Order) -> Machines {
    let device = Device::new(Box::new(Emulator::new(order)), None);
    Machines::Devices([Arc::new(OpenDevice::new(device))].into())
}

#[test]
fn networks_on_two_devices_are_compared_on_that_of_the_artifact() {
    let model = nemoconv_fixtures::nano();
    let machines = Order::ALL.map(emulator);
    let [reference, artifact, _] = &machines;
    let found = drift(&open(&model, reference), &open(&model, artifact)).unwrap();
    // The emulator computes the same in every order.
    assert_eq!(found.kl_divergence.max, 0.0);
    assert_eq!(found.top1_agreement.value, 1.0);
    let counted = |machines: &Machines| {
        let counts = machines.tallies()[0].counts();
        counts.get("kl_divergence").map_or(0, |count| count.device)
    };
    assert!(counted(reference) == 0 && counted(artifact) > 0);
}

/// A head with one weight that is no number.
fn damaged(folder: &Path) -> std::path::PathBuf {
    let model = copy_of(&nemoconv_fixtures::nano(), folder);
    let file = model.join("model.safetensors");
    let mut tensors = read_tensors(&file);
    let head = tensors.get_mut("lm_head.weight").unwrap();
    // The sign and the exponent of F32 and BF16 alike are the last two bytes.
    let last = head.2.len() - 2;
    head.2[last..].copy_from_slice(&[0xc0, 0x7f]);
    write_tensors(&file, &tensors);
    model
}

#[test]
fn what_is_not_a_number_is_named_as_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (nemoconv_fixtures::nano(), damaged(folder.path()));
    let outcomes = |machines: &Machines| {
        let [good, bad] = [&good, &bad].map(|path| open(path, machines));
        let error = drift(&bad, &good).unwrap_err().to_string();
        let counted = drift(&good, &bad).unwrap();
        let scorer = NetworkScorer::new(bad, 1000);
        let score = scorer.score(&groups(1)).unwrap_err().to_string();
        (
            error,
            counted.positions,
            counted.non_finite_positions,
            score,
        )
    };
    let expected = outcomes(&Machines::Cpu);
    assert!(expected.0.contains("the output head"), "{}", expected.0);
    assert!(expected.3.contains("the output head"), "{}", expected.3);
    assert_eq!(expected.1, 0);
    for (name, machines) in machines() {
        assert_eq!(outcomes(&machines), expected, "{name}");
    }
}

fn groups(count: u32) -> Vec<PrefixGroup> {
    let tokens = |seed: u32, len: u32| (0..len).map(|i| (seed * 31 + i * 7) % 900).collect();
    let continuation = |seed: u32, len: u32| Continuation {
        tokens: tokens(seed, len),
        targets: tokens(seed + 1, len + 1),
    };
    let group = |seed: u32| PrefixGroup {
        prefix: tokens(seed, 1 + seed % 9),
        continuations: (0..3).map(|i| continuation(seed + i, i * 2)).collect(),
    };
    (0..count).map(group).collect()
}

#[test]
fn scores_are_those_of_the_cpu() {
    let scores = |machines: &Machines| {
        let scorer = NetworkScorer::new(open(&nemoconv_fixtures::nano(), machines), 60);
        scorer.score(&groups(9)).unwrap().concat()
    };
    let expected = scores(&Machines::Cpu);
    for (name, machines) in machines() {
        for (found, expected) in scores(&machines).iter().zip(&expected) {
            let distance = (found.log_likelihood - expected.log_likelihood).abs();
            assert!(
                distance <= FIGURES * expected.log_likelihood.abs(),
                "{name}: {found:?}, expected {expected:?}"
            );
            assert_eq!(found.is_greedy, expected.is_greedy, "{name}");
        }
        let counts = machines.tallies()[0].counts();
        let summed = counts["softmax_sums"];
        assert!(summed.device > 0 && summed.host == 0, "{name}");
    }
}
