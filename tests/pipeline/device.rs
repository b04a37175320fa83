//! Networks on every device that is there, and on the emulator of CUDA: what the CPU computes, within named tolerances.

use std::path::Path;
use std::sync::Arc;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::activation::Activation;
use nemoconv::backend::cpu::Residence;
use nemoconv::backend::cpu::kernels::Isa;
use nemoconv::backend::device::OpenDevice;
use nemoconv::backend::{Backend, Machine, Machines};
use nemoconv::calibrate::samples::Samples;
use nemoconv::calibrate::second_moments::{CrossMoments, SecondMoments};
use nemoconv::calibrate::statistics::Statistics;
use nemoconv::formats::GgmlType;
use nemoconv::formats::packed::Width;
use nemoconv::forward::network::{Network, Sequence};
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::observer::Silent;
use nemoconv::forward::state::State;
use nemoconv::quantize::feedback::{Correction, Damping, Feedback, InputMoments, can_feed_back};
use nemoconv::quantize::form::Form;
use nemoconv::quantize::integer::{IntegerGrid, ScaleFloat};
use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::{Device, DeviceName, Found, Splitting, devices, open};
use nemoconv_fixtures::checkpoint::cases;
use nemoconv_fixtures::packed::{Layout, write};

use crate::support::{nemoconv, read_tensors, stderr, to_gguf, write_tensors};

/// Largest difference of a logit from the CPU's, as a share of the largest logit.
const LOGITS: f32 = 1e-4;
/// The same where inputs are rounded to 8 bits: another last bit may fall on the other side of a tie.
const ROUNDED_LOGITS: f32 = 2e-2;

/// Every device that can be opened, and the emulator.
pub fn machines() -> Vec<(String, Machines)> {
    let emulator: Box<dyn nemoconv_device::Driver> = Box::new(Emulator::new(Order::Strided));
    let mut drivers = vec![("emulator".to_string(), emulator)];
    for Found { family, devices } in devices() {
        match devices {
            Err(error) => println!("skipped {}: {error}", family.name()),
            Ok(found) => {
                for index in 0..found.len() {
                    let name = DeviceName { family, index };
                    drivers.push((name.to_string(), open(name).expect("a listed device opens")));
                }
            }
        }
    }
    let is_required = std::env::var_os("NEMOCONV_REQUIRE_GPU").is_some();
    assert!(!is_required || drivers.len() > 1, "no device can be opened");
    let machines = |driver| {
        let device = Device::new(driver, None);
        Machines::Devices([Arc::new(OpenDevice::new(device))].into())
    };
    drivers
        .into_iter()
        .map(|(name, driver)| (name, machines(driver)))
        .collect()
}

const IN_PARTS: &str = "emulator, in parts";

/// The emulator with all products of F32 in parts of BF16, however small they are.
pub fn in_parts() -> (String, Machines) {
    let device = Device::new(Box::new(Emulator::new(Order::Strided)), None);
    let open = OpenDevice::new(device.with_splitting(Splitting::Always));
    let machines = Machines::Devices([Arc::new(open)].into());
    (IN_PARTS.to_string(), machines)
}

/// Whether it is a processor that stands in for a GPU.
fn is_software(machines: &Machines) -> bool {
    let Machines::Devices(open) = machines else {
        return true;
    };
    open[0].device().description().is_software
}

fn sequence<'a>(tokens: &'a [u32], state: &'a mut State<Machine>) -> Sequence<'a, Machine> {
    Sequence { tokens, state }
}

