//! What is not a number comes out where it went in, in its row, channel, head or block alone; what has no rows comes out
//! empty.

use std::ops::Range;

use nemoconv_device::{
    AttentionLayout, ConvLayout, Device, MatmulKernel, MatmulLayout, Rounding, ScanLayout,
    Splitting,
};

use super::reference::{self, RECURRENT};
use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

/// Numbers with something else in one place.
fn with(odd: f32, place: usize, count: usize, seed: u64) -> Vec<f32> {
    let mut values = numbers(count, seed);
    values[place] = odd;
    values
}

fn uploaded<const N: usize>(device: &Device, all: [&Vec<f32>; N]) -> [nemoconv_device::Array; N] {
    all.map(|values| device.upload(values).unwrap())
}

#[test]
fn products() {
    let [rows, columns, inner] = [5, 7, 300];
    let layout = MatmulLayout::linear(rows, inner, columns, 0, columns);
    for (name, device) in all() {
        let device = device.with_splitting(Splitting::Never);
        let own = |kernel| {
            device
                .clone()
                .with_library_from(u64::MAX)
                .with_matmul(kernel)
        };
        for (how, device) in [
            ("tiled", own(MatmulKernel::Tiled)),
            ("direct", own(MatmulKernel::Direct)),
            ("library", device.clone().with_library_from(0)),
        ] {
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                // In a row of inputs, and in a row of weights.
                let x = with(odd, inner + 299, rows * inner, 1);
                let w = with(odd, 2 * inner, columns * inner, 2);
                let mut out = device.zeros(rows * columns).unwrap();
                let expected = reference::matmul(&layout, &x, &w, &[0.0; 35]);
                let [x, w] = uploaded(&device, [&x, &w]);
                device.matmul(&layout, &x, &w, &mut out).unwrap();
                let found = device.download_all(&out).unwrap();
                check(
                    &format!("{name}, {how}, {odd}"),
                    &found,
                    &expected,
                    TOLERANCE,
                );
            }
        }
    }
}

#[test]
fn norms() {
    let (rows, width, stride, groups) = (4, 140, 150, 2);
    for (name, device) in all() {
        for odd in [f32::NAN, f32::INFINITY] {
            let case = format!("{name}, {odd}");
            let weight = numbers(width, 1);
            let x = with(odd, width + 139, rows * width, 2);
            let expected = reference::rms_norm(&x, &weight, 1e-5);
            let [x, norm] = uploaded(&device, [&x, &weight]);
            let out = device.rms_norm(&x, &norm, 1e-5).unwrap();
            let found = device.download_all(&out).unwrap();
            check(&case, &found, &expected, TOLERANCE);
            // In a group of a row, and in the gate of another.
            let y = with(odd, width + 3, rows * width, 3);
            let z = with(odd, 2 * stride + 80, rows * stride, 4);
            let expected = reference::gated_rms_norm(&y, (&z, stride), &weight, groups, 1e-5);
            let [mut y, z] = uploaded(&device, [&y, &z]);
            device
                .gated_rms_norm(&mut y, &z, stride, &norm, groups, 1e-5)
                .unwrap();
            let found = device.download_all(&y).unwrap();
            check(&case, &found, &expected, TOLERANCE);
        }
    }
}

#[test]
fn convolutions() {
    let layout = ConvLayout {
        stride: 12,
        first: 2,
        channels: 9,
        taps: 4,
    };
    let (rows, channels) = (7, layout.channels);
    for (name, device) in all() {
        // In the input, and in a row before it.
        let input = with(f32::NAN, 2 * 12 + 2 + 5, rows * 12, 1);
        let before = with(f32::NAN, 2 * channels + 1, 3 * channels, 2);
        let (weight, bias) = (numbers(4 * channels, 3), numbers(channels, 4));
        let expected = reference::conv1d_silu(layout, [&input[..], &before, &weight, &bias]);
        let [input, mut state, weight, bias] = uploaded(&device, [&input, &before, &weight, &bias]);
        let mut out = device.zeros(rows * channels).unwrap();
        let mut run = |rows: Range<usize>| {
            device
                .conv1d_silu(layout, rows, &input, &mut state, &weight, &bias, &mut out)
                .unwrap();
        };
        run(0..0);
        run(0..rows);
        run(rows..rows);
        let found = device.download_all(&out).unwrap();
        check(&name, &found, &expected.out, RECURRENT);
        let found = device.download_all(&state).unwrap();
        check(&name, &found, &expected.state, 0.0);
    }
}

