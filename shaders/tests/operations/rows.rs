//! Norms, rounding, and rows that are taken or added.

use half::{bf16, f16};
use nemoconv_device::Rounding;

use super::reference;
use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

#[test]
fn norms() {
    for (name, device) in all() {
        for (rows, width) in [(0, 8), (1, 1), (3, 63), (5, 200)] {
            let (x, weight) = (numbers(rows * width, 1), numbers(width, 2));
            let expected = reference::rms_norm(&x, &weight, 1e-5);
            let [x, weight] = [&x, &weight].map(|values| device.upload(values).unwrap());
            let out = device.rms_norm(&x, &weight, 1e-5).unwrap();
            let found = device.download(&out, 0..out.len()).unwrap();
            check(&name, &found, &expected, TOLERANCE);
        }
    }
}

#[test]
fn gated_norms_of_groups() {
    for (name, device) in all() {
        for (rows, groups, group, stride) in
            [(0, 2, 8, 20), (1, 1, 3, 3), (4, 2, 70, 150), (3, 5, 9, 61)]
        {
            let inner = groups * group;
            let (y, z, weight) = (
                numbers(rows * inner, 1),
                numbers(rows * stride, 2),
                numbers(inner, 3),
            );
            let expected = reference::gated_rms_norm(&y, (&z, stride), &weight, groups, 1e-5);
            let [z, weight] = [&z, &weight].map(|values| device.upload(values).unwrap());
            let mut y = device.upload(&y).unwrap();
            device
                .gated_rms_norm(&mut y, &z, stride, &weight, groups, 1e-5)
                .unwrap();
            check(
                &name,
                &device.download(&y, 0..y.len()).unwrap(),
                &expected,
                TOLERANCE,
            );
        }
    }
}

#[test]
fn biases_and_chosen_rows() {
    for (name, device) in all() {
        let (rows, width) = (37, 19);
        let (x, bias) = (numbers(rows * width, 1), numbers(width, 2));
        let at = |i: usize| f64::from(x[i]);

        let mut added = device.upload(&x).unwrap();
        device
            .add_bias(&mut added, &device.upload(&bias).unwrap())
            .unwrap();
        let expected: Vec<f64> = (0..x.len())
            .map(|i| at(i) + f64::from(bias[i % width]))
            .collect();
        check(
            &name,
            &device.download(&added, 0..x.len()).unwrap(),
            &expected,
            TOLERANCE,
        );

        let input = device.upload(&x).unwrap();
        let chosen = [36_u32, 0, 7, 7];
        let gathered = device.gather(&input, width, &chosen).unwrap();
        let place = |row: u32| (row as usize * width..(row as usize + 1) * width).map(at);
        let expected: Vec<f64> = chosen.into_iter().flat_map(place).collect();
        check(
            &name,
            &device.download(&gathered, 0..4 * width).unwrap(),
            &expected,
            0.0,
        );
        assert!(device.gather(&input, width, &[]).unwrap().is_empty());

        let mut sum = device.upload(&x).unwrap();
        device
            .scatter_add(&mut sum, width, &gathered, &[1, 36, 5], &[2.0, -1.0, 0.5])
            .unwrap();
        let mut expected: Vec<f64> = (0..x.len()).map(at).collect();
        for (i, (row, weight)) in [(1, 2.0), (36, -1.0), (5, 0.5)].into_iter().enumerate() {
            for c in 0..width {
                expected[row * width + c] += weight * at(chosen[i] as usize * width + c);
            }
        }
        check(
            &name,
            &device.download(&sum, 0..x.len()).unwrap(),
            &expected,
            TOLERANCE,
        );
    }
}

/// As `nemoconv::backend::activation` defines it.
/// The nearest of the values that `grid` counts upwards from 0, of two the one with an even number.
fn nearest(grid: impl Fn(u32) -> f32, count: u32, x: f32) -> f32 {
    let distance = |code: &u32| (grid(*code) - x.abs()).abs();
    let order = |a: &u32, b: &u32| {
        let nearer = distance(a).total_cmp(&distance(b));
        nearer.then((a % 2).cmp(&(b % 2)))
    };
    let code = (0..count).min_by(order).unwrap();
    grid(code).copysign(x)
}