/// Logits of two sequences together, then of one more token.
fn logits(machines: &Machines, model: &Arc<StoredModel>, numerics: &Numerics) -> Vec<f32> {
    let all = machines.all(model, Residence::Mapped);
    let network = Network::open_on(model, all, numerics).unwrap();
    let vocabulary = model.config().vocab_size as u32;
    let tokens: Vec<u32> = (0..40).map(|i| (i * 7919 + 13) % vocabulary).collect();
    let (first, second) = tokens.split_at(25);
    let [mut one, mut two] = [(); 2].map(|()| network.empty_state().unwrap());
    let mut batch = [sequence(first, &mut one), sequence(second, &mut two)];
    let normed = network.run(&mut batch, &mut Silent).unwrap();
    let mut logits = network
        .logits(&normed, &[3, 24, 25, 39], &mut Silent)
        .unwrap();
    let mut fork = network.fork(&one).unwrap();
    let normed = network
        .run(&mut [sequence(&[7], &mut fork)], &mut Silent)
        .unwrap();
    logits.extend(network.logits(&normed, &[0], &mut Silent).unwrap());
    logits
}

#[track_caller]
fn check(path: &Path, numerics: impl Fn(&StoredModel) -> Numerics, tolerance: f32) {
    check_on(machines(), path, numerics, tolerance);
}

#[track_caller]
fn check_on(
    machines: Vec<(String, Machines)>,
    path: &Path,
    numerics: impl Fn(&StoredModel) -> Numerics,
    tolerance: f32,
) {
    let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
    let numerics = numerics(&model);
    let expected = logits(&Machines::Cpu, &model, &numerics);
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    for (name, machines) in machines {
        let found = logits(&machines, &model, &numerics);
        let pairs = found.iter().zip(&expected);
        let distance = pairs.fold(0.0_f32, |max, (a, b)| max.max((a - b).abs())) / largest;
        println!("{name}, {}: {distance:.1e}", path.display());
        assert!(
            distance <= tolerance,
            "{name}, {}: {distance}",
            path.display()
        );
        let tally = machines.tallies()[0].counts();
        let on_host: Vec<_> = tally.iter().filter(|(_, count)| count.host > 0).collect();
        assert!(
            on_host
                .iter()
                .all(|(operation, _)| ["embed", "route"].contains(*operation)),
            "{name}: {on_host:?}"
        );
    }
}

#[test]
fn networks_give_the_logits_of_the_cpu() {
    for model in nemoconv_fixtures::models() {
        check(&model, |_| Numerics::EXACT, LOGITS);
    }
}

/// Weights in BF16 as they are stored, and decoded ones.
#[test]
fn products_in_parts_give_the_logits_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("q4_k_m.gguf");
    to_gguf(
        &nemoconv_fixtures::nano(),
        &file,
        &["-t", "q4_k_m", "--allow-fallback"],
    );
    let models = nemoconv_fixtures::models();
    // A dense model, and one with experts where shared models are.
    for path in [models.first(), models.last(), Some(&file)]
        .into_iter()
        .flatten()
    {
        check_on(vec![in_parts()], path, |_| Numerics::EXACT, LOGITS);
    }
    let model = Arc::new(StoredModel::open(file.to_str().unwrap()).unwrap());
    let [whole, parts] = [&machines()[0].1, &in_parts().1]
        .map(|machines| logits(machines, &model, &Numerics::EXACT));
    assert!(whole != parts, "nothing was split");
}

#[test]
fn files_of_every_mix_give_the_logits_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for mix in [
        "q4_k_m",
        "q5_0",
        "q4_1",
        "q5_1",
        "iq4_xs",
        "q2_k",
        "mxfp4_moe",
        "tq2_0",
        "f16",
        "q8_0",
    ] {
        let file = folder.path().join(format!("{mix}.gguf"));
        to_gguf(
            &nemoconv_fixtures::nano(),
            &file,
            &["-t", mix, "--allow-fallback"],
        );
        check(&file, |_| Numerics::EXACT, LOGITS);
        check(&file, Numerics::of_target, ROUNDED_LOGITS);
    }
}

#[test]
fn what_does_not_fit_is_sent_tile_by_tile() {
    let path = nemoconv_fixtures::nano();
    let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
    let roomy = logits(&machines()[0].1, &model, &Numerics::EXACT);
    let budget = Some(model.weight_bytes() * 5 / 4);
    let device = Device::new(Box::new(Emulator::new(Order::Ascending)), budget);
    let tight = Machines::Devices([Arc::new(OpenDevice::new(device))].into());
    assert_eq!(logits(&tight, &model, &Numerics::EXACT), roomy);
}