#[test]
fn scans() {
    let layout = ScanLayout {
        heads: 4,
        head_dim: 5,
        groups: 2,
        state_size: 67,
        dt_stride: 6,
        time_step: (0.0, 1.5),
    };
    let (rows, inner, width) = (4, 20, 20 + 2 * 2 * 67);
    let lengths = [rows * width, rows * 6, 4, 4, 4, inner * 67];
    // A channel, B and C of a group, the time step of a head, its decay, skip and bias, a state.
    let places = [
        (0, width + 7),
        (0, width + inner + 66),
        (0, 2 * width + inner + 3 * 67),
        (1, 2 * 6 + 2 + 1),
        (2, 3),
        (3, 1),
        (4, 0),
        (5, 2 * 67 * 5 + 13),
    ];
    for (name, device) in all() {
        for (which, place) in places {
            let mut of: u64 = 0;
            let mut inputs = lengths.map(|len| {
                of += 1;
                numbers(len, of)
            });
            inputs[2].iter_mut().for_each(|a| *a = -a.abs() - 0.1);
            inputs[which][place] = f32::NAN;
            let expected = reference::selective_scan(layout, inputs.each_ref().map(Vec::as_slice));
            let [xbc, dt, a, d, dt_bias, mut state] = uploaded(&device, inputs.each_ref());
            let mut out = device.zeros(rows * inner).unwrap();
            for rows in [0..0, 0..1, 1..rows] {
                let inputs = [&xbc, &dt, &a, &d, &dt_bias];
                device
                    .selective_scan(layout, rows, inputs, &mut state, &mut out)
                    .unwrap();
            }
            let case = format!("{name}, value {place} of input {which}");
            let found = device.download_all(&out).unwrap();
            check(&case, &found, &expected.out, RECURRENT);
            let found = device.download_all(&state).unwrap();
            check(&case, &found, &expected.state, RECURRENT);
        }
    }
}

#[test]
fn attention() {
    let layout = AttentionLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 10,
        is_f16: false,
    };
    let (rows, position) = (5, 70);
    let positions = position + rows;
    for (name, device) in all() {
        // A head of a query; a key and a value of a head, from their rows on; the only key that every row sees.
        for (which, place) in [
            (0, 2 * 40 + 13),
            (1, 72 * 20 + 3),
            (2, 73 * 20 + 19),
            (1, 0),
        ] {
            let mut inputs = [(rows * 40, 1), (positions * 20, 2), (positions * 20, 3)]
                .map(|(count, seed)| numbers(count, seed));
            inputs[which][place] = f32::NAN;
            let sources = inputs.each_ref().map(Vec::as_slice);
            let expected = reference::attention(layout, position, sources);
            let inputs = uploaded(&device, inputs.each_ref());
            for is_f16 in [false, true] {
                let layout = AttentionLayout { is_f16, ..layout };
                let mut out = device.zeros(rows * 40).unwrap();
                for rows in [0..0, 0..rows] {
                    device
                        .attention(layout, rows, position, inputs.each_ref(), &mut out)
                        .unwrap();
                }
                let found = device.download_all(&out).unwrap();
                let case = format!("{name}, value {place} of input {which}, F16 {is_f16}");
                let tolerance = match is_f16 {
                    true => reference::F16_SUMS,
                    false => RECURRENT,
                };
                check(&case, &found, &expected, tolerance);
            }
        }
    }
}

#[test]
fn rows_that_are_taken_and_added() {
    let (rows, width) = (6, 5);
    for (name, device) in all() {
        let taken = with(f32::NAN, 4 * width + 2, rows * width, 1);
        let x = device.upload(&taken).unwrap();
        let chosen = [3_u32, 4, 0];
        let gathered = device.gather(&x, width, &chosen).unwrap();
        let found = device.download_all(&gathered).unwrap();
        let row = |row: &u32| &taken[*row as usize * width..][..width];
        let expected = reference::f64s(&chosen.iter().flat_map(row).copied().collect::<Vec<_>>());
        check(&name, &found, &expected, 0.0);
        // To rows 5, 1 and 2; the weight of the last is none.
        let before = numbers(rows * width, 2);
        let mut sum = device.upload(&before).unwrap();
        let (to, weights) = ([5_u32, 1, 2], [0.5, -2.0, f32::NAN]);
        device
            .scatter_add(&mut sum, width, &gathered, &to, &weights)
            .unwrap();
        device
            .scatter_add(&mut sum, width, &gathered, &[], &[])
            .unwrap();
        let mut after = reference::f64s(&before);
        for (i, (to, weight)) in to.iter().zip(weights).enumerate() {
            for c in 0..width {
                after[*to as usize * width + c] += f64::from(weight) * expected[i * width + c];
            }
        }
        let found = device.download_all(&sum).unwrap();
        check(&name, &found, &after, TOLERANCE);
    }
}

/// A NaN shows in whatever shares its scale.
#[test]
fn rounded_inputs() {
    let (width, place) = (512, 512 + 300);
    for (name, device) in all() {
        for (rounding, shared) in [
            (Rounding::Bf16, 1),
            (Rounding::F16, 1),
            (Rounding::Q8_0, 32),
            (Rounding::Q8K, 256),
            (Rounding::RowInt8, width),
            (Rounding::StaticInt8(0.01), 1),
            (Rounding::RowFloat8, width),
            (Rounding::BlockFloat8(128), 128),
            (Rounding::StaticFloat8(0.01), 1),
            (Rounding::Nvfp4(0.001), 16),
        ] {
            // The one that GPUs make has all digits set.
            for odd in [
                f32::NAN,
                f32::from_bits(0x7fff_ffff),
                f32::from_bits(0xff80_0001),
            ] {
                let x = device.upload(&with(odd, place, 3 * width, 1)).unwrap();
                let out = device.round_activation(&x, width, rounding).unwrap();
                let found = device.download_all(&out).unwrap();
                let nan = place / shared * shared..(place / shared + 1) * shared;
                for (at, x) in found.iter().enumerate() {
                    assert_eq!(
                        x.is_nan(),
                        nan.contains(&at),
                        "{name}, {rounding:?}: {x} at {at}"
                    );
                }
            }
            let none = device.zeros(0).unwrap();
            let none = device.round_activation(&none, width, rounding).unwrap();
            assert!(none.is_empty(), "{name}, {rounding:?}");
        }
    }
}
