//! Kernels that take rows of logits as distributions: parts of rows, values before and behind them, what is no number.

use std::ops::Range;

use nemoconv_device::kernels;

use crate::reference::{bits, floats, unknown, values};
use crate::run;

/// A sum of some hundred exponentials, relative to the sum of their magnitudes.
const SUM: f64 = 5e-7;

/// Rows of logits behind `first` other values, and the parts of so many values that they are cut into.
struct Logits {
    first: usize,
    stride: usize,
    values: Vec<f32>,
}

const LOGIT_ROWS: usize = 3;

impl Logits {
    fn new(first: usize, stride: usize, seed: u64) -> Self {
        let values = values(first + LOGIT_ROWS * stride, seed);
        let values = values.iter().map(|x| x * 9.0).collect();
        Self {
            first,
            stride,
            values,
        }
    }

    /// Where each part of the first `width` values of each row is.
    fn parts(&self, width: usize, part: usize) -> Vec<Range<usize>> {
        let begins =
            (0..LOGIT_ROWS).flat_map(|row| (0..width).step_by(part).map(move |c| (row, c)));
        let of_row = |row| self.first + row * self.stride;
        begins
            .map(|(row, c)| of_row(row) + c..of_row(row) + width.min(c + part))
            .collect()
    }

    /// Four words of every part, as the kernel gives them.
    fn sums(&self, width: usize, part: usize) -> Vec<u32> {
        let sizes = [LOGIT_ROWS, width, self.stride, self.first, part, 0].map(|size| size as u32);
        let items = self.parts(width, part).len();
        let views = [bits(&self.values), unknown(4 * items)];
        run(&kernels::SOFTMAX_SUMS, items as u32 + 2, &views, &sizes)[1].clone()
    }
}

/// Width and part: no whole part, several, one, a single value.
const CUTS: [(usize, usize); 4] = [(70, 100), (201, 67), (128, 64), (1, 64)];

#[test]
fn softmax_sums() {
    for (width, part) in CUTS {
        let mut logits = Logits::new(5, width + 3, 1);
        // Equal values, in two parts or one.
        let equal = [width / 2, width - 1].map(|c| 5 + c);
        equal.iter().for_each(|at| logits.values[*at] = 20.0);
        let found = logits.sums(width, part);
        for (words, place) in found.chunks(4).zip(logits.parts(width, part)) {
            let values = &logits.values[place.clone()];
            let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let best = values.iter().position(|x| *x == max).unwrap();
            let column = (place.start - 5) % (width + 3) + best;
            assert_eq!((words[0], words[1]), (max.to_bits(), column as u32));
            let terms = values
                .iter()
                .map(|x| (f64::from(*x) - f64::from(max)).exp());
            let pair = floats(&words[2..]);
            let sum = f64::from(pair[0]) + f64::from(pair[1]);
            let expected: f64 = terms.sum();
            assert!((sum / expected - 1.0).abs() < SUM, "{sum}, {expected}");
        }
    }
}

#[test]
fn softmax_sums_of_what_is_not_a_number() {
    for odd in [f32::NAN, f32::INFINITY] {
        let mut logits = Logits::new(0, 201, 1);
        logits.values[201 + 67] = odd;
        let found = logits.sums(201, 67);
        let is_nan = |words: &[u32]| f32::from_bits(words[2]).is_nan();
        let odd: Vec<bool> = found.chunks(4).map(is_nan).collect();
        let expected: Vec<bool> = (0..9).map(|part| part == 4).collect();
        assert_eq!(odd, expected);
    }
}

#[test]
fn kl_divergence() {
    for (width, part) in CUTS {
        let (x, y) = (Logits::new(5, width + 3, 1), Logits::new(2, width, 2));
        let x_sums = x.sums(width, part);
        let parts = x.parts(width, part);
        let sizes = [
            LOGIT_ROWS, width, x.stride, x.first, y.stride, y.first, part, 0,
        ];
        let views = [
            bits(&x.values),
            bits(&y.values),
            x_sums.clone(),
            unknown(2 * parts.len()),
        ];
        let groups = parts.len() as u32 + 2;
        let sizes = sizes.map(|size| size as u32);
        let found = floats(&run(&kernels::KL_DIVERGENCE, groups, &views, &sizes)[3]);
        let parts = parts.into_iter().zip(y.parts(width, part));
        for ((pair, words), (of_x, of_y)) in found.chunks(2).zip(x_sums.chunks(4)).zip(parts) {
            let max = f64::from(f32::from_bits(words[0]));
            let pairs = x.values[of_x].iter().zip(&y.values[of_y]);
            let pairs = pairs.map(|(x, y)| (f64::from(*x), f64::from(*y)));
            let terms = pairs.map(|(x, y)| (x - max).exp() * (x - y));
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, magnitude), term| {
                (sum + term, magnitude + term.abs())
            });
            let deviation = (f64::from(pair[0]) + f64::from(pair[1]) - sum).abs();
            assert!(deviation <= SUM * magnitude, "{pair:?}, expected {sum}");
        }
    }
}