/// Memory of a device of which so much is taken that what weights must leave to activations is not there.
const TIGHT: u64 = 64 << 20;
const TAKEN: u64 = TIGHT / 5 * 4;

#[test]
fn packed_weights_that_do_not_fit_are_decoded_there_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let [packed, plain] = ["packed", "plain"].map(|name| folder.path().join(name));
    for layout in [Layout::Gptq { bits: 4, group: 64 }, Layout::Nvfp4] {
        write(&nemoconv_fixtures::nano(), layout, &packed, &plain).unwrap();
        let model = Arc::new(StoredModel::open(packed.to_str().unwrap()).unwrap());
        let roomy = logits(&machines()[0].1, &model, &Numerics::EXACT);
        let device = Device::new(Box::new(Emulator::new(Order::Ascending)), Some(TIGHT));
        let _taken = device.zeros((TAKEN / 4) as usize).unwrap();
        let tight = Machines::Devices([Arc::new(OpenDevice::new(device.clone()))].into());
        assert_eq!(logits(&tight, &model, &Numerics::EXACT), roomy);
        let decoded = tight.tallies()[0].counts()["dequantize"];
        assert!(decoded.device > 0 && decoded.host == 0, "{decoded:?}");
    }
}

/// Bytes that a device may see at once: fewer than the codes of nano's `ssm_in`, more than anything else that is whole.
const NARROW: u64 = 256 << 10;

#[test]
fn packed_weights_that_no_view_spans_are_decoded_by_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let [packed, plain] = ["packed", "plain"].map(|name| folder.path().join(name));
    let layout = Layout::Gptq {
        bits: 8,
        group: 128,
    };
    write(&nemoconv_fixtures::nano(), layout, &packed, &plain).unwrap();
    let model = Arc::new(StoredModel::open(packed.to_str().unwrap()).unwrap());
    let wide = logits(&machines()[0].1, &model, &Numerics::EXACT);
    let emulator = Emulator::new(Order::Ascending).with_view_bytes(NARROW);
    let device = Device::new(Box::new(emulator), None);
    let narrow = Machines::Devices([Arc::new(OpenDevice::new(device))].into());
    assert_eq!(logits(&narrow, &model, &Numerics::EXACT), wide);
    let decoded = narrow.tallies()[0].counts()["dequantize"];
    assert!(decoded.device > 0 && decoded.host > 0, "{decoded:?}");
}

/// Largest difference of a product whose inputs are rounded alike, as a share of the largest: another order of sums.
const PRODUCT: f32 = 3e-6;

/// Sums of inputs that Q8_1 rounds to F16 go into products as on the CPU.
#[test]
fn products_of_runtimes_with_minima_are_those_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for mix in ["q4_1", "q5_1", "q8_0"] {
        let file = folder.path().join(format!("{mix}.gguf"));
        to_gguf(&nemoconv_fixtures::nano(), &file, &["-t", mix]);
        let model = Arc::new(StoredModel::open(file.to_str().unwrap()).unwrap());
        let tensor = model.tensor("blk.0.ssm_in.weight").unwrap();
        let (rows, activation) = (7, Activation::of_runtime(tensor.ty));
        // Far from zero in the mean, so that sums of blocks are large.
        let value = |at: usize| ((at * 7919) % 1009) as f32 / 300.0 - 1.0;
        let input: Vec<f32> = (0..rows * tensor.columns).map(value).collect();
        let product = |machines: &Machines| {
            let all = machines.all(&model, Residence::Mapped);
            let machine = all.first().unwrap();
            let weight = machine.weight(tensor).unwrap();
            let input = machine.upload(input.clone()).unwrap();
            let out = machine
                .matmul(&weight, 0, &input, rows, activation)
                .unwrap();
            machine.download_all(out).unwrap()
        };
        let expected = product(&Machines::Cpu);
        let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        for (name, machines) in machines() {
            let found = product(&machines);
            let pairs = found.iter().zip(&expected);
            let distance = pairs.fold(0.0_f32, |max, (a, b)| max.max((a - b).abs())) / largest;
            println!("{name}, {mix}: {distance:.1e}");
            assert!(distance <= PRODUCT, "{name}, {mix}: {distance}");
        }
    }
}

