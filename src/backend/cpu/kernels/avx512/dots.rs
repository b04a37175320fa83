//! Products of attention: one vector with sixteen rows, several weighted sums of rows.
//!
//! Products are rounded before they are added, and sums taken in the order of the portable loops, bit for bit.

#![allow(
    clippy::needless_range_loop,
    reason = "sums that an iterator borrows are kept in memory, not in registers"
)]

use std::arch::x86_64::*;

use super::super::LANES;
use super::lanes::{load_floats, store_floats, transpose};

/// Sums of lanes are taken for all rows at once.
#[target_feature(enable = "avx512f")]
pub fn dots(vector: &[f32], rows: &[f32], stride: usize) -> [f32; LANES] {
    let (vector, _) = vector.as_chunks::<LANES>();
    let mut sums = [_mm512_setzero_ps(); LANES];
    for (part, x) in vector.iter().enumerate() {
        let x = load_floats(x);
        for row in 0..LANES {
            let (values, _) = rows[row * stride + part * LANES..].as_chunks::<LANES>();
            sums[row] = _mm512_add_ps(sums[row], _mm512_mul_ps(x, load_floats(&values[0])));
        }
    }
    let mut rows = [_mm512_setzero_si512(); LANES];
    for row in 0..LANES {
        rows[row] = _mm512_castps_si512(sums[row]);
    }
    let columns = transpose(rows);
    let mut lanes = sums;
    for lane in 0..LANES {
        lanes[lane] = _mm512_castsi512_ps(columns[lane]);
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] = _mm512_add_ps(lanes[lane], lanes[lane + half]);
        }
    }
    let mut dots = [0.0; LANES];
    store_floats(&mut dots, lanes[0]);
    dots
}

#[target_feature(enable = "avx512f")]
pub fn weighted_sums<const N: usize>(
    weights: &[[f32; N]],
    rows: &[f32],
    stride: usize,
) -> [[f32; LANES]; N] {
    let mut sums = [_mm512_setzero_ps(); N];
    for (row, weights) in weights.iter().enumerate() {
        let (row, _) = rows[row * stride..].as_chunks::<LANES>();
        let row = load_floats(&row[0]);
        for n in 0..N {
            sums[n] = _mm512_add_ps(sums[n], _mm512_mul_ps(_mm512_set1_ps(weights[n]), row));
        }
    }
    let mut out = [[0.0; LANES]; N];
    for n in 0..N {
        store_floats(&mut out[n], sums[n]);
    }
    out
}
