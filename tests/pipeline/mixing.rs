//! Rewritten weights of machines that mix: the bytes of the CPU, wherever they were mixed.

use std::sync::Arc;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::Machines;
use nemoconv::backend::device::OpenDevice;
use nemoconv::backend::tally::Count;
use nemoconv::rewrite::{
    ChannelStatistics, RewriteSettings, RewriteStatistics, Rewrites, RewrittenModel, Rotation,
};
use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::Device;
use nemoconv_fixtures::checkpoint::cases;

use super::device::machines;

/// As if the channels of a model were of all sizes, and correlated.
fn statistics(model: &StoredModel) -> RewriteStatistics {
    let size = model.config().hidden_size;
    let moment = |at: usize| match (at / size, at % size) {
        (i, j) if i == j => 1.0 + (i % 7) as f64,
        (i, j) => ((i * j) % 11) as f64 / (20.0 * size as f64),
    };
    let residual: Vec<f64> = (0..size * size).map(moment).collect();
    let inputs = model.tensors().iter().map(|tensor| {
        let channels = 0..tensor.matrices * tensor.columns;
        let squares = channels.clone().map(|channel| 0.5 + (channel % 13) as f64);
        let statistics = ChannelStatistics {
            mean_square: squares.collect(),
            max_abs: vec![1.0; channels.len()],
        };
        (tensor.name.clone(), statistics)
    });
    RewriteStatistics {
        inputs: inputs.collect(),
        residual: vec![residual.into(); model.config().pattern.kinds().len() + 1],
    }
}

/// The rewrites that a machine helps to choose, and all weights after them.
fn rewritten(machines: &Machines, model: &Arc<StoredModel>) -> (Rewrites, Vec<Vec<u8>>) {
    let settings = RewriteSettings {
        rotation: match Rewrites::obstacle(model, false) {
            None => Rotation::Hadamard,
            Some(_) => Rotation::None,
        },
        smoothing: true,
        sort: true,
        ..RewriteSettings::default()
    };
    let mixer = machines.mixer();
    let statistics = statistics(model);
    let chosen = Rewrites::choose_on(mixer.as_deref(), model, &settings, &statistics).unwrap();
    let rewritten = RewrittenModel::new(Arc::clone(model), Arc::new(chosen.clone()));
    let rewritten = rewritten.mixed_by(mixer);
    let tensors = model.tensors().iter();
    let weights = tensors.map(|tensor| {
        let tensor = rewritten.in_memory(&tensor.name).unwrap();
        tensor.bytes.to_vec()
    });
    (chosen, weights.collect())
}

fn counts(machines: &Machines) -> [Count; 2] {
    let counts = machines.tallies()[0].counts();
    ["mix", "exact_product"].map(|operation| counts.get(operation).copied().unwrap_or_default())
}

#[test]
fn rewritten_weights_are_those_of_the_cpu_to_the_bit() {
    for path in nemoconv_fixtures::models() {
        let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
        let expected = rewritten(&Machines::Cpu, &model);
        for (name, machines) in machines() {
            assert!(rewritten(&machines, &model) == expected, "{name}, {path:?}");
            let is_rotated = expected.0.rotation().is_some();
            for Count { device, host } in counts(&machines) {
                match machines.name().as_str() {
                    "cuda" => assert!(host == 0 && (device > 0 || !is_rotated), "{name}, {path:?}"),
                    _ => assert!(device == 0 && (host > 0 || !is_rotated), "{name}, {path:?}"),
                }
            }
        }
    }
}

/// Latent spaces, sizes that are no powers of two, heads of all widths.
#[test]
fn every_shape_of_model_is_mixed_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut mixed = 0;
    for case in cases() {
        let path = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
        let (_, machines) = &machines()[0];
        let expected = rewritten(&Machines::Cpu, &model);
        assert!(rewritten(machines, &model) == expected, "{}", case.name);
        mixed += counts(machines)[0].device;
    }
    assert!(mixed > 0);
}

/// Memory and views in which a matrix is mixed in parts, and memory in which it is not.
#[test]
fn parts_that_fit_are_mixed_and_nothing_where_none_does() {
    let path = nemoconv_fixtures::nano();
    let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
    let expected = rewritten(&Machines::Cpu, &model);
    let size = model.config().hidden_size as u64;
    let of = |view_bytes, budget| {
        let emulator = Emulator::new(Order::Descending).with_view_bytes(view_bytes);
        let device = Device::new(Box::new(emulator), budget);
        let machines = Machines::Devices([Arc::new(OpenDevice::new(device))].into());
        assert!(rewritten(&machines, &model) == expected);
        counts(&machines)
    };
    // Room for the rotation and a few rows or columns beside it.
    let [mixed, products] = of(8 * size * (size + 3), None);
    assert!(mixed.device > 0 && mixed.host == 0, "{mixed:?}");
    assert!(products.device > 0 && products.host == 0, "{products:?}");
    // None for the rotation.
    let [mixed, products] = of(8 * size * (size - 1), None);
    assert!(
        mixed.host > 0 && products.device == 0,
        "{mixed:?} {products:?}"
    );
    let [mixed, products] = of(1 << 30, Some(4 * size * size));
    assert!(
        mixed.host > 0 && products.device == 0,
        "{mixed:?} {products:?}"
    );
}
