//! Rows of logits as distributions.

use nemoconv_device::{KlDivergence, LogitRows, SoftmaxSums};

use super::reference::{self, DIVERGENCE, EXPONENTIALS, softmax_sums};
use crate::drivers::all;
use crate::numbers;

/// Rows, values of a row that count, and the step to the next row of each side.
const SHAPES: [(usize, usize, [usize; 2]); 7] = [
    (0, 5, [5, 8]),
    (1, 1, [1, 1]),
    (3, 63, [63, 64]),
    (5, 101, [104, 101]),
    (1, 4096, [4096, 4096]),
    (2, 4097, [4097, 4104]),
    (3, 9001, [9008, 9001]),
];

#[track_caller]
fn check_sums(device: &str, found: SoftmaxSums, expected: SoftmaxSums) {
    let is_close = (found.sum / expected.sum - 1.0).abs() <= EXPONENTIALS;
    assert!(
        (found.max, found.best) == (expected.max, expected.best) && is_close,
        "{device}: {found:?}, expected {expected:?}"
    );
}

/// Compares rows of `x` and `y`, of which `width` values count.
#[track_caller]
fn check(
    name: &str,
    device: &nemoconv_device::Device,
    [x, y]: [&[f32]; 2],
    [x_stride, y_stride]: [usize; 2],
    width: usize,
) {
    let (on_x, on_y) = (device.upload(x).unwrap(), device.upload(y).unwrap());
    let [reference, other] =
        [(&on_x, x_stride), (&on_y, y_stride)].map(|(logits, stride)| LogitRows { logits, stride });
    let found = device.kl_divergence(reference, other, width).unwrap();
    assert_eq!(found.len(), x.len() / x_stride, "{name}");
    let rows = x.chunks(x_stride).zip(y.chunks(y_stride));
    for (found, (x, y)) in found.into_iter().zip(rows) {
        let KlDivergence {
            reference,
            other,
            kl_divergence,
        } = found;
        let (x, y) = (&x[..width], &y[..width]);
        check_sums(name, reference, softmax_sums(x));
        check_sums(name, other, softmax_sums(y));
        let expected = reference::kl_divergence(x, y);
        let deviation = (kl_divergence - expected).abs() / expected.max(1.0);
        assert!(
            deviation <= DIVERGENCE,
            "{name}: {kl_divergence}, expected {expected}"
        );
    }
    let alone = device.softmax_sums(&on_x, x_stride).unwrap();
    for (found, x) in alone.into_iter().zip(x.chunks(x_stride)) {
        check_sums(name, found, softmax_sums(x));
    }
}

#[test]
fn rows_of_every_shape() {
    for (name, device) in all() {
        for (rows, width, strides) in SHAPES {
            for scale in [0.01, 1.0, 8.0, 2000.0] {
                let [x, noise] = [(0, 1), (1, 2)].map(|(side, seed)| {
                    let values = numbers(rows * strides[side], seed);
                    values.iter().map(|x| x * scale).collect::<Vec<f32>>()
                });
                check(&name, &device, [&x, &noise], strides, width);
            }
        }
    }
}

/// A reference and what is left of it when its weights are rounded: a divergence that is small beside both entropies.
#[test]
fn distributions_that_are_close() {
    for (name, device) in all() {
        let width = 9001;
        let x: Vec<f32> = numbers(4 * width, 5).iter().map(|x| x * x * x).collect();
        for distance in [0.0, 1e-3, 0.1] {
            let noise = numbers(4 * width, 6);
            // A shift that all logits have in common changes nothing.
            let shifted = |(x, noise): (&f32, &f32)| x + distance * noise + 3.0;
            let y: Vec<f32> = x.iter().zip(&noise).map(shifted).collect();
            check(&name, &device, [&x, &y], [width, width], width);
        }
        let same = device.upload(&x).unwrap();
        let rows = LogitRows {
            logits: &same,
            stride: width,
        };
        let found = device.kl_divergence(rows, rows, width).unwrap();
        assert!(found.iter().all(|row| row.kl_divergence == 0.0), "{name}");
    }
}

/// Whichever part and whichever thread sees it.
#[test]
fn of_equal_logits_the_first_is_the_best() {
    for (name, device) in all() {
        let width = 9001;
        for places in [
            [0, 1],
            [63, 64],
            [70, 133],
            [4095, 4096],
            [200, 8999],
            [9000, 9000],
        ] {
            let mut logits = numbers(width, 7);
            places.iter().for_each(|place| logits[*place] = 5.0);
            let array = device.upload(&logits).unwrap();
            let found = device.softmax_sums(&array, width).unwrap();
            check_sums(&name, found[0], softmax_sums(&logits));
            assert_eq!(found[0].best, places[0], "{name}");
        }
        let equal = device.upload(&[-7.0; 300]).unwrap();
        let found = device.softmax_sums(&equal, 300).unwrap();
        assert_eq!((found[0].best, found[0].sum), (0, 300.0), "{name}");
    }
}

#[test]
fn what_is_not_a_number_shows_in_its_row_alone() {
    for (name, device) in all() {
        let width = 5000;
        for odd in [f32::NAN, f32::INFINITY] {
            for place in [0, 4095, 4999] {
                let mut x = numbers(3 * width, 8);
                x[width + place] = odd;
                let array = device.upload(&x).unwrap();
                let found = device.softmax_sums(&array, width).unwrap();
                assert!(found[1].sum.is_nan(), "{name}: {odd} at {place}: {found:?}");
                for row in [0, 2] {
                    check_sums(&name, found[row], softmax_sums(&x[row * width..][..width]));
                }
                if odd.is_nan() {
                    let rest: Vec<f32> = x[width..2 * width]
                        .iter()
                        .map(|x| if x.is_nan() { -9.0 } else { *x })
                        .collect();
                    let expected = softmax_sums(&rest);
                    let found = (found[1].max, found[1].best);
                    assert_eq!(found, (expected.max, expected.best), "{name}");
                }
                let good = device.upload(&numbers(3 * width, 9)).unwrap();
                let [x, y] = [&array, &good].map(|logits| LogitRows {
                    logits,
                    stride: width,
                });
                for (reference, other) in [(x, y), (y, x)] {
                    let found = device.kl_divergence(reference, other, width).unwrap();
                    let are_nan = found.iter().map(|row| row.kl_divergence.is_nan());
                    let are_nan: Vec<bool> = are_nan.collect();
                    assert_eq!(are_nan, [false, true, false], "{name}: {found:?}");
                }
            }
        }
    }
}
