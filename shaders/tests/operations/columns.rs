//! What columns come to, and how large values are.

use nemoconv_device::MagnitudeBins;

use crate::drivers::all;
use crate::numbers;

/// Rows and columns.
const SHAPES: [(usize, usize); 7] = [
    (0, 5),
    (1, 1),
    (7, 31),
    (8, 32),
    (13, 100),
    (513, 33),
    (1500, 3),
];
/// Largest difference of a sum in two floats, as a share of the sum of magnitudes.
const SUM: f64 = 1e-12;
/// The same of squares, each of which is rounded to f32.
const SQUARE: f64 = 6e-8;

#[test]
fn columns_come_to_what_loops_say() {
    for (name, device) in all() {
        for (rows, n) in SHAPES {
            let x = numbers(rows * n, 1);
            let array = device.upload(&x).unwrap();
            let found = device.column_sums(&array, n).unwrap();
            assert_eq!(found.sums.len(), n, "{name}");
            for column in 0..n {
                let of = || x.iter().skip(column).step_by(n).map(|x| f64::from(*x));
                let magnitude: f64 = of().map(f64::abs).sum();
                let (sum, square): (f64, f64) = (of().sum(), of().map(|x| x * x).sum());
                let largest = of().fold(0.0, |max: f64, x| max.max(x.abs()));
                let place = format!("{name}: column {column} of {rows} x {n}");
                let (a, b) = (found.sums[column], found.squares[column]);
                assert!((a - sum).abs() <= SUM * magnitude, "{place}: {a} {sum}");
                assert!(
                    (b - square).abs() <= SQUARE * square,
                    "{place}: {b} {square}"
                );
                assert_eq!(f64::from(found.max_abs[column]), largest, "{place}");
            }
        }
    }
}

#[test]
fn what_is_not_a_number_shows_in_its_column_alone() {
    for (name, device) in all() {
        let (rows, n) = (600, 40);
        for odd in [f32::NAN, f32::INFINITY] {
            let mut x = numbers(rows * n, 2);
            x[530 * n + 33] = odd;
            let found = device.column_sums(&device.upload(&x).unwrap(), n).unwrap();
            for column in 0..n {
                let is_finite = found.sums[column].is_finite() && found.squares[column].is_finite();
                assert_eq!(is_finite, column != 33, "{name}: {odd}, column {column}");
            }
            assert_eq!(found.max_abs[33].is_finite(), odd.is_nan(), "{name}: {odd}");
        }
    }
}

/// Bins of 16 per factor of two, from 2^-24 on.
const BINS: MagnitudeBins = MagnitudeBins {
    shift: 19,
    least: (127 - 24) << 4,
};

#[test]
fn every_magnitude_is_in_its_bin() {
    for (name, device) in all() {
        for len in [0, 1, 255, 16_385, 70_001] {
            let scale =
                |(i, x): (usize, f32)| x * 2.0_f32.powi(i32::try_from(i % 90).unwrap() - 40);
            let mut x: Vec<f32> = numbers(len, 3).into_iter().enumerate().map(scale).collect();
            let oddities = [f32::NAN, f32::NEG_INFINITY, -0.0, 1e-40, -3.0e38];
            let places = x.iter_mut().rev().zip(oddities);
            places.for_each(|(x, odd)| *x = odd);
            let mut expected = vec![0; MagnitudeBins::COUNT];
            for x in x.iter().filter(|x| x.is_finite()) {
                let bin = (x.abs().to_bits() >> BINS.shift).saturating_sub(BINS.least) as usize;
                expected[bin.min(MagnitudeBins::COUNT - 1)] += 1;
            }
            let found = device.magnitude_counts(&device.upload(&x).unwrap(), BINS);
            assert!(found.unwrap() == expected, "{name}: {len} values");
        }
    }
}
