//! Value by value, copies.

use nemoconv::backend::Backend;

use super::reference::{TOLERANCE, check, f64s, numbers};
use super::{on_each, upload};

/// More values than a task of the processor or a group of a device has.
const LENGTHS: [usize; 5] = [0, 1, 255, 257, 20_001];

/// The same, some of which are no numbers where there are enough.
fn with_oddities(len: usize, seed: u64) -> Vec<f32> {
    let mut values = numbers(len, seed);
    let oddities = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0];
    if len > oddities.len() {
        values[len - oddities.len()..].copy_from_slice(&oddities);
    }
    values
}

#[test]
fn values_alone() {
    on_each(|name, machine| {
        for len in LENGTHS {
            let (x, y) = (with_oddities(len, 1), numbers(len, 2));
            let mut squared = upload(machine, &x);
            machine.relu_squared(&mut squared).unwrap();
            // `max` would hide a NaN.
            let positive = |x: f64| if x < 0.0 { 0.0 } else { x };
            let expected = f64s(&x).into_iter().map(positive).map(|x| x * x);
            let found = machine.download_all(squared).unwrap();
            check(name, &found, &expected.collect::<Vec<_>>(), TOLERANCE);

            let factor = -0.3_f32;
            let mut scaled = upload(machine, &x);
            machine.scale(&mut scaled, factor).unwrap();
            let expected = f64s(&x).into_iter().map(|x| x * f64::from(factor));
            let found = machine.download_all(scaled).unwrap();
            check(name, &found, &expected.collect::<Vec<_>>(), TOLERANCE);

            let mut sum = upload(machine, &y);
            machine.add(&mut sum, &upload(machine, &x)).unwrap();
            let pairs = f64s(&x).into_iter().zip(f64s(&y));
            let expected: Vec<f64> = pairs.map(|(x, y)| x + y).collect();
            let found = machine.download_all(sum).unwrap();
            check(name, &found, &expected, TOLERANCE);
        }
    });
}

#[test]
fn biases() {
    on_each(|name, machine| {
        for (rows, width) in [(0, 19), (1, 1), (37, 19), (3, 300)] {
            let (x, bias) = (with_oddities(rows * width, 1), numbers(width, 2));
            let mut sum = upload(machine, &x);
            machine.add_bias(&mut sum, &upload(machine, &bias)).unwrap();
            let values = f64s(&x).into_iter().enumerate();
            let expected: Vec<f64> = values
                .map(|(i, x)| x + f64::from(bias[i % width]))
                .collect();
            let found = machine.download_all(sum).unwrap();
            check(name, &found, &expected, TOLERANCE);
        }
    });
}

#[test]
fn finite_or_not() {
    on_each(|name, machine| {
        for len in LENGTHS {
            let mut values = numbers(len, 3);
            let is_finite = |values: &[f32]| machine.is_finite(&upload(machine, values)).unwrap();
            assert!(is_finite(&values), "{name}, {len}");
            let Some(last) = len.checked_sub(1) else {
                continue;
            };
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[last] = odd;
                assert!(!is_finite(&values), "{name}, {odd}");
            }
        }
    });
}

#[test]
fn copies_are_copies() {
    on_each(|name, machine| {
        for len in LENGTHS {
            let values = numbers(len, 4);
            let original = upload(machine, &values);
            assert_eq!(machine.len(&original), len, "{name}");
            let mut copy = machine.duplicate(&original).unwrap();
            machine.scale(&mut copy, 0.5).unwrap();
            let part = len / 3..len;
            let found = machine.download(&original, part.clone()).unwrap();
            assert_eq!(found, values[part], "{name}");
            assert_eq!(machine.download_all(original).unwrap(), values, "{name}");
            let halves: Vec<f32> = values.iter().map(|x| x * 0.5).collect();
            assert_eq!(machine.download_all(copy).unwrap(), halves, "{name}");
            let zeros = machine.zeros(len).unwrap();
            assert_eq!(
                machine.download_all(zeros).unwrap(),
                vec![0.0; len],
                "{name}"
            );
        }
    });
}
