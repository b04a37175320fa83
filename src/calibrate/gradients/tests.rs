//! The whole way back against the forward pass: its inputs, and differences of its loss.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nemoconv_fixtures::checkpoint::cases;

use super::block::{Block, OutputObserver};
use super::matrix::Matrix;
use super::*;
use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::cpu::{Cpu, Residence};
use crate::backend::{Backend, ExpertRows, Machines};
use crate::calibrate::capture::Capture;
use crate::calibrate::layer::Layer;
use crate::forward::log_softmax::LogSoftmax;
use crate::forward::network::{Network, Sequence};
use crate::forward::numerics::Numerics;
use crate::forward::observer::Observer;

fn samples() -> Samples {
    let sequence = |n: u32| {
        let tokens = (0..14 + n).map(move |i| (i * 7919 + n * 31) % 1000);
        tokens.collect()
    };
    Samples {
        sequences: (0..5).map(sequence).collect(),
    }
}

fn open(path: &Path) -> RewrittenModel {
    let model = StoredModel::open(path.to_str().unwrap()).unwrap();
    RewrittenModel::new(Arc::new(model), Arc::default())
}

/// Calls `check` with random checkpoints of these names.
fn with_cases(names: &[&str], check: impl Fn(&Path)) {
    for name in names {
        let case = cases().into_iter().find(|case| case.name == *name).unwrap();
        let folder = tempfile::tempdir().unwrap();
        check(&case.checkpoint.write_as(folder.path(), name).unwrap());
    }
}

/// Whether a block's tensor is a matrix that is rounded.
fn is_rounded(name: &str) -> bool {
    let apart = ["norm", "conv", "gate"];
    let is_weight = name.starts_with("blk.") && name.ends_with(".weight");
    is_weight && !apart.iter().any(|part| name.contains(part))
}

/// What matrices read, by tensor and matrix.
#[derive(Default)]
struct Inputs(BTreeMap<(String, usize), Vec<f32>>);

impl OutputObserver for Inputs {
    fn output(&mut self, matrix: &Matrix, index: usize, input: &[f32], gradient: &[f32]) {
        let rows = input.len() / matrix.in_features();
        assert_eq!(gradient.len(), rows * matrix.out_features());
        let key = (matrix.name().to_string(), index);
        assert!(self.0.insert(key, input.to_vec()).is_none());
    }
}

