//! Backwards through the causal depthwise convolution and its SiLU.
//!
//! With `p_t = b + sum_k w_k x_{t-K+1+k}` and `e_t = gradient_t silu'(p_t)`: `dx_s = sum_k w_k e_{s+K-1-k}`.

use std::ops::Range;

use super::{Channels, silu};
use crate::parallel;

/// The gradient at the channels `input [rows, channels]`; see [`crate::backend::Backend::conv1d_silu`].
pub fn conv1d_silu(
    input: Channels,
    weight: &[f32],
    bias: &[f32],
    sequences: &[Range<usize>],
    gradient: &[f32],
) -> Vec<f32> {
    let channels = bias.len();
    let taps = weight.len() / channels;
    let tap = |tap: usize| weight.iter().skip(tap).step_by(taps).copied().collect();
    let by_tap: Vec<Vec<f32>> = (0..taps).map(tap).collect();
    let mut out = gradient.to_vec();
    for sequence in sequences {
        let own = sequence.start * channels..sequence.end * channels;
        let mut before_silu = gradient[own.clone()].to_vec();
        let rows = before_silu.chunks_mut(channels).enumerate();
        parallel::for_each(rows, |(t, gradient)| {
            let mut sums = bias.to_vec();
            for (tap, weight) in by_tap.iter().enumerate() {
                if let Some(source) = (t + 1 + tap).checked_sub(taps) {
                    add_products(
                        &mut sums,
                        weight,
                        input.row(sequence.start + source, channels),
                    );
                }
            }
            let slopes = gradient.iter_mut().zip(&sums);
            slopes.for_each(|(gradient, sum)| *gradient *= silu(*sum).1);
        });
        let rows = out[own].chunks_mut(channels).enumerate();
        parallel::for_each(rows, |(s, out)| {
            out.fill(0.0);
            for (tap, weight) in by_tap.iter().enumerate() {
                let reached = (s + taps - 1 - tap) * channels;
                if let Some(gradient) = before_silu.get(reached..reached + channels) {
                    add_products(out, weight, gradient);
                }
            }
        });
    }
    out
}

fn add_products(sums: &mut [f32], weight: &[f32], x: &[f32]) {
    for ((sum, weight), x) in sums.iter_mut().zip(weight).zip(x) {
        *sum += weight * x;
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::{self, check, values};
    use super::*;

    const CHANNELS: usize = 3;
    const STRIDE: usize = 5;
    const TAPS: usize = 4;

    fn loss(x: &[f64], weight: &[f32], bias: &[f32], gradient: &[f32]) -> f64 {
        let mut sum = 0.0;
        for sequence in [0..2, 2..9] {
            for (t, channel) in sequence
                .clone()
                .flat_map(|t| (0..CHANNELS).map(move |channel| (t, channel)))
            {
                let mut inside = f64::from(bias[channel]);
                for tap in 0..TAPS {
                    let source = (t + tap + 1).checked_sub(TAPS);
                    if let Some(source) = source.filter(|source| sequence.contains(source)) {
                        let weight = f64::from(weight[channel * TAPS + tap]);
                        inside += weight * x[source * CHANNELS + channel];
                    }
                }
                let outside = f64::from(gradient[t * CHANNELS + channel]);
                sum += outside * differences::silu(inside);
            }
        }
        sum
    }

    #[test]
    fn sequences_are_apart() {
        let wide = values(9 * STRIDE, 1);
        let (weight, bias) = (values(CHANNELS * TAPS, 2), values(CHANNELS, 3));
        let gradient = values(9 * CHANNELS, 4);
        let input = Channels {
            values: &wide,
            stride: STRIDE,
            first: 1,
        };
        let narrow: Vec<f32> = (0..9)
            .flat_map(|row| input.row(row, CHANNELS).to_vec())
            .collect();
        let found = conv1d_silu(input, &weight, &bias, &[0..2, 2..9], &gradient);
        check(&narrow, &found, |x| loss(x, &weight, &bias, &gradient));
    }
}
