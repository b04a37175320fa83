//! Nanoseconds per weight of every type that can be quantized to, on one core, with and without importance, and to decode.
//!
//! Run: `cargo bench --bench quantize -- [TYPE...]`

#![allow(clippy::print_stdout, reason = "a bench prints its results")]

use std::{hint::black_box, time::Instant};

use nemoconv::{
    formats::{GgmlType, block::dequantize},
    quantize::{can_quantize, quantize_rows},
};

const ROW_LEN: usize = 4096;
const ROWS: usize = 64;
const ROUNDS: usize = 7;

fn main() {
    let wanted: Vec<GgmlType> = std::env::args()
        .skip(1)
        .filter_map(|name| name.parse().ok())
        .collect();
    let rows = normal(ROWS * ROW_LEN);
    let importance: Vec<f32> = normal(ROW_LEN).iter().map(|x| x * x).collect();
    println!(
        "{:8} {:>10} {:>16} {:>8}",
        "type", "ns/weight", "with importance", "decode"
    );
    for ty in
        GgmlType::all().filter(|ty| can_quantize(*ty) && (wanted.is_empty() || wanted.contains(ty)))
    {
        let bytes = ty
            .bytes_for(rows.len() as u64)
            .expect("rows of whole blocks");
        let mut out = vec![0; usize::try_from(bytes).expect("a small buffer")];
        let mut decoded = vec![0.0; rows.len()];
        let plain = nanoseconds_per_weight(|| {
            let _ = black_box(quantize_rows(ty, ROW_LEN, black_box(&rows), None, &mut out));
        });
        let weighted = nanoseconds_per_weight(|| {
            let importance = Some(&importance[..]);
            let _ = black_box(quantize_rows(
                ty,
                ROW_LEN,
                black_box(&rows),
                importance,
                &mut out,
            ));
        });
        let decode = nanoseconds_per_weight(|| {
            dequantize(ty, black_box(&out), &mut decoded).expect("what was just written");
            black_box(&decoded);
        });
        println!("{ty:8} {plain:10.3} {weighted:16.3} {decode:8.3}");
    }
}

/// The least of some rounds, so that other programs on the machine count little.
fn nanoseconds_per_weight(mut run: impl FnMut()) -> f64 {
    let round = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let fastest = (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min);
    fastest * 1e9 / (ROWS * ROW_LEN) as f64
}

/// Sums of twelve uniform numbers: close to normal, the same on every machine.
fn normal(count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count)
        .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
        .map(|x| x * 0.02)
        .collect()
}
