//! Products with weights of every type, and their rows as they are.

use half::f16;
use nemoconv::artifact::MemoryTensor;
use nemoconv::backend::activation::{Activation, block_q8_1_sum, quantize_q8_0};
use nemoconv::backend::{Backend, Machine, MachineWeight};
use nemoconv::formats::{GgmlType, block};
use nemoconv::quantize::{can_quantize, quantize_rows};
use nemoconv_device::{MatmulLayout, kernels};

use super::reference::{self, TOLERANCE, check, numbers};
use super::{machines, upload, with_tensors};

/// Matrices of a stack: the second is multiplied.
const MATRICES: usize = 2;
/// Rows of a matrix: more than the processor takes together, and none that go into tiles.
const ROWS: usize = 67;
/// Rows of inputs: none, one, eights and a rest.
const TOKENS: [usize; 3] = [0, 1, 11];

/// Row lengths that a type can have, odd ones where it has no blocks.
fn columns(ty: GgmlType) -> &'static [usize] {
    match ty.block_elements() {
        1 => &[1, 77, 528],
        32 => &[32, 96, 544],
        64 | 128 => &[128, 640],
        _ => &[256, 768],
    }
}

/// Bytes of a stack: the nearest to numbers that look random; for types that nothing is quantized to, bytes that do, with
/// scales between.
fn stored(ty: GgmlType, columns: usize) -> MemoryTensor {
    let values = numbers(MATRICES * ROWS * columns, 1);
    let bytes = ty.bytes_for(values.len() as u64).unwrap() as usize;
    let mut bytes = vec![0; bytes];
    if can_quantize(ty) {
        let _ = quantize_rows(ty, columns, &values, None, &mut bytes);
    } else {
        let random = numbers(bytes.len(), 2).into_iter();
        let random = random.map(|x| x.to_bits() as u8 ^ (x.to_bits() >> 12) as u8);
        bytes.iter_mut().zip(random).for_each(|(byte, x)| *byte = x);
        for (i, block) in bytes.chunks_mut(ty.block_bytes()).enumerate() {
            match ty {
                GgmlType::NVFP4 => block[..4].iter_mut().for_each(|scale| *scale &= 0x3f),
                _ => {
                    let scale = f16::from_f32((i % 7) as f32 / 64.0 - 0.05);
                    block[..2].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }
    MemoryTensor {
        name: "table".to_owned(),
        ty,
        matrices: MATRICES,
        rows: ROWS,
        columns,
        bytes: bytes.into(),
    }
}

fn decoded(tensor: &MemoryTensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.matrices * tensor.rows * tensor.columns];
    block::dequantize(tensor.ty, &tensor.bytes, &mut values).unwrap();
    values
}

/// Inputs that no two machines round apart: quarters beside whole codes, with a largest magnitude of 127 in every block, so
/// that steps are powers of two.
fn inputs(count: usize) -> Vec<f32> {
    let mut values: Vec<f32> = numbers(count, 3)
        .iter()
        .map(|x| ((x * 30.0).round() + 0.25) / 64.0)
        .collect();
    for (i, block) in values.chunks_mut(32).enumerate() {
        let place = i * 7 % block.len();
        block[place] = if i % 2 == 0 { 127.0 } else { -127.0 } / 64.0;
    }
    values
}

/// What is added because Q8_1 rounds sums of inputs to F16, by which minima are multiplied.
fn of_sums(tensor: &MemoryTensor, input: &[f32], row: usize) -> f64 {
    let blocks = tensor.columns / 32;
    let stored = tensor.bytes.chunks(tensor.ty.block_bytes());
    let of_row = stored.skip((tensor.rows + row) * blocks).take(blocks);
    let pairs = of_row.zip(input.chunks(32));
    let terms = pairs.map(|(block, input)| {
        let mut codes = [0; 32];
        let d = quantize_q8_0(input, &mut codes);
        let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
        let exact = d.to_f64() * f64::from(sum);
        let rounded = block_q8_1_sum(input, &codes).to_f64();
        f16::from_le_bytes([block[2], block[3]]).to_f64() * (rounded - exact)
    });
    terms.sum()
}

/// The product with the second matrix.
fn expected(tensor: &MemoryTensor, input: &[f32], activation: Activation) -> Vec<f64> {
    let (rows, columns) = (tensor.rows, tensor.columns);
    let tokens = input.len() / columns;
    let mut seen = input.to_vec();
    let seen_rows = seen.chunks_mut(columns);
    seen_rows.for_each(|row| activation.round_trip(row));
    let weights = &decoded(tensor)[rows * columns..];
    let layout = MatmulLayout::linear(tokens, columns, rows, 0, rows);
    let mut product = reference::matmul(&layout, &seen, weights, &vec![0.0; tokens * rows]);
    if activation == Activation::Q8_1 {
        for (at, out) in product.iter_mut().enumerate() {
            let input = &input[at / rows * columns..][..columns];
            *out += of_sums(tensor, input, at % rows);
        }
    }
    product
}

#[track_caller]
fn check_product(
    (name, machine): (&str, &Machine),
    weight: &MachineWeight,
    tensor: &MemoryTensor,
    input: &[f32],
    activation: Activation,
) {
    let tokens = input.len() / tensor.columns;
    let on_machine = upload(machine, input);
    let found = machine.matmul(weight, 1, &on_machine, tokens, activation);
    let found = machine.download_all(found.unwrap()).unwrap();
    let case = format!(
        "{name}, {}, {activation:?}, {tokens} x {}",
        tensor.ty, tensor.columns
    );
    check(
        &case,
        &found,
        &expected(tensor, input, activation),
        TOLERANCE,
    );
}

/// Tries a weight on every machine there is, products of values in parts among them.
fn on_each(tensor: &MemoryTensor, check: impl Fn((&str, &Machine), &MachineWeight)) {
    #[cfg(feature = "device")]
    let in_parts = Some(crate::pipeline::device::in_parts());
    #[cfg(not(feature = "device"))]
    let in_parts = None;
    for (name, machines) in machines().into_iter().chain(in_parts) {
        let (model, machine) = with_tensors(&machines, vec![tensor.clone()]);
        let weight = machine.weight(model.tensor("table").unwrap()).unwrap();
        check((&name, &machine), &weight);
    }
}

/// Inputs as they are, and as a runtime takes them for the type.
fn check_type(ty: GgmlType) {
    for columns in columns(ty) {
        let tensor = stored(ty, *columns);
        on_each(&tensor, |machine, weight| {
            for tokens in TOKENS {
                let input = inputs(tokens * columns);
                for activation in [Activation::None, Activation::of_runtime(ty)] {
                    check_product(machine, weight, &tensor, &input, activation);
                }
            }
        });
    }
}

#[test]
fn products_with_floats() {
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        check_type(ty);
    }
}

#[test]
fn products_with_blocks() {
    let types = kernels::decoded_types().iter();
    for ty in types.filter(|ty| ty.block_elements() > 1) {
        check_type(*ty);
    }
}

/// As packed checkpoints want inputs.
const WITH_SCALES: [Activation; 6] = [
    Activation::TokenInt8,
    Activation::StaticInt8(1.0 / 64.0),
    Activation::TokenFloat8,
    Activation::StaticFloat8(1.0 / 64.0),
    Activation::GroupFloat8(128),
    Activation::Nvfp4(1.0 / 64.0),
];

#[test]
fn products_of_inputs_with_scales() {
    let columns = 640;
    let tensor = stored(GgmlType::F32, columns);
    on_each(&tensor, |machine, weight| {
        for activation in WITH_SCALES {
            for tokens in TOKENS {
                let input = inputs(tokens * columns);
                check_product(machine, weight, &tensor, &input, activation);
            }
        }
    });
}

/// NaN, also the one that GPUs make, and infinities.
const ODDITIES: [f32; 4] = [
    f32::NAN,
    f32::from_bits(0x7fff_ffff),
    f32::INFINITY,
    f32::NEG_INFINITY,
];

/// Whether what is not a number shows in a product: an infinity is the largest number of scales given beforehand.
fn shows(odd: f32, activation: Activation, found: f32) -> bool {
    let is_largest = matches!(
        activation,
        Activation::StaticInt8(_) | Activation::StaticFloat8(_) | Activation::Nvfp4(_)
    );
    match odd.is_nan() {
        true => found.is_nan(),
        false => found.is_finite() == is_largest,
    }
}

/// In its own row alone, however inputs are taken.
#[track_caller]
fn check_oddities(
    (name, machine): (&str, &Machine),
    weight: &MachineWeight,
    tensor: &MemoryTensor,
    activation: Activation,
) {
    let columns = tensor.columns;
    for (odd, tokens) in ODDITIES.iter().flat_map(|odd| [(*odd, 3), (*odd, 11)]) {
        let mut input = inputs(tokens * columns);
        input[2 * columns - 1] = odd;
        let on_machine = upload(machine, &input);
        let found = machine.matmul(weight, 1, &on_machine, tokens, activation);
        let found = machine.download_all(found.unwrap()).unwrap();
        for (row, found) in found.chunks(ROWS).enumerate() {
            let is_right = found.iter().all(|x| match row {
                1 => shows(odd, activation, *x),
                _ => x.is_finite(),
            });
            let case = format!("{name}, {}, {activation:?}, {odd} of {tokens}", tensor.ty);
            assert!(is_right, "{case}: row {row} is {found:?}");
        }
    }
}

#[test]
fn products_of_inputs_that_are_no_numbers() {
    for ty in [
        GgmlType::F32,
        GgmlType::BF16,
        GgmlType::F16,
        GgmlType::Q8_0,
        GgmlType::Q4_1,
        GgmlType::Q4_K,
    ] {
        let tensor = stored(ty, 512);
        on_each(&tensor, |machine, weight| {
            for activation in [Activation::None, Activation::of_runtime(ty)] {
                check_oddities(machine, weight, &tensor, activation);
            }
        });
    }
}

#[test]
fn products_of_inputs_with_scales_that_are_no_numbers() {
    let tensor = stored(GgmlType::F32, 512);
    on_each(&tensor, |machine, weight| {
        for activation in WITH_SCALES {
            check_oddities(machine, weight, &tensor, activation);
        }
    });
}

#[test]
fn rows_as_they_are_stored() {
    for ty in kernels::decoded_types() {
        let columns = *columns(*ty).last().unwrap();
        let tensor = stored(*ty, columns);
        let values = decoded(&tensor);
        on_each(&tensor, |(name, machine), weight| {
            for tokens in [&[][..], &[66, 0, 7, 7]] {
                let found = machine.embed(weight, tokens).unwrap();
                let found = machine.download_all(found).unwrap();
                let row = |token: &u32| &values[*token as usize * columns..][..columns];
                let expected: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
                assert!(found == expected, "{name}, {ty}");
            }
        });
    }
}

/// Vectors and small matrices.
#[test]
fn stored_values() {
    for ty in kernels::decoded_types() {
        let tensor = stored(*ty, columns(*ty)[0]);
        let values = decoded(&tensor);
        for (name, machines) in machines() {
            let (model, machine) = with_tensors(&machines, vec![tensor.clone()]);
            let found = machine.vector(model.tensor("table").unwrap()).unwrap();
            assert!(
                machine.download_all(found).unwrap() == values,
                "{name}, {ty}"
            );
        }
    }
}
