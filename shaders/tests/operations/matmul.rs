//! Products in every layout, and second moments.

use nemoconv_device::{MatmulKernel, MatmulLayout, Splitting};

use super::reference;
use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

#[test]
fn products_of_every_layout() {
    let sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (33, 65, 257),
        (64, 64, 64),
        (70, 31, 600),
        (2, 200, 16),
        (5, 3, 0),
        (0, 4, 9),
        (4, 0, 9),
    ];
    let devices = all().into_iter().flat_map(|(name, device)| {
        let own = |kernel| {
            let device = device.clone().with_library_from(u64::MAX);
            let device = device.with_splitting(Splitting::Never);
            (format!("{name} {kernel:?}"), device.with_matmul(kernel))
        };
        let in_parts = device.clone().with_splitting(Splitting::Always);
        [
            own(MatmulKernel::Tiled),
            own(MatmulKernel::Direct),
            (format!("{name}, in parts"), in_parts),
            (format!("{name}, library"), device.with_library_from(0)),
        ]
    });
    for (name, device) in devices {
        for (rows, columns, inner) in sizes {
            let layouts = [
                MatmulLayout::linear(rows, inner, columns, 0, columns),
                MatmulLayout::linear(rows, inner, columns, 3, columns + 5),
                // B as it is; A transposed; offsets, and a part of what was there.
                MatmulLayout {
                    a: [2, 1, rows],
                    b: [1, columns, 1],
                    out: [4, columns + 1],
                    alpha: -0.5,
                    beta: 2.0,
                    ..MatmulLayout::linear(rows, inner, columns, 0, columns)
                },
            ];
            for layout in layouts {
                let a = numbers(rows * inner + 2, 1);
                let b = numbers(columns * inner + 1, 2);
                let before = numbers(rows * (columns + 5) + 4, 3);
                let expected = reference::matmul(&layout, &a, &b, &before);
                let [a, b] = [&a, &b].map(|values| device.upload(values).unwrap());
                let mut out = device.upload(&before).unwrap();
                device.matmul(&layout, &a, &b, &mut out).unwrap();
                let found = device.download(&out, 0..out.len()).unwrap();
                check(&format!("{name} {layout:?}"), &found, &expected, TOLERANCE);
            }
        }
    }
}

/// Products of inner values that are summed apart.
const PART: usize = 256;

/// To the bit, as this computer fuses them: magnitudes far apart and close together, sums that cancel.
#[test]
fn fused_products_are_rounded_once() {
    let (rows, columns) = (5, 7);
    for (name, device) in all() {
        let device = device.with_library_from(u64::MAX);
        let device = device.with_splitting(Splitting::Never);
        let device = device.with_matmul(MatmulKernel::Direct);
        for inner in [1, 2, 33, 700] {
            let spread = |values: Vec<f32>, step: usize| -> Vec<f32> {
                let scale = |at: usize| 2.0_f32.powi(i32::try_from(at * step % 41).unwrap() - 20);
                let values = values.into_iter().enumerate();
                values.map(|(at, x)| x * scale(at)).collect()
            };
            for step in [0, 7] {
                let a = spread(numbers(rows * inner, 1), step);
                let b = spread(numbers(columns * inner, 2), step);
                let layout = MatmulLayout {
                    is_fused: true,
                    ..MatmulLayout::linear(rows, inner, columns, 0, columns)
                };
                let [x, y] = [&a, &b].map(|values| device.upload(values).unwrap());
                let mut out = device.zeros(rows * columns).unwrap();
                device.matmul(&layout, &x, &y, &mut out).unwrap();
                let found = device.download_all(&out).unwrap();
                for (at, found) in found.iter().enumerate() {
                    let (a, b) = (&a[at / columns * inner..], &b[at % columns * inner..]);
                    let pairs: Vec<_> = a.iter().zip(b).take(inner).collect();
                    let parts = pairs.chunks(PART).map(|part| {
                        let add = |sum, (a, b): &(&f32, &f32)| a.mul_add(**b, sum);
                        part.iter().fold(0.0_f32, add)
                    });
                    let expected = parts.fold(0.0, |sum, part| sum + part);
                    assert_eq!(
                        found.to_bits(),
                        expected.to_bits(),
                        "{name}: {found}, expected {expected}, of {inner} products"
                    );
                }
            }
        }
    }
}

#[test]
fn second_moments_lose_nothing_between_calls() {
    let devices = all().into_iter().flat_map(|(name, device)| {
        [Splitting::Never, Splitting::Always].map(|splitting| {
            let device = device.clone().with_splitting(splitting);
            // Emulated tensor cores take their time.
            let most = if splitting == Splitting::Always {
                4
            } else {
                40
            };
            (format!("{name}, {splitting:?} in parts"), device, most)
        })
    });
    for (name, device, most) in devices {
        for (rows, n, calls) in [(1, 1, 40), (7, 33, 40), (530, 40, most)] {
            let values = numbers(rows * n, 5);
            let input = device.upload(&values).unwrap();
            let mut strips = [0..n / 3, n / 3..n].map(|strip| {
                let sums = device.zeros(2 * strip.len() * n).unwrap();
                (strip, sums)
            });
            for _ in 0..calls {
                device.gram(&input, n, &mut strips).unwrap();
            }
            let found = strips.map(|(_, sums)| device.download_all(&sums).unwrap());
            let found = found.concat();
            for i in 0..n {
                for j in i..n {
                    let product = |row: usize| {
                        f64::from(values[row * n + i]) * f64::from(values[row * n + j])
                    };
                    let exact: f64 = (0..rows).map(product).sum();
                    let magnitude: f64 = (0..rows).map(|row| product(row).abs()).sum();
                    let [high, low] = [0, 1].map(|part| f64::from(found[2 * (i * n + j) + part]));
                    let mean = (high + low) / f64::from(calls);
                    // What sums of 512 rows lose, and no more after forty calls.
                    assert!(
                        (mean - exact).abs() <= 1e-6 * magnitude,
                        "{name}: [{i}, {j}] is {mean}, expected {exact}"
                    );
                }
            }
        }
    }
}