#[test]
fn second_moments_are_those_of_the_cpu() {
    // More rows than a narrow view shows.
    let (n, width, rows) = (70, 33, 2000);
    let values = |count: usize, seed: usize| -> Vec<f32> {
        let value = |i: usize| ((i * 7919 + seed) % 1009) as f32 / 500.0 - 1.0;
        (0..count).map(value).collect()
    };
    let (u, v) = (values(rows * n, 1), values(rows * width, 2));
    let path = nemoconv_fixtures::nano();
    let model = StoredModel::open(path.to_str().unwrap()).unwrap();
    let sums = |machines: &Machines| {
        let machine = machines.without_weights(0, model.config());
        let (mut gram, mut cross) = (vec![0.0; n * n], vec![0.0; width * n]);
        let [u, v] = [&u, &v].map(|rows| machine.upload(rows.clone()).unwrap());
        machine.gram(&u, n, &mut gram).unwrap();
        machine
            .cross_gram((&v, width), (&u, n), &mut cross)
            .unwrap();
        let upper = (0..n).flat_map(|i| gram[i * n + i..(i + 1) * n].to_vec());
        upper.chain(cross).collect::<Vec<f64>>()
    };
    let expected = sums(&Machines::Cpu);
    let emulator = Emulator::new(Order::Strided).with_view_bytes(NARROW);
    let open = OpenDevice::new(Device::new(Box::new(emulator), None));
    let narrow = Machines::Devices([Arc::new(open)].into());
    let others = [in_parts(), ("emulator, narrow".to_string(), narrow)];
    for (name, machines) in machines().into_iter().chain(others) {
        for (found, expected) in sums(&machines).iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-6 * rows as f64,
                "{name}: {found} {expected}"
            );
        }
    }
}

/// Bytes that come back for a byte of inputs, at most: five numbers for each column of a cell.
const FETCHED: u64 = 10;

#[test]
fn inputs_of_matrices_stay_on_the_device() {
    let path = nemoconv_fixtures::nano();
    let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
    let token = |i: u32| (i * 7919 + 13) % model.config().vocab_size as u32;
    let sequence = |n: u32| (n * 128..n * 128 + 128).map(token).collect();
    let samples = Samples {
        sequences: (0..4).map(sequence).collect(),
    };
    let collected = |machines: &Machines| {
        Statistics::collect(machines, &model, &samples, false, &|| Ok(())).unwrap()
    };
    let expected = collected(&Machines::Cpu);
    for (name, machines) in machines() {
        let found = collected(&machines);
        let mut seen = 0;
        for (tensor, matrices) in &expected.inputs {
            let pairs = matrices.iter().zip(&found.inputs[tensor]);
            for (expected, found) in pairs.filter_map(|(a, b)| a.as_ref().zip(b.as_ref())) {
                assert_eq!(expected.tokens, found.tokens, "{name}: {tensor}");
                seen += 4 * expected.tokens * expected.squares.len() as u64;
                let pairs = expected.squares.iter().zip(&found.squares);
                let distance = pairs.fold(0.0, |max: f64, (a, b)| max.max((a - b).abs()));
                let largest = expected.squares.iter().fold(0.0, |max: f64, x| max.max(*x));
                assert!(distance <= SQUARES * largest, "{name}: {tensor} {distance}");
            }
        }
        let moments = found.residual.len() * 8 * model.config().hidden_size.pow(2);
        let Machines::Devices(open) = &machines else {
            panic!("{name} is no device");
        };
        let traffic = open[0].device().traffic();
        let streams = 4 * (samples.tokens() * model.config().hidden_size) as u64;
        let weights = 4 * model
            .tensors()
            .iter()
            .map(|tensor| tensor.weights())
            .sum::<u64>();
        println!("{name}: {traffic:?}, {seen} bytes of inputs");
        assert!(
            traffic.fetched <= moments as u64 + seen / FETCHED,
            "{name}: {traffic:?}"
        );
        assert!(
            traffic.sent <= weights + streams + (1 << 20),
            "{name}: {traffic:?}"
        );
    }
}

