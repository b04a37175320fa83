//! In f32, on trained models and on every shape of random one, through the project's own network.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nemoconv_fixtures::checkpoint::cases;

use crate::artifact::StoredModel;
use crate::backend::cpu::{Cpu, Residence};
use crate::error::Result;
use crate::forward::network::{Network, Sequence};
use crate::forward::numerics::Numerics;
use crate::forward::observer::{Observer, Silent};
use crate::report::LayerDrift;
use crate::rewrite::{
    ChannelStatistics, RewriteSettings, RewriteStatistics, Rewrites, RewrittenModel, Rotation,
};
use crate::validate::logits::perplexity::ChunkedText;
use crate::validate::side_by_side::side_by_side;

/// Largest difference of logits by the largest logit in f32: contract of the rewrites on real checkpoints.
const EXACT_IN_F32: f64 = 1e-5;
const TOKENS: u32 = 96;

/// Sums what the choice of rewrites needs.
#[derive(Default)]
struct Collect {
    hidden: usize,
    eps: f64,
    residual: Vec<Vec<f64>>,
    inputs: BTreeMap<(String, usize), Sums>,
}

/// Squares, largest magnitudes and rows of one input.
type Sums = (Vec<f64>, Vec<f32>, f64);

impl Observer<Cpu> for Collect {
    fn residual(&mut self, block: usize, _: &Cpu, residual: &Vec<f32>, rows: usize) -> Result<()> {
        let size = self.hidden;
        self.residual.resize(block + 1, vec![0.0; size * size]);
        for row in residual.chunks(size).take(rows) {
            let square: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
            let norm = (square / size as f64 + self.eps).sqrt();
            for (a, sums) in row.iter().zip(self.residual[block].chunks_mut(size)) {
                for (b, sum) in row.iter().zip(sums) {
                    *sum += f64::from(*a) / norm * (f64::from(*b) / norm) / rows as f64;
                }
            }
        }
        Ok(())
    }

    fn input(
        &mut self,
        tensor: &str,
        matrix: usize,
        _: &Cpu,
        input: &Vec<f32>,
        rows: usize,
    ) -> Result<()> {
        let width = input.len() / rows;
        let empty = || (vec![0.0; width], vec![0.0; width], 0.0);
        let key = (tensor.to_owned(), matrix);
        let (sums, max, count) = self.inputs.entry(key).or_insert_with(empty);
        for row in input.chunks(width) {
            sums.iter_mut()
                .zip(row)
                .for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            max.iter_mut()
                .zip(row)
                .for_each(|(max, x)| *max = max.max(x.abs()));
            *count += 1.0;
        }
        Ok(())
    }
}

impl Collect {
    fn statistics(self, model: &StoredModel) -> RewriteStatistics {
        let mut inputs: BTreeMap<String, ChannelStatistics> = BTreeMap::new();
        for tensor in model.tensors() {
            let channels = tensor.matrices * tensor.columns;
            let statistics = inputs.entry(tensor.name.clone()).or_default();
            statistics.mean_square = vec![0.0; channels];
            statistics.max_abs = vec![0.0; channels];
        }
        for ((name, matrix), (sums, max, count)) in self.inputs {
            let statistics = inputs.get_mut(&name).unwrap();
            let first = matrix * sums.len();
            for (index, (sum, max)) in sums.iter().zip(max).enumerate() {
                statistics.mean_square[first + index] = sum / count;
                statistics.max_abs[first + index] = max;
            }
        }
        RewriteStatistics {
            residual: self.residual.into_iter().map(Into::into).collect(),
            inputs,
        }
    }
}

