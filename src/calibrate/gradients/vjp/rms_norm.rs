//! Backwards through RMS norms, over a row or over groups of a gated one.
//!
//! With `v` of n values, `r = 1 / sqrt(mean(v^2) + eps)` and `e = gradient * weight`: `dv = r e - r^3 / n (e . v) v`.

use super::{Channels, silu};
use crate::backend::cpu::{dot, sum_of_squares};
use crate::parallel;

/// The gradient at `input [rows, weight.len()]`; see [`crate::backend::Backend::rms_norm`].
pub fn rms_norm(input: &[f32], weight: &[f32], eps: f32, gradient: &[f32]) -> Vec<f32> {
    let mut out = gradient.to_vec();
    let rows = out.chunks_mut(weight.len()).zip(input.chunks(weight.len()));
    parallel::for_each(rows, |(row, input)| normalize(input, weight, eps, row));
    out
}

/// The gradients at `y` and at the gate, `[rows, inner]` both; see [`crate::backend::Backend::gated_rms_norm`].
pub fn gated_rms_norm(
    y: &[f32],
    gate: Channels,
    weight: &[f32],
    groups: usize,
    eps: f32,
    gradient: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let inner = weight.len();
    let group = inner / groups;
    let (mut at_y, mut at_gate) = (gradient.to_vec(), vec![0.0; y.len()]);
    let rows = at_y
        .chunks_mut(inner)
        .zip(at_gate.chunks_mut(inner))
        .zip(y.chunks(inner))
        .enumerate();
    parallel::for_each(rows, |(row, ((at_y, at_gate), y))| {
        let gates: Vec<(f32, f32)> = gate
            .row(row, inner)
            .iter()
            .map(|gate| silu(*gate))
            .collect();
        let gated: Vec<f32> = y.iter().zip(&gates).map(|(y, gate)| y * gate.0).collect();
        let parts = at_y.chunks_exact_mut(group).zip(gated.chunks_exact(group));
        for ((gradient, gated), weight) in parts.zip(weight.chunks_exact(group)) {
            normalize(gated, weight, eps, gradient);
        }
        for (((at_y, at_gate), y), (value, slope)) in at_y.iter_mut().zip(at_gate).zip(y).zip(gates)
        {
            *at_gate = *at_y * y * slope;
            *at_y *= value;
        }
    });
    (at_y, at_gate)
}

/// Replaces the gradient at the normed values by that at the values.
fn normalize(values: &[f32], weight: &[f32], eps: f32, gradient: &mut [f32]) {
    let len = values.len() as f32;
    let scale = 1.0 / (sum_of_squares(values) / len + eps).sqrt();
    let weighted = gradient.iter_mut().zip(weight);
    weighted.for_each(|(gradient, weight)| *gradient *= weight);
    let along = dot(gradient, values) * scale * scale / len;
    for (gradient, value) in gradient.iter_mut().zip(values) {
        *gradient = scale * (*gradient - along * value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::{check, dot, silu, values};
    use super::*;

    const EPS: f32 = 1e-2;
    const ROWS: usize = 3;
    const INNER: usize = 20;
    const GROUPS: usize = 2;

    fn normed(values: &[f64], weight: &[f32]) -> Vec<f64> {
        let rows = values.chunks(weight.len()).map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            let weighted = row.iter().zip(weight);
            weighted.map(move |(x, weight)| x * scale * f64::from(*weight))
        });
        rows.flatten().collect()
    }

    #[test]
    fn rows_are_normed() {
        let (input, weight) = (values(ROWS * INNER, 1), values(INNER, 2));
        let outside = values(ROWS * INNER, 3);
        let found = rms_norm(&input, &weight, EPS, &outside);
        check(&input, &found, |x| dot(&normed(x, &weight), &outside));
    }

    #[test]
    fn groups_are_gated_and_normed() {
        let (y, weight) = (values(ROWS * INNER, 1), values(INNER, 2));
        let (z, outside) = (values(ROWS * INNER, 3), values(ROWS * INNER, 4));
        let gate = Channels {
            values: &z,
            stride: INNER,
            first: 0,
        };
        let (at_y, at_gate) = gated_rms_norm(&y, gate, &weight, GROUPS, EPS, &outside);
        let loss = |y: &[f64], z: &[f64]| {
            let gated: Vec<f64> = y.iter().zip(z).map(|(y, z)| y * silu(*z)).collect();
            let group = INNER / GROUPS;
            let groups = gated.chunks(group).enumerate().map(|(at, part)| {
                let weight = &weight[at % GROUPS * group..][..group];
                dot(&normed(part, weight), &outside[at * group..][..group])
            });
            groups.sum::<f64>()
        };
        let widened = super::super::differences::widened;
        check(&y, &at_y, |y| loss(y, &widened(&z)));
        check(&z, &at_gate, |z| loss(&widened(&y), z));
    }
}