fn e4m3(x: f32) -> f32 {
    let value = |code: u32| match (code >> 3, (code & 7) as f32) {
        (0, mantissa) => mantissa / 512.0,
        (exponent, mantissa) => (1.0 + mantissa / 8.0) * f32::powi(2.0, exponent as i32 - 7),
    };
    nearest(value, 0x7f, x)
}

fn e2m1(x: f32) -> f32 {
    let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    nearest(|code| values[code as usize], 8, x)
}

fn to_floats(block: &[f32], scale: f32, grid: fn(f32) -> f32) -> Vec<f32> {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    block.iter().map(|x| grid(x * inverse) * scale).collect()
}

fn rounded(row: &[f32], rounding: Rounding) -> Vec<f32> {
    let largest = |block: &[f32]| block.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let codes = |block: &[f32], inverse: f32, step: f32| -> Vec<f32> {
        block
            .iter()
            .map(|x| (x * inverse).round_ties_even() * step)
            .collect()
    };
    let or_zero = |x: f32| if x.is_finite() { x } else { 0.0 };
    match rounding {
        Rounding::Bf16 => row.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        Rounding::F16 => row.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
        Rounding::Q8_0 => row
            .chunks(32)
            .flat_map(|block| {
                let max = largest(block);
                codes(
                    block,
                    or_zero(127.0 / max),
                    f16::from_f32(max / 127.0).to_f32(),
                )
            })
            .collect(),
        Rounding::Q8K => row
            .chunks(256)
            .flat_map(|block| {
                let max = largest(block);
                let extreme = block
                    .iter()
                    .copied()
                    .find(|x| x.abs() == max)
                    .unwrap_or(0.0);
                let inverse = or_zero(-127.0 / extreme);
                codes(block, inverse, or_zero(1.0 / inverse))
            })
            .collect(),
        Rounding::RowInt8 => {
            let step = largest(row) / 127.0;
            codes(row, or_zero(1.0 / step), step)
        }
        Rounding::RowFloat8 => to_floats(row, largest(row) / 448.0, e4m3),
        Rounding::BlockFloat8(block) => row
            .chunks(block)
            .flat_map(|block| to_floats(block, largest(block) / 448.0, e4m3))
            .collect(),
        Rounding::StaticFloat8(scale) => to_floats(row, scale, e4m3),
        Rounding::Nvfp4(unit) => row
            .chunks(16)
            .flat_map(|block| to_floats(block, e4m3(largest(block) / 6.0 / unit) * unit, e2m1))
            .collect(),
        Rounding::StaticInt8(scale) => row
            .iter()
            .map(|x| (x * (1.0 / scale)).round_ties_even().clamp(-128.0, 127.0) * scale)
            .collect(),
    }
}

#[test]
fn inputs_as_runtimes_take_them() {
    let roundings = [
        Rounding::Bf16,
        Rounding::F16,
        Rounding::Q8_0,
        Rounding::Q8K,
        Rounding::RowInt8,
        Rounding::StaticInt8(0.01),
        Rounding::RowFloat8,
        Rounding::BlockFloat8(128),
        Rounding::StaticFloat8(0.01),
        Rounding::Nvfp4(0.001),
    ];
    for (name, device) in all() {
        for rounding in roundings {
            let width = 768;
            let mut values = numbers(3 * width, 7);
            values[..width].iter_mut().for_each(|x| *x *= 1e-6);
            values[width..width + 256].fill(0.0);
            values[2 * width + 5] = 3.0e4;
            let input = device.upload(&values).unwrap();
            let out = device.round_activation(&input, width, rounding).unwrap();
            let found = device.download(&out, 0..out.len()).unwrap();
            let expected: Vec<f32> = values
                .chunks(width)
                .flat_map(|row| rounded(row, rounding))
                .collect();
            let differing = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            // A quotient in another last bit may fall on the other side of a tie.
            assert!(
                differing <= 2,
                "{name} {rounding:?}: {differing} values differ"
            );
        }
    }
}
