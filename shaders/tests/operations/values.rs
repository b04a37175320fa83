//! Value by value, copies, and memory.

use nemoconv_device::{Device, DeviceError, DeviceName, open};

use crate::drivers::all;
use crate::{check, numbers};

const LENGTHS: [usize; 5] = [0, 1, 255, 257, 70_001];

fn with_oddities(mut values: Vec<f32>) -> Vec<f32> {
    let oddities = [f32::NAN, f32::INFINITY, -0.0, 1e-40, -3.0e38];
    values
        .iter_mut()
        .zip(oddities)
        .for_each(|(value, odd)| *value = odd);
    values
}

#[test]
fn value_by_value() {
    for (name, device) in all() {
        for len in LENGTHS {
            let (x, y) = (with_oddities(numbers(len, 1)), numbers(len, 2));
            let mut squared = device.upload(&x).unwrap();
            device.relu_squared(&mut squared).unwrap();
            let square = |x: &f32| {
                if x.is_nan() {
                    f32::NAN
                } else {
                    x.max(0.0) * x.max(0.0)
                }
            };
            compare(
                &name,
                &device.download(&squared, 0..len).unwrap(),
                x.iter().map(square),
            );

            let mut scaled = device.upload(&y).unwrap();
            device.scale(&mut scaled, -0.3).unwrap();
            compare(
                &name,
                &device.download(&scaled, 0..len).unwrap(),
                y.iter().map(|y| y * -0.3),
            );

            let mut sum = device.upload(&y).unwrap();
            let added = device.upload(&x).unwrap();
            device.add(&mut sum, &added).unwrap();
            let sums = x.iter().zip(&y).map(|(x, y)| x + y);
            compare(&name, &device.download(&sum, 0..len).unwrap(), sums);
        }
    }
}

/// Values of more memory than any device has.
const TOO_MANY: usize = 1 << 44;

#[test]
fn memory_that_is_not_there_is_refused() {
    for (name, _) in all() {
        let Ok(chosen) = name.parse::<DeviceName>() else {
            continue;
        };
        let device = Device::new(open(chosen).unwrap(), None);
        let refused = device.uninitialized(TOO_MANY).map(|array| array.len());
        let is_refused = matches!(refused, Err(DeviceError::OutOfMemory { .. }));
        assert!(is_refused, "{name}: {refused:?}");
        check(
            &name,
            &device.download_all(&device.zeros(1).unwrap()).unwrap(),
            &[0.0],
            0.0,
        );
    }
}

#[test]
fn spare_values_give_way_unless_they_are_used() {
    for (name, _) in all() {
        let Ok(chosen) = name.parse::<DeviceName>() else {
            continue;
        };
        let device = Device::new(open(chosen).unwrap(), Some(3 << 20));
        let megabyte = || device.zeros(1 << 18).unwrap();
        let [first, second] = [megabyte(), megabyte()].map(|array| device.spare(array));
        let used = second.get();
        let more = [megabyte(), megabyte()];
        assert!(first.get().is_none() && used.is_some(), "{name}");
        let refused = device.zeros(1 << 18).map(|array| array.len());
        assert!(
            matches!(refused, Err(DeviceError::OutOfMemory { .. })),
            "{name}: {refused:?}"
        );
        drop(used);
        let last = megabyte();
        assert_eq!(device.traffic().given_up, 2, "{name}");
        assert_eq!((more.len(), last.len()), (2, 1 << 18), "{name}");
    }
}

/// The same bits, but for what a NaN carries and what is too small to be normal.
#[track_caller]
fn compare(device: &str, found: &[f32], expected: impl Iterator<Item = f32>) {
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_same = found.to_bits() == expected.to_bits()
            || found.is_nan() && expected.is_nan()
            || found.abs() < 1e-37 && expected.abs() < 1e-37;
        assert!(
            is_same,
            "{device}: value {index} is {found}, expected {expected}"
        );
    }
}

#[test]
fn accumulated_sums_lose_nothing() {
    for (name, device) in all() {
        for len in LENGTHS {
            let (large, small) = (numbers(len, 1), numbers(len, 2));
            let [first, then] = [&large, &small].map(|values| device.upload(values).unwrap());
            let mut sums = device.zeros(2 * len).unwrap();
            let calls = 300;
            for _ in 0..calls {
                device.accumulate(&mut sums, &first).unwrap();
                device.accumulate(&mut sums, &then).unwrap();
            }
            let found = device.download(&sums, 0..2 * len).unwrap();
            for (index, pair) in found.chunks_exact(2).enumerate() {
                let terms = [large[index], small[index]].map(f64::from);
                let sum = f64::from(calls) * (terms[0] + terms[1]);
                let deviation = (f64::from(pair[0]) + f64::from(pair[1]) - sum).abs();
                let magnitude = f64::from(calls) * (terms[0].abs() + terms[1].abs());
                // Sums in f32 would be off by 1e-6 and more.
                assert!(
                    deviation <= 1e-11 * magnitude,
                    "{name}: {pair:?} at {index}, expected {sum}"
                );
            }
        }
    }
}

#[test]
fn finite_or_not() {
    for (name, device) in all() {
        for len in [1, 300, 70_001] {
            let mut values = numbers(len, 3);
            let is_finite = |values: &[f32]| {
                let array = device.upload(values).unwrap();
                device.is_finite(&array).unwrap()
            };
            assert!(is_finite(&values), "{name}");
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[len - 1] = odd;
                assert!(!is_finite(&values), "{name} {odd}");
            }
        }
    }
}

#[test]
fn copies_are_copies() {
    for (name, device) in all() {
        let values = numbers(1000, 4);
        let original = device.upload(&values).unwrap();
        let mut copy = device.duplicate(&original).unwrap();
        device.scale(&mut copy, 0.0).unwrap();
        assert_eq!(
            device.download(&original, 3..1000).unwrap(),
            values[3..],
            "{name}"
        );
        let mut grown = device.zeros(2).unwrap();
        for first in (0..1000).step_by(100) {
            device
                .append(&mut grown, &original, first..first + 100)
                .unwrap();
        }
        let all = device.download(&grown, 0..grown.len()).unwrap();
        assert_eq!(all, [&[0.0, 0.0], &values[..]].concat(), "{name}");
    }
}

#[test]
fn bytes_of_any_length_and_place() {
    for (name, device) in all() {
        let mut bytes = device.upload_bytes(&[1, 2, 3, 4, 5, 6, 7]).unwrap();
        device.write_bytes(&mut bytes, 4, &[9, 9, 9]).unwrap();
        assert_eq!(bytes.len(), 7, "{name}");
    }
}

#[test]
fn memory_beyond_the_budget_is_refused_and_idle_memory_used_again() {
    for (name, _) in all() {
        let Ok(chosen) = name.parse::<DeviceName>() else {
            continue;
        };
        let device = Device::new(open(chosen).unwrap(), Some(3 << 20));
        for _ in 0..20 {
            device.zeros(1 << 18).unwrap();
        }
        let held = device.zeros(1 << 18).unwrap();
        // Idle memory of one size makes room for another.
        device.zeros(1 << 19).unwrap();
        let refused = device.zeros(1 << 19 | 1).map(|array| array.len());
        assert!(
            matches!(refused, Err(DeviceError::OutOfMemory { .. })),
            "{refused:?}"
        );
        check(&name, &device.download(&held, 0..1).unwrap(), &[0.0], 0.0);
    }
}