/// Blocks compute on their way back what they compute forwards, bit for bit.
fn check_inputs(path: &Path) {
    let (weights, samples) = (open(path), samples());
    let walk = Walk::new(&weights, &samples, false, &|| Ok(()));
    let streams = walk.forward(&samples).unwrap();
    let machine = Machines::Cpu.without_weights(0, walk.config());
    for (block, before) in streams.iter().enumerate().take(walk.blocks()) {
        let tensors = walk.tensors(block).unwrap();
        let names = tensors.iter().map(|tensor| tensor.name.clone());
        let names: Vec<String> = names.filter(|name| is_rounded(name)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let layer = Layer::open(&Machines::Cpu, walk.config(), block, tensors.clone()).unwrap();
        let back = Block::open(walk.config(), block, tensors).unwrap();
        for (cell, sequences) in walk.filled_cells() {
            let stream = before.read(cell).unwrap();
            let lengths: Vec<usize> = sequences.iter().map(|rows| rows.len()).collect();
            let mut capture = Capture::new(&names, None);
            layer
                .run_values(&mut stream.clone(), &lengths, &mut capture)
                .unwrap();
            let mut found = Inputs::default();
            let gradient = vec![1.0; stream.len()];
            back.back(&stream, sequences, gradient, &mut found).unwrap();
            assert!(!found.0.is_empty() && found.0.len() == capture.inputs.len());
            for (key, captured) in &capture.inputs {
                let rows = captured.with_rows(&machine, |rows| {
                    machine.download(rows, 0..machine.len(rows))
                });
                assert!(found.0[key] == rows.unwrap(), "{key:?}");
            }
        }
    }
}

#[test]
fn the_way_back_reads_what_the_way_forward_read() {
    check_inputs(&nemoconv_fixtures::nano());
    with_cases(&["biases", "sharded-experts", "latent"], check_inputs);
}

/// The gradient of the loss at weights: `sum of g u^T` over tokens, `[matrices, out_features, in_features]` by tensor.
#[derive(Default)]
struct AtWeights(BTreeMap<String, Vec<f32>>);

impl OutputObserver for AtWeights {
    fn output(&mut self, matrix: &Matrix, index: usize, input: &[f32], gradient: &[f32]) {
        let (n, k) = (matrix.out_features(), matrix.in_features());
        let sums = self.0.entry(matrix.name().to_string()).or_default();
        sums.resize(sums.len().max((index + 1) * n * k), 0.0);
        let sums = &mut sums[index * n * k..][..n * k];
        for (input, gradient) in input.chunks(k).zip(gradient.chunks(n)) {
            for (sums, gradient) in sums.chunks_mut(k).zip(gradient) {
                let sums = sums.iter_mut().zip(input);
                sums.for_each(|(sum, u)| *sum += gradient * u);
            }
        }
    }
}

/// A random direction, half of which is turned uphill: of an even one little would be left to see.
fn direction(gradient: &[f32], seed: u64) -> Vec<f32> {
    let random = vjp::differences::values(gradient.len(), seed);
    let turned = random.iter().zip(gradient).enumerate();
    let turned = turned.map(|(at, (random, gradient))| match at % 2 {
        0 => random.abs() * gradient.signum(),
        _ => *random,
    });
    turned.collect()
}

/// Keeps experts as they were in the first run.
#[derive(Default)]
struct Fixed(BTreeMap<usize, Vec<ExpertRows>>);

impl Observer<Cpu> for Fixed {
    fn experts(&mut self, block: usize, experts: &[ExpertRows]) {
        self.0.entry(block).or_insert_with(|| experts.to_vec());
    }

    fn routing(&mut self, block: usize) -> Option<Vec<ExpertRows>> {
        self.0.get(&block).cloned()
    }
}

/// A network whose loss is wanted.
struct Scene {
    tensors: Vec<MemoryTensor>,
    weights: RewrittenModel,
    samples: Samples,
    /// y of every token of all sequences.
    targets: Vec<usize>,
}

impl Scene {
    /// The tensors, with `step` times `direction` added to one of them.
    fn moved(&self, name: &str, direction: &[f32], step: f32) -> StoredModel {
        let mut tensors = self.tensors.clone();
        for tensor in tensors.iter_mut().filter(|tensor| tensor.name == name) {
            let values = tensor.bytes.chunks_exact(4).zip(direction);
            let values = values.map(|(bytes, direction)| {
                f32::from_le_bytes(bytes.try_into().unwrap()) + step * direction
            });
            let shape = [tensor.matrices, tensor.rows, tensor.columns];
            *tensor = MemoryTensor::of_f32(name, shape, &values.collect::<Vec<_>>());
        }
        let config = self.weights.stored().config().clone();
        StoredModel::in_memory(Path::new("moved"), config, tensors).unwrap()
    }

    /// The sum of `-log p(y)`.
    fn loss(&self, model: StoredModel, fixed: &mut Fixed) -> f64 {
        let model = Arc::new(model);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        let network = Network::open(&model, backend, &Numerics::EXACT).unwrap();
        let sequences = &self.samples.sequences;
        let states = sequences.iter().map(|_| network.empty_state().unwrap());
        let mut states: Vec<_> = states.collect();
        let mut sequences: Vec<_> = sequences
            .iter()
            .zip(&mut states)
            .map(|(tokens, state)| Sequence { tokens, state })
            .collect();
        let normed = network.run(&mut sequences, fixed).unwrap();
        let rows: Vec<u32> = (0..self.targets.len() as u32).collect();
        let logits = network.logits(&normed, &rows, fixed).unwrap();
        let rows = logits.chunks(logits.len() / rows.len()).zip(&self.targets);
        rows.map(|(logits, target)| -LogSoftmax::of(logits).log_probability(logits[*target]))
            .sum()
    }
}

/// Slopes of the loss along a random direction of every matrix against differences of the loss.
fn check_slopes(path: &Path) {
    /// What the loss moves by: far more than its rounding, far less than bends it.
    const CHANGE: f64 = 0.1;
    let (weights, samples) = (open(path), samples());
    let walk = Walk::new(&weights, &samples, false, &|| Ok(()));
    let mut streams = walk.forward(&samples).unwrap();
    let last = streams.pop().unwrap();
    let loss = Loss::new(&walk, 7).unwrap();
    let predictions = loss.predictions(&loss.normed(&last).unwrap()).unwrap();
    let mut gradients = loss.gradient(&last).unwrap();
    let names = weights.stored().tensors().iter();
    let tensors = names.map(|tensor| weights.in_memory(&tensor.name).unwrap());
    let tensors: Vec<_> = tensors.collect();
    let mut at_weights = AtWeights::default();
    for (block, before) in streams.iter().enumerate().rev() {
        walk.back(block, before, &mut gradients, &mut at_weights)
            .unwrap();
    }
    let scene = Scene {
        tensors,
        weights: weights.clone(),
        samples: samples.clone(),
        targets: predictions.iter().flatten().map(|row| row.token).collect(),
    };
    let mut fixed = Fixed::default();
    scene.loss(scene.moved("nothing", &[], 0.0), &mut fixed);
    assert!(!at_weights.0.is_empty());
    for (seed, (tensor, gradient)) in at_weights.0.iter().enumerate() {
        let direction = direction(gradient, seed as u64);
        let found = vjp::differences::dot(&vjp::differences::widened(gradient), &direction);
        let step = (CHANGE / found) as f32;
        let mut at = |step| scene.loss(scene.moved(tensor, &direction, step), &mut fixed);
        let expected = (at(step) - at(-step)) / (2.0 * f64::from(step));
        let error = (found - expected).abs() / expected.abs();
        assert!(error < 2e-3, "{tensor}: {found} {expected} {error}");
    }
}

#[test]
fn gradients_are_slopes_of_the_loss() {
    check_slopes(&nemoconv_fixtures::nano());
}

#[test]
fn gradients_of_random_networks_are_slopes_of_the_loss() {
    with_cases(
        &["tied", "biases", "sharded-experts", "latent"],
        check_slopes,
    );
}

fn collected(path: &Path, threads: usize) -> OutputMoments {
    let weights = open(path);
    let settings = GradientSettings {
        max_sequences: 4,
        seed: 3,
        // With several threads streams lie in files.
        memory_bytes: match threads {
            1 => u64::MAX,
            _ => peak_bytes(&weights, &evenly_spaced(&samples(), 4), false) - 1,
        },
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    let collect = || OutputMoments::collect(&weights, &samples(), &settings, &|| Ok(()));
    pool.build().unwrap().install(collect).unwrap()
}

fn check_collected(path: &Path) {
    let one = collected(path, 1);
    assert!(collected(path, 3) == one);
    let tokens = evenly_spaced(&samples(), 4).tokens() as u64;
    for tensor in open(path).stored().tensors() {
        for matrix in 0..tensor.matrices {
            let found = one.of(&tensor.name, matrix);
            let is_known = found.is_some() == is_rounded(&tensor.name);
            assert!(is_known || tensor.matrices > 1, "{}", tensor.name);
            for block in found.into_iter().flatten() {
                let moments = &block.moments;
                assert_eq!(block.rows, 0..tensor.rows);
                assert_eq!(moments.n, tensor.rows);
                assert!(moments.tokens == tokens || tensor.matrices > 1);
                assert!(moments.mean_squares().iter().sum::<f32>() > 0.0);
            }
        }
    }
}

#[test]
fn the_result_does_not_depend_on_threads_or_on_where_streams_are_kept() {
    check_collected(&nemoconv_fixtures::nano());
    with_cases(&["latent"], check_collected);
}

#[test]
fn too_little_memory_is_an_error_that_says_how_much_is_needed() {
    let weights = open(&nemoconv_fixtures::nano());
    let least = peak_bytes(&weights, &samples(), true);
    assert!(needs_file(&weights, &samples(), least).unwrap());
    let error = needs_file(&weights, &samples(), least - 1).unwrap_err();
    assert!(
        error.hint().unwrap().contains(&format!("{least}")),
        "{error}"
    );
}

/// A trained mixture of experts, where there is one.
#[test]
fn gradients_of_a_trained_mixture_of_experts_are_slopes_of_the_loss() {
    let shared = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from);
    let Some(path) = shared.map(|shared| shared.join("models/nemotron-h-moe-tiny")) else {
        println!("skipped: NEMOCONV_SHARED is not set");
        return;
    };
    check_inputs(&path);
    check_slopes(&path);
}