#[test]
fn blocks_on_several_devices_give_what_one_gives() {
    let open = |order| {
        let device = Device::new(Box::new(Emulator::new(order)), None);
        Arc::new(OpenDevice::new(device))
    };
    for path in nemoconv_fixtures::models() {
        let model = Arc::new(StoredModel::open(path.to_str().unwrap()).unwrap());
        let run = |orders: &[Order]| {
            let machines = Machines::Devices(orders.iter().map(|order| open(*order)).collect());
            (logits(&machines, &model, &Numerics::EXACT), machines)
        };
        let (expected, _) = run(&Order::ALL[..1]);
        let (found, machines) = run(&Order::ALL);
        assert_eq!(found, expected, "{}", path.display());
        for tally in machines.tallies() {
            assert!(tally.counts()["matmul"].device > 0, "a device did nothing");
        }
    }
}

/// Largest difference of a sum of squares, as a share of the largest: streams that differ in last bits.
const SQUARES: f64 = 1e-5;
/// Share of bytes that may differ: codes next to a tie, and what follows from them.
const TIES: f64 = 0.01;
/// Rows of 96 that may differ on GPUs, whose compilers may fuse what is apart here, and where sums are of parts.
const OTHER_ROWS: usize = 1;
/// The same where scale and minimum are F16 numbers of their own: neighbours of them often lose nearly the same.
const OTHER_ROWS_OF_LINES: usize = 6;
/// How much more or less a row may lose that differs: from there on its errors are others.
const OTHER_LOSS: f64 = 0.2;
/// Relative difference of losses.
const LOSS: f64 = 1e-6;
/// Largest difference of targets that make up for inputs, as a share of the largest change. With these moments the CPU is
/// 1.3e-4 from exact targets and the emulator 0.8e-4.
const TARGETS: f32 = 5e-4;

/// All that can be rounded to with feedback.
fn forms() -> Vec<Form> {
    let types = GgmlType::all().filter(|ty| can_feed_back(*ty));
    let grid = |width, group_size, has_zero_point, scale| IntegerGrid {
        width,
        group_size,
        has_zero_point,
        scale,
    };
    let grids = [
        grid(Width::Four, Some(32), false, ScaleFloat::F16),
        grid(Width::Four, Some(64), true, ScaleFloat::F16),
        grid(Width::Four, Some(128), false, ScaleFloat::Bf16),
        grid(Width::Four, Some(128), true, ScaleFloat::Bf16),
        grid(Width::Eight, None, false, ScaleFloat::Bf16),
        grid(Width::Eight, Some(64), false, ScaleFloat::F16),
    ];
    types
        .map(Form::Block)
        .chain(grids.map(Form::Integer))
        .collect()
}

/// From -1 to 1, without a pattern: what is regular is full of ties.
fn noise(at: usize) -> f64 {
    let mut bits = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0
}

/// Second moments of inputs of which neighbours have half in common.
fn seen(n: usize) -> SecondMoments {
    let inputs: Vec<f64> = (0..n * 2 * n).map(noise).collect();
    let mixed = |row: usize, j: usize| inputs[row * n + j] + inputs[row * n + j / 2];
    let mut seen = SecondMoments::empty(n);
    for i in 0..n {
        for j in i..n {
            seen.sums[i * n + j] = (0..2 * n).map(|row| mixed(row, i) * mixed(row, j)).sum();
        }
    }
    (seen.weight, seen.tokens) = (1.0, 1 << 40);
    seen
}

/// Memory of a device that has room for most of 96 rows at a time, and for parts of the moments.
const TIGHT_FOR_ROWS: u64 = 2_000_000;

