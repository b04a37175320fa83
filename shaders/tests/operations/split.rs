//! Products of F32 in parts of BF16: with weights as they are stored, of values of every size, and which are computed so.

use half::bf16;
use nemoconv_device::{Array, Device, MatmulLayout, Packing, Splitting};

use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

fn devices() -> impl Iterator<Item = (String, Device)> {
    let devices = all().into_iter();
    devices.map(|(name, device)| (name, device.with_splitting(Splitting::Always)))
}

/// Largest error of a sum, relative to the magnitudes that it is of.
const OF_MAGNITUDES: f64 = 1e-6;

/// `X Y^T` of `rows` and `columns` rows of `inner` values.
fn product(device: &Device, x: &[f32], y: &[f32], inner: usize) -> Vec<f32> {
    let (rows, columns) = (x.len() / inner, y.len() / inner);
    let layout = MatmulLayout::linear(rows, inner, columns, 0, columns);
    let [x, y] = [x, y].map(|values| device.upload(values).unwrap());
    let mut out = device.zeros(rows * columns).unwrap();
    device.matmul(&layout, &x, &y, &mut out).unwrap();
    device.download_all(&out).unwrap()
}

#[test]
fn products_of_parts_with_stored_weights() {
    // Rows, columns, inner, weights before the first.
    let sizes = [
        (1, 3, 7, 1),
        (130, 5, 33, 3),
        (3, 131, 264, 0),
        (66, 33, 40, 8),
        (2, 4, 0, 0),
        (0, 4, 32, 0),
    ];
    for (name, device) in devices() {
        for (rows, columns, inner, before) in sizes {
            let x = numbers(rows * inner, 1);
            let weights = numbers(before + columns * inner, 2);
            let weights: Vec<bf16> = weights.into_iter().map(bf16::from_f32).collect();
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            let (first_column, out_row) = (2, columns + 3);
            let untouched = numbers(rows * out_row, 3);
            let mut expected: Vec<f64> = untouched.iter().map(|x| f64::from(*x)).collect();
            for i in 0..rows {
                for j in 0..columns {
                    let weight = |k: usize| weights[before + j * inner + k].to_f64();
                    let product = |k| f64::from(x[i * inner + k]) * weight(k);
                    expected[i * out_row + first_column + j] = (0..inner).map(product).sum();
                }
            }
            let x = device.upload(&x).unwrap();
            let bytes = device.upload_bytes(&bytes).unwrap();
            let packed = device.pack(&x, rows, inner, Packing::Parts).unwrap();
            let mut out = device.upload(&untouched).unwrap();
            let (first, place) = (2 * before as u64, [first_column, out_row]);
            device
                .matmul_stored(&packed, &bytes, first, columns, place, &mut out)
                .unwrap();
            let found = device.download_all(&out).unwrap();
            let case = format!("{name} {rows} {columns} {inner}");
            check(&case, &found, &expected, TOLERANCE);
        }
    }
}

/// Values times a unit matrix are what they were: nothing is lost from 2^-110 on, nor where the nearest BF16 is infinite.
#[test]
fn parts_make_up_the_whole_value() {
    let width = 64;
    let extremes = [
        f32::MAX,
        -f32::MAX,
        f32::from_bits(0x7f7f_8000),
        f32::from_bits(0x7f7f_7fff),
        1.0 + f32::EPSILON,
        -1.0 + f32::EPSILON / 2.0,
        f32::from_bits(0x3f80_8000),
        f32::from_bits(0x3f80_7fff),
        f32::from_bits(0x3f80_80ff),
        -f32::from_bits(0x3fff_ffff),
        2.0_f32.powi(-110) * 1.999_999_9,
        -2.0_f32.powi(-109) * 1.111_111,
        0.0,
        -0.0,
    ];
    let mut values = numbers(2 * width, 6);
    values[width..][..extremes.len()].copy_from_slice(&extremes);
    let mut unit = vec![0.0; width * width];
    (0..width).for_each(|k| unit[k * width + k] = 1.0);
    for (name, device) in devices() {
        assert_eq!(product(&device, &values, &unit, width), values, "{name}");
        let transposed = product(&device, &unit, &values, width);
        let column = |row: usize| (0..width).map(move |k| (k, row));
        let found: Vec<f32> = (0..2)
            .flat_map(column)
            .map(|(k, row)| transposed[2 * k + row])
            .collect();
        assert_eq!(found, values, "{name}");
    }
}

