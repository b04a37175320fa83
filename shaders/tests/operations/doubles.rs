//! Products in f64, to the bit, on devices that have f64.

use nemoconv_device::Device;

use crate::drivers::all;
use crate::numbers;

fn doubles(count: usize, seed: u64) -> Vec<f64> {
    let (high, low) = (numbers(count, seed), numbers(count, seed + 100));
    let pairs = high.into_iter().zip(low);
    pairs
        .map(|(high, low)| f64::from(high) + f64::from(low) * 1e-9)
        .collect()
}

/// Rows, runs of columns and their size, or the other way round.
const SHAPES: [[usize; 3]; 7] = [
    [1, 1, 1],
    [3, 5, 1],
    [67, 1, 70],
    [5, 3, 33],
    [65, 2, 64],
    [130, 1, 16],
    [0, 2, 3],
];

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn those_with_f64() -> impl Iterator<Item = (String, Device)> {
    all().into_iter().filter(|(_, device)| device.has_f64())
}

#[test]
fn columns_of_runs_are_mixed() {
    for (name, device) in those_with_f64() {
        for [rows, runs, size] in SHAPES {
            let width = runs * size;
            let (x, q) = (doubles(rows * width, 1), doubles(size * size, 2));
            let (before, after) = (doubles(width, 3), doubles(width, 4));
            let mut expected = Vec::new();
            for (row, j) in (0..rows).flat_map(|row| (0..width).map(move |j| (row, j))) {
                let mut sum = 0.0;
                for k in j / size * size..(j / size + 1) * size {
                    let factor = before[k] * q[k % size * size + j % size] * after[j];
                    sum += x[row * width + k] * factor;
                }
                expected.push(sum);
            }
            let [x, q, before, after] =
                [&x, &q, &before, &after].map(|values| device.upload_doubles(values).unwrap());
            let found = device.mix_columns(&x, &q, &before, &after).unwrap();
            let found = device.download_doubles(&found).unwrap();
            assert!(
                bits(&found) == bits(&expected),
                "{name} {rows} {runs} {size}"
            );
        }
    }
}

#[test]
fn rows_of_runs_are_mixed() {
    for (name, device) in those_with_f64() {
        for [width, runs, size] in SHAPES {
            let rows = runs * size;
            let (x, q, before) = (
                doubles(rows * width, 1),
                doubles(size * size, 2),
                doubles(rows, 3),
            );
            let mut expected = Vec::new();
            for (i, column) in (0..rows).flat_map(|i| (0..width).map(move |column| (i, column))) {
                let mut sum = 0.0;
                for k in i / size * size..(i / size + 1) * size {
                    let inner = before[k] * x[k * width + column];
                    sum += q[k % size * size + i % size] * inner;
                }
                expected.push(sum);
            }
            let [x, q, before] =
                [&x, &q, &before].map(|values| device.upload_doubles(values).unwrap());
            let found = device.mix_rows(&x, &q, &before).unwrap();
            let found = device.download_doubles(&found).unwrap();
            assert!(
                bits(&found) == bits(&expected),
                "{name} {width} {runs} {size}"
            );
        }
    }
}

#[test]
fn floats_are_widened() {
    for (name, device) in those_with_f64() {
        for (rows, width) in [(0, 3), (1, 1), (7, 45), (300, 2)] {
            let x = numbers(rows * width, 1);
            let (before, after) = (doubles(width, 2), doubles(width, 3));
            let values = x.iter().enumerate();
            let expected: Vec<f64> = values
                .map(|(at, x)| f64::from(*x) * before[at % width] * after[at % width])
                .collect();
            let x = device.upload(&x).unwrap();
            let [before, after] =
                [&before, &after].map(|values| device.upload_doubles(values).unwrap());
            let found = device.widen(&x, &before, &after).unwrap();
            let found = device.download_doubles(&found).unwrap();
            assert!(bits(&found) == bits(&expected), "{name} {rows} {width}");
        }
    }
}