#[test]
fn rows_that_do_not_fit_are_rounded_one_after_the_other() {
    let (n, count) = (512, 96);
    let seen = seen(n);
    let moments = InputMoments::new(Isa::detect(), n, &seen.sums, Damping::default()).unwrap();
    let weights: Vec<f32> = (0..count * n).map(|at| noise(at + 77) as f32).collect();
    let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
    let emulator = Box::new(Emulator::new(Order::Descending));
    let device = Device::new(emulator, Some(TIGHT_FOR_ROWS));
    let machines = Machines::Devices([Arc::new(OpenDevice::new(device))].into());
    let machine = machines.without_weights(0, model.config());
    let grid = IntegerGrid {
        width: Width::Eight,
        group_size: None,
        has_zero_point: false,
        scale: ScaleFloat::Bf16,
    };
    for form in [Form::Block(GgmlType::Q4_K), Form::Integer(grid)] {
        let how = Feedback::of_inputs(&moments, 1);
        let (expected, here) = form.feed_back(Isa::detect(), &weights, how);
        let products = machine.row_products().unwrap();
        let (found, there) = form.feed_back_on(products, &weights, how).unwrap();
        assert!(found == expected, "{form}");
        assert!((there.loss - here.loss).abs() <= LOSS * here.loss, "{form}");
    }
    // Two chunks of columns for each of two tiles of rows and two forms.
    let sweeps = machines.tallies()[0].counts()["feedback_sweep"];
    assert_eq!((sweeps.device, sweeps.host), (8, 0));
}

#[test]
fn a_matrix_is_rounded_to_the_codes_of_the_cpu() {
    let (n, count) = (512, 96);
    let seen = seen(n);
    let moments = InputMoments::new(Isa::detect(), n, &seen.sums, Damping::default()).unwrap();
    let cross = CrossMoments {
        n,
        sums: (0..n * n).map(|at| 30.0 * noise(at + 5)).collect(),
        tokens: 1,
    };
    let correction = Correction {
        cross: &cross,
        seen: &seen,
        share: 1.0,
    };
    let weights: Vec<f32> = (0..count * n).map(|at| noise(at + 77) as f32).collect();
    let path = nemoconv_fixtures::nano();
    let model = StoredModel::open(path.to_str().unwrap()).unwrap();
    let of_parts = [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::Q4_K].map(Form::Block);
    let each = machines()
        .into_iter()
        .map(|(name, machines)| (name, machines, forms()));
    let (name, machines) = in_parts();
    for (name, machines, forms) in each.chain([(name, machines, of_parts.to_vec())]) {
        let machine = machines.without_weights(0, model.config());
        let products = machine.row_products().unwrap();
        // Processors fuse what the CPU fuses, and sum in its order.
        let is_exact = is_software(&machines) && name != IN_PARTS;
        for form in &forms {
            for passes in [0, 3] {
                let how = Feedback::of_inputs(&moments, passes);
                let (expected, here) = form.feed_back(Isa::detect(), &weights, how);
                let (found, there) = form.feed_back_on(products, &weights, how).unwrap();
                let row_bytes = form.row_bytes(n);
                let pairs = expected.chunks(row_bytes).zip(found.chunks(row_bytes));
                let others = pairs.filter(|(a, b)| a != b).count();
                let change = (there.loss - here.loss).abs() / here.loss;
                println!("{name}, {form}, {passes} passes: {others} rows, loss {change:.1e}");
                let most = match form {
                    _ if is_exact => 0,
                    Form::Block(GgmlType::Q4_1 | GgmlType::Q5_1) => OTHER_ROWS_OF_LINES,
                    _ => OTHER_ROWS,
                };
                assert!(others <= most, "{name} {form}: {others} rows differ");
                let tolerance = LOSS + OTHER_LOSS * others as f64 / count as f64;
                assert!(change <= tolerance, "{name} {form}: {change}");
            }
        }
        let tally = machines.tallies()[0].counts();
        assert!(tally.values().all(|count| count.host == 0), "{tally:?}");
        for step in ["feedback_sweep", "feedback_descent", "feedback_loss"] {
            assert!(tally[step].device > 0, "{step}");
        }

        let corrected = correction.apply(Isa::detect(), &weights, &moments);
        let found = correction.apply_on(products, &weights, &moments).unwrap();
        let [change, deviation] = [&weights, &found].map(|rows| {
            let pairs = corrected.iter().zip(rows);
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        });
        println!("{name}, targets: {deviation:.1e} beside changes of {change:.1e}");
        assert!(deviation <= TARGETS * change, "{name}: {deviation}");

        let factored = InputMoments::on(products, n, &seen.sums, Damping::default());
        let factored = factored.unwrap().unwrap();
        let [here, there] = [&moments, &factored].map(|moments| {
            let how = Feedback::of_inputs(moments, 0);
            Form::Block(GgmlType::Q4_K)
                .feed_back(Isa::detect(), &weights, how)
                .0
        });
        let differing = here.iter().zip(&there).filter(|(a, b)| a != b).count();
        let share = differing as f64 / here.len() as f64;
        println!("{name}, factor: {share:.5} of codes differ");
        assert!(share <= TIES, "{name}: {share}");
    }
}

