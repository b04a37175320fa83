//! One token of the selective scan: sums stay in registers, which compilers by themselves do not find.
//!
//! Products are rounded before they are added, so that the sums are those of the portable loop bit for bit.

#![allow(
    clippy::needless_range_loop,
    reason = "sums that an iterator borrows are kept in memory, not in registers"
)]

use std::arch::x86_64::*;

use super::super::{LANES, SCAN_CHANNELS, ScanStep, StateRows};
use super::lanes::{load_floats, store_floats};

/// Vectors of a row.
const VECTORS: usize = SCAN_CHANNELS / LANES;

#[target_feature(enable = "avx512f")]
pub fn scan_rows(state: StateRows<'_>, step: ScanStep<'_>) -> [f32; SCAN_CHANNELS] {
    let decay = _mm512_set1_ps(step.decay);
    let (parts, _) = step.input.as_chunks::<LANES>();
    let mut input = [_mm512_setzero_ps(); VECTORS];
    for i in 0..VECTORS {
        input[i] = load_floats(&parts[i]);
    }
    let mut sums = [_mm512_setzero_ps(); VECTORS];
    let rows = state.values.chunks_exact_mut(state.row_len);
    for ((row, b), c) in rows.zip(step.b).zip(step.c) {
        let (b, c) = (_mm512_set1_ps(*b), _mm512_set1_ps(*c));
        let (row, _) = row[state.first..][..SCAN_CHANNELS].as_chunks_mut::<LANES>();
        for i in 0..VECTORS {
            let kept = _mm512_mul_ps(load_floats(&row[i]), decay);
            let value = _mm512_add_ps(kept, _mm512_mul_ps(input[i], b));
            store_floats(&mut row[i], value);
            sums[i] = _mm512_add_ps(sums[i], _mm512_mul_ps(value, c));
        }
    }
    let mut out = [0.0; SCAN_CHANNELS];
    let (parts, _) = out.as_chunks_mut::<LANES>();
    for i in 0..VECTORS {
        store_floats(&mut parts[i], sums[i]);
    }
    out
}
