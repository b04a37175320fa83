//! Codes nearest to the weights, scales from the extremes of their group.
//!
//! Enters: one row. Leaves: an integer row. One read of the weights per group, in lanes.

use pulp::{Arch, Simd, WithSimd};

use super::{IntegerGrid, IntegerRowMut, highest, lowest};

/// Quantizes one row; gives the scales that were cut.
pub fn row(grid: &IntegerGrid, row: &[f32], out: IntegerRowMut) -> u64 {
    Arch::new().dispatch(Row { grid, row, out })
}

struct Row<'a> {
    grid: &'a IntegerGrid,
    row: &'a [f32],
    out: IntegerRowMut<'a>,
}

impl WithSimd for Row<'_> {
    type Output = u64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> u64 {
        let Self { grid, row, mut out } = self;
        let size = grid.group_columns(row.len());
        let mut cut = 0;
        for (group, weights) in row.chunks_exact(size).enumerate() {
            let (scale, zero) = scale_of(grid, weights);
            cut += u64::from(grid.scale.is_saturated(scale));
            out.set_scale(grid.scale, group, scale, zero);
            let codes = &mut out.codes[group * size..][..size];
            round(grid, weights, scale, zero, codes);
        }
        cut
    }
}

/// The least scale whose codes reach every weight of the group, in its float, and the zero point.
#[inline(always)]
fn scale_of(grid: &IntegerGrid, weights: &[f32]) -> (f32, f32) {
    let (low, high) = extremes(weights);
    let (lowest, highest) = (lowest(grid.width), highest(grid.width));
    if !grid.has_zero_point {
        let scale = f32::max(high / highest, low / lowest);
        return (grid.scale.rounded(scale), 0.0);
    }
    let scale = grid.scale.rounded((high - low) / (highest - lowest));
    let zero = match scale > 0.0 {
        true => (lowest - low / scale).round_ties_even(),
        false => 0.0,
    };
    (scale, zero.clamp(lowest, highest))
}

/// The smallest and the largest weight, each at least 0 away from the other side.
#[inline(always)]
fn extremes(weights: &[f32]) -> (f32, f32) {
    const LANES: usize = 32;
    let (mut low, mut high) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (whole, rest) = weights.as_chunks::<LANES>();
    for block in whole {
        for (i, x) in block.iter().enumerate() {
            low[i] = lesser(low[i], *x);
            high[i] = greater(high[i], *x);
        }
    }
    for (i, x) in rest.iter().enumerate() {
        low[i] = lesser(low[i], *x);
        high[i] = greater(high[i], *x);
    }
    // Halves onto each other, in lanes: one after the other would take longer than the group itself.
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            low[i] = lesser(low[i], low[i + half]);
            high[i] = greater(high[i], high[i + half]);
        }
        half /= 2;
    }
    (low[0], high[0])
}

/// `x` where it is less; NaN never is.
#[inline(always)]
fn lesser(least: f32, x: f32) -> f32 {
    if x < least { x } else { least }
}

/// `x` where it is greater; NaN never is.
#[inline(always)]
fn greater(greatest: f32, x: f32) -> f32 {
    if x > greatest { x } else { greatest }
}

#[inline(always)]
fn round(grid: &IntegerGrid, weights: &[f32], scale: f32, zero: f32, codes: &mut [i8]) {
    /// Added and taken off again, it leaves a whole number, ties to even.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (lowest, highest) = (lowest(grid.width), highest(grid.width));
    for (code, weight) in codes.iter_mut().zip(weights) {
        let q = (weight * inverse + zero).max(lowest).min(highest);
        // Whole and small: nothing is lost.
        *code = ((q + WHOLE).to_bits() & 0xff) as u8 as i8;
    }
}