#[test]
fn packed_folders_give_the_logits_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for scheme in ["w4a16", "w4a16-asym", "w8a16", "w8a8", "w4a8"] {
        let packed = folder.path().join(scheme);
        let output = nemoconv([
            "to-safetensors".as_ref(),
            nemoconv_fixtures::nano().as_os_str(),
            "-o".as_ref(),
            packed.as_os_str(),
            "-s".as_ref(),
            scheme.as_ref(),
            "-q".as_ref(),
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        check_packed(&packed);
    }
}

#[track_caller]
fn check_packed(path: &Path) {
    check(path, |_| Numerics::EXACT, LOGITS);
    check(path, Numerics::of_target, ROUNDED_LOGITS);
}

/// Layouts that are read and not written.
#[test]
fn folders_of_others_give_the_logits_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for layout in [
        Layout::Gptq { bits: 4, group: 64 },
        Layout::Gptq {
            bits: 8,
            group: 128,
        },
        Layout::Nvfp4,
    ] {
        let [packed, plain] = ["packed", "plain"].map(|name| folder.path().join(name));
        write(&nemoconv_fixtures::nano(), layout, &packed, &plain).unwrap();
        check_packed(&packed);
    }
    let float8 = cases()
        .into_iter()
        .filter(|case| case.checkpoint.fp8.is_some());
    for case in float8 {
        let packed = case.checkpoint.write_as(folder.path(), case.name);
        check_packed(&packed.unwrap());
    }
}

/// Folders that the formats' own tools wrote, and a whole one of GPTQ.
#[test]
fn folders_of_the_real_tools_give_the_logits_of_the_cpu() {
    let Some(shared) = std::env::var_os("NEMOCONV_SHARED") else {
        println!("skipped: NEMOCONV_SHARED is not set");
        return;
    };
    for name in [
        "compressed-tensors-w4a16-g128-asym",
        "compressed-tensors-mixed-w8a8-w4a16g64",
        "compressed-tensors-moe-w4a16-g128",
        "gptq-dense-w4g64",
    ] {
        check_packed(&Path::new(&shared).join("gold").join(name));
    }
}

/// Query and key heads have one order, wherever they are decoded.
#[test]
fn heads_that_are_packed_go_with_heads_that_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let [packed, plain] = ["packed", "plain"].map(|name| folder.path().join(name));
    let layout = Layout::Gptq { bits: 4, group: 64 };
    write(&nemoconv_fixtures::nano(), layout, &packed, &plain).unwrap();
    let [file, values] = [&packed, &plain].map(|folder| folder.join("model.safetensors"));
    let mut tensors = read_tensors(&file);
    for (name, tensor) in read_tensors(&values) {
        if let Some(module) = name.strip_suffix("q_proj.weight") {
            tensors.retain(|found, _| !found.starts_with(&format!("{module}q_proj")));
            tensors.insert(name, tensor);
        }
    }
    write_tensors(&file, &tensors);
    check(&packed, |_| Numerics::EXACT, LOGITS);
}
