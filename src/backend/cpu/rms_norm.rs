//! RMS norms: `x / sqrt(mean(x^2) + eps) * weight`, over a row or over groups of it.

use super::elementwise::{silu, sum_of_squares};
use super::kernels::Isa;
use super::multiversion::multiversion;
use crate::parallel;

/// Rows that a thread norms at a time.
const ROWS: usize = 8;
/// The same where they are gated.
const GATED_ROWS: usize = 4;

/// One norm per row of `weight`'s length.
pub fn rms_norm(isa: Isa, input: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = input.to_vec();
    parallel::for_each(out.chunks_mut(ROWS * weight.len()), |rows| {
        let rows = rows.chunks_mut(weight.len());
        rows.for_each(|row| norm_row(isa, row, weight, eps));
    });
    out
}

/// The gated norm of a Mamba-2 mixer, gate first: `y * silu(z)`, then one norm per group.
///
/// The gate of a row are the first `weight.len()` of its `z_stride` values in `z`.
pub fn gated_rms_norm(
    isa: Isa,
    mut y: Vec<f32>,
    z: &[f32],
    z_stride: usize,
    weight: &[f32],
    groups: usize,
    eps: f32,
) -> Vec<f32> {
    let inner = weight.len();
    let group = inner / groups;
    let parts = y.chunks_mut(GATED_ROWS * inner);
    let parts = parts.zip(z.chunks(GATED_ROWS * z_stride));
    parallel::for_each(parts, |(rows, z)| {
        let rows = rows.chunks_mut(inner).zip(z.chunks(z_stride));
        rows.for_each(|(row, z)| gate_and_norm_row(isa, row, z, weight, group, eps));
    });
    y
}

multiversion! {
    fn norm_row(row: &mut [f32], weight: &[f32], eps: f32) = normalize;
}

multiversion! {
    fn gate_and_norm_row(row: &mut [f32], z: &[f32], weight: &[f32], group: usize, eps: f32) = gate_and_normalize;
}

#[inline(always)]
fn gate_and_normalize(row: &mut [f32], z: &[f32], weight: &[f32], group: usize, eps: f32) {
    row.iter_mut().zip(z).for_each(|(y, z)| *y *= silu(*z));
    for (row, weight) in row.chunks_exact_mut(group).zip(weight.chunks_exact(group)) {
        normalize(row, weight, eps);
    }
}

#[inline(always)]
fn normalize(row: &mut [f32], weight: &[f32], eps: f32) {
    let mean = sum_of_squares(row) / row.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    row.iter_mut()
        .zip(weight)
        .for_each(|(x, weight)| *x = *x * scale * weight);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_unit_mean_square() {
        let input: Vec<f32> = (0..40).map(|i| i as f32 - 7.0).collect();
        let out = rms_norm(Isa::detect(), &input, &[2.0; 20], 0.0);
        for row in out.chunks(20) {
            let mean = row.iter().map(|x| x * x).sum::<f32>() / 20.0;
            assert!((mean - 4.0).abs() < 1e-4, "{mean}");
        }
    }

    #[test]
    fn the_gate_comes_before_the_norm_and_groups_are_apart() {
        let y = vec![1.0, 2.0, 100.0, 300.0];
        let z = [1.0, 1.0, 1.0, 1.0, f32::NAN];
        let out = gated_rms_norm(Isa::detect(), y, &z, 5, &[1.0; 4], 2, 0.0);
        let expected = [0.632_455_5, 1.264_911, 0.447_213_6, 1.341_640_8];
        for (found, expected) in out.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{out:?}");
        }
    }
}