fn run(model: &Arc<StoredModel>, observer: &mut dyn Observer<Cpu>) -> Vec<f32> {
    let backend = Cpu::new(Arc::clone(model), Residence::Mapped);
    let network = Network::open(model, backend, &Numerics::EXACT).unwrap();
    let vocabulary = model.config().vocab_size as u32;
    let tokens: Vec<u32> = (0..TOKENS)
        .map(|i| (i * i * 31 + i * 7 + 3) % vocabulary)
        .collect();
    let mut state = network.empty_state().unwrap();
    let sequence = Sequence {
        tokens: &tokens,
        state: &mut state,
    };
    let normed = network.run(&mut [sequence], observer).unwrap();
    let rows: Vec<u32> = (0..TOKENS).collect();
    network.logits(&normed, &rows, &mut Silent).unwrap()
}

fn open(path: &Path) -> Arc<StoredModel> {
    Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap())
}

/// The logits and the statistics of a model.
fn observe(model: &Arc<StoredModel>) -> (Vec<f32>, RewriteStatistics) {
    let mut collect = Collect {
        hidden: model.config().hidden_size,
        eps: f64::from(model.config().norm_epsilon()),
        ..Collect::default()
    };
    let logits = run(model, &mut collect);
    (logits, collect.statistics(model))
}

fn settings(rotation: Rotation, smoothing: bool, sort: bool) -> RewriteSettings {
    RewriteSettings {
        rotation,
        smoothing,
        sort,
        seed: 1,
        ..RewriteSettings::default()
    }
}

fn difference(expected: &[f32], found: &[f32]) -> f64 {
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let pairs = expected.iter().zip(found);
    let error = pairs.fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
    f64::from(error / largest)
}

fn check(model: &Arc<StoredModel>) {
    let (expected, statistics) = observe(model);
    let can_rotate = Rewrites::obstacle(model, false).is_none();
    let wanted = [
        settings(Rotation::Klt, true, true),
        settings(Rotation::Hadamard, false, false),
        settings(Rotation::None, true, false),
    ];
    for settings in wanted {
        if settings.rotation != Rotation::None && !can_rotate {
            continue;
        }
        let rewrites = Rewrites::choose(model, &settings, &statistics).unwrap();
        rewrites.check(model.config()).unwrap();
        let rewritten = RewrittenModel::new(Arc::clone(model), Arc::new(rewrites));
        let found = run(&Arc::new(rewritten.materialize().unwrap()), &mut Silent);
        let error = difference(&expected, &found);
        assert!(
            error <= EXACT_IN_F32,
            "{error:.2e}: {settings:?} {}",
            model.path().display()
        );
    }
}

#[test]
fn trained_models_compute_what_they_did() {
    for path in nemoconv_fixtures::models() {
        check(&open(&path));
    }
}

#[test]
fn every_shape_of_model_computes_what_it_did_widened_too() {
    let folder = tempfile::tempdir().unwrap();
    for case in cases() {
        let path = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        let narrow = open(&path);
        check(&narrow);
        if narrow.config().hidden_size.is_multiple_of(256) {
            continue;
        }
        let wide = Arc::new(StoredModel::open_widened(path.to_str().unwrap()).unwrap());
        assert!(
            wide.config().hidden_size.is_multiple_of(256),
            "{}",
            case.name
        );
        let error = difference(&run(&narrow, &mut Silent), &run(&wide, &mut Silent));
        assert!(error <= EXACT_IN_F32, "{error:.2e}: {} widened", case.name);
        check(&wide);
    }
}

/// Rows of embeddings, heads and readers are the same read alone.
#[test]
fn rows_are_those_of_the_whole_matrix() {
    let model = open(&nemoconv_fixtures::nano());
    let (_, statistics) = observe(&model);
    let wanted = settings(Rotation::Klt, true, true);
    let rewrites = Rewrites::choose(&model, &wanted, &statistics).unwrap();
    let rewritten = RewrittenModel::new(Arc::clone(&model), Arc::new(rewrites));
    for tensor in model.tensors() {
        let whole = rewritten.matrix(&tensor.name, 0).unwrap();
        let (first, count) = (tensor.rows / 3, tensor.rows.div_ceil(2));
        let count = count.min(tensor.rows - first);
        let rows = rewritten.rows(&tensor.name, 0, first, count).unwrap();
        let part = &whole[first * tensor.columns..][..count * tensor.columns];
        assert_eq!(rows, part, "{}", tensor.name);
        assert!(rewritten.rows(&tensor.name, 0, tensor.rows, 1).is_err());
    }
}