/// Sizes of values from 2^-60 to 2^60, of small values beside large ones: as good as products of whole values.
#[test]
fn values_of_every_size() {
    let (rows, columns, inner) = (5, 7, 96);
    for (name, device) in devices() {
        for exponent in [-60, -20, 0, 20, 60] {
            let scaled = |values: Vec<f32>, step: i32| -> Vec<f32> {
                let values = values.into_iter().enumerate();
                values
                    .map(|(i, x)| x * 2.0_f32.powi(exponent - step * (i % 9) as i32))
                    .collect()
            };
            let x = scaled(numbers(rows * inner, 1), 3);
            let y = scaled(numbers(columns * inner, 2), 2);
            let found = product(&device, &x, &y, inner);
            for (at, found) in found.iter().enumerate() {
                let term = |k: usize| {
                    let [x, y] = [x[at / columns * inner + k], y[at % columns * inner + k]];
                    f64::from(x) * f64::from(y)
                };
                let sum: f64 = (0..inner).map(term).sum();
                let magnitude: f64 = (0..inner).map(|k| term(k).abs()).sum();
                let error = (f64::from(*found) - sum).abs() / magnitude;
                assert!(
                    error <= OF_MAGNITUDES,
                    "{name} 2^{exponent}: {error:e} at {at}"
                );
            }
        }
    }
}

/// What is not a number is none afterwards, and stays in its row and column.
#[test]
fn values_that_are_no_numbers() {
    let (rows, columns, inner) = (4, 3, 40);
    for (name, device) in devices() {
        let mut x = numbers(rows * inner, 1);
        let mut y = numbers(columns * inner, 2);
        // Not quiet, and in no bit that BF16 keeps.
        x[7] = f32::from_bits(0x7f80_0001);
        x[inner + 3] = f32::INFINITY;
        y[2 * inner + 39] = f32::NEG_INFINITY;
        let found = product(&device, &x, &y, inner);
        for (at, found) in found.iter().enumerate() {
            let (i, j) = (at / columns, at % columns);
            assert_eq!(
                found.is_finite(),
                i > 1 && j < 2,
                "{name}: {found} at [{i}, {j}]"
            );
            assert!(i > 0 || found.is_nan(), "{name}: {found} at [{i}, {j}]");
        }
    }
}

/// Rows of an operand that is split once.
#[test]
fn rows_of_an_operand_in_parts() {
    let (rows, columns, inner) = (150, 6, 50);
    let (x, y) = (numbers(rows * inner, 1), numbers(columns * inner, 2));
    for (name, device) in devices() {
        let [x_there, y_there] = [&x, &y].map(|values| device.upload(values).unwrap());
        let split = |values: &Array, rows| device.try_split(values, [0, inner, 1], rows, inner);
        let x_parts = split(&x_there, rows).unwrap().unwrap();
        let y_parts = split(&y_there, columns).unwrap().unwrap();
        let mut out = device.zeros(rows * columns).unwrap();
        for part in [0..20, 20..149, 149..150] {
            let place = [part.start * columns, columns];
            device
                .matmul_split(&x_parts, part, &y_parts, [1.0, 0.0], place, &mut out)
                .unwrap();
        }
        let found = device.download_all(&out).unwrap();
        assert_eq!(found, product(&device, &x, &y, inner), "{name}");
    }
}

#[test]
fn large_products_of_many_uses_are_split() {
    for (_, device) in all() {
        let splits = |splitting, sizes: [usize; 3]| {
            let device = device.clone().with_splitting(splitting);
            let [rows, columns, inner] = sizes;
            [
                device.splits(rows, columns, inner),
                device.splits_inputs(rows, columns, inner),
            ]
        };
        let large = [512, 4096, 4096];
        assert_eq!(splits(Splitting::Never, large), [false, false]);
        assert_eq!(splits(Splitting::Always, [1, 1, 1]), [true, true]);
        assert_eq!(splits(Splitting::WherePays, large), [true, true]);
        assert_eq!(
            splits(Splitting::WherePays, [100, 4096, 4096]),
            [false, true]
        );
        assert_eq!(
            splits(Splitting::WherePays, [16, 131_072, 4096]),
            [false, false]
        );
        assert_eq!(
            splits(Splitting::WherePays, [256, 256, 2047]),
            [false, false]
        );
    }
}
