//! The rounding of llm-compressor, for comparisons byte by byte: every step of the arithmetic is rounded to BF16.
//!
//! Enters: one row. Leaves: an integer row. The quotient keeps 8 significant bits, so that one in ten int8 codes is off by
//! one: nothing that this project ships is made so.
//!
//! Source: llm-compressor 0.14, compressed-tensors 0.19 (observed output).

use half::bf16;

use super::{IntegerGrid, IntegerRowMut, highest, lowest};

/// Quantizes one row; nothing overflows BF16.
pub fn row(grid: &IntegerGrid, row: &[f32], mut out: IntegerRowMut) -> u64 {
    let size = grid.group_columns(row.len());
    for (group, weights) in row.chunks_exact(size).enumerate() {
        let (scale, zero) = scale_of(grid, weights);
        out.set_scale(grid.scale, group, scale, zero);
        let codes = &mut out.codes[group * size..][..size];
        for (code, weight) in codes.iter_mut().zip(weights) {
            let q = step(step(weight / scale) + zero);
            let q = q.clamp(lowest(grid.width), highest(grid.width));
            *code = q.round_ties_even() as i8;
        }
    }
    0
}

fn scale_of(grid: &IntegerGrid, weights: &[f32]) -> (f32, f32) {
    let low = weights.iter().copied().fold(0.0, f32::min);
    let high = weights.iter().copied().fold(0.0, f32::max);
    let (lowest, highest) = (lowest(grid.width), highest(grid.width));
    let range = highest - lowest;
    let scale = match grid.has_zero_point {
        true => step(step(high - low) / range),
        false => step(f32::max(-low, high) / (range / 2.0)),
    };
    // The smallest difference from 1.
    let scale = if scale == 0.0 {
        bf16::EPSILON.to_f32()
    } else {
        scale
    };
    let zero = match grid.has_zero_point {
        true => step(lowest - step(low / scale))
            .clamp(lowest, highest)
            .round_ties_even(),
        false => 0.0,
    };
    (scale, zero)
}

fn step(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}