#[test]
fn threads_change_no_bit() {
    let model = open(&nemoconv_fixtures::nano());
    let (_, statistics) = observe(&model);
    let wanted = settings(Rotation::Klt, true, false);
    let of = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let rewrites = Rewrites::choose(&model, &wanted, &statistics).unwrap();
            let rewrites = Arc::new(rewrites);
            let rewritten = RewrittenModel::new(Arc::clone(&model), Arc::clone(&rewrites));
            let writer = rewritten.matrix("blk.1.ffn_down.weight", 0).unwrap();
            (rewrites, writer)
        })
    };
    assert_eq!(of(1), of(3));
}

/// Hidden values of the rewritten network are compared in the terms of the original.
#[test]
fn hidden_values_can_be_turned_back() {
    let model = open(&nemoconv_fixtures::nano());
    let (_, statistics) = observe(&model);
    let wanted = settings(Rotation::Klt, true, true);
    let rewrites = Arc::new(Rewrites::choose(&model, &wanted, &statistics).unwrap());
    let rewritten = RewrittenModel::new(Arc::clone(&model), Arc::clone(&rewrites));
    let network = |model: &Arc<StoredModel>| {
        let backend = Cpu::new(Arc::clone(model), Residence::Mapped);
        Network::open(model, backend, &Numerics::EXACT).unwrap()
    };
    let (reference, artifact) = (
        network(&model),
        network(&Arc::new(rewritten.materialize().unwrap())),
    );
    let text = ChunkedText::new((0..128).map(|i| i * 7 % 1000).collect(), 64, None, None).unwrap();
    let compare = |rewrites: &Rewrites| {
        let measured = side_by_side(&reference, &artifact, rewrites, &text, &|_, _| Ok(()));
        measured.unwrap().layers
    };
    let error = |layer: &LayerDrift| layer.relative_error;
    let state = |layer: &LayerDrift| {
        let errors = layer.state.iter().flat_map(|state| &state.relative_error);
        errors.fold(0.0_f64, |max, error| max.max(*error))
    };
    assert!(
        compare(&rewrites)
            .iter()
            .all(|layer| error(layer) < 1e-5 && state(layer) < 1e-4)
    );
    let blind = compare(&Rewrites::none());
    assert!(blind.iter().all(|layer| error(layer) > 0.5));
    assert!(blind.iter().any(|layer| state(layer) > 0.5));
}

/// The same function with hostile scales is rewritten to the same weights.
#[test]
fn outliers_leave_no_trace() {
    let models = nemoconv_fixtures::models();
    let find = |name: &str| models.iter().find(|path| path.ends_with(name));
    let (Some(tiny), Some(outlier)) = (find("nemotron-h-tiny"), find("nemotron-h-tiny-outlier"))
    else {
        return;
    };
    let of = |path: &Path| {
        let model = open(path);
        let (_, statistics) = observe(&model);
        let wanted = settings(Rotation::Hadamard, true, true);
        let rewrites = Rewrites::choose(&model, &wanted, &statistics).unwrap();
        RewrittenModel::new(model, Arc::new(rewrites))
    };
    let (tiny, outlier) = (of(tiny), of(outlier));
    for tensor in tiny.stored().tensors() {
        let ours = tiny.matrix(&tensor.name, 0).unwrap();
        let theirs = outlier.matrix(&tensor.name, 0).unwrap();
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
        let error = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b))
            / norm(&mut ours.iter().copied());
        assert!(error < 1e-4, "{}: {error:.2e}", tensor.name);
    }
}
