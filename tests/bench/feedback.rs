//! GFLOP/s of what error feedback is made of, at n = 4096: second moments, their factor, the rounding itself.
//!
//! Run: `cargo bench --bench feedback`. Beside it the machine's own rate of F32 products, in the same minutes:
//! `python3 tests/bench/sgemm.py` (numpy, whose OpenBLAS takes as many threads).

#![allow(clippy::print_stdout, reason = "a bench prints its results")]

use std::hint::black_box;
use std::time::Instant;

use nemoconv::backend::cpu::gram::{cross_moments, second_moments};
use nemoconv::backend::cpu::kernels::Isa;
use nemoconv::formats::GgmlType;
use nemoconv::quantize::feedback::cholesky::factor;
use nemoconv::quantize::feedback::{Damping, Feedback, InputMoments, quantize_rows};

/// The program's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const N: usize = 4096;
const TOKENS: usize = 4096;
const ROWS: usize = 1024;
const ROUNDS: usize = 5;

fn main() {
    let isa = Isa::detect();
    let n = N as f64;
    let tokens = TOKENS as f64;
    println!("{:32} {:>8} {:>8}", "n = 4096", "ms", "GFLOP/s");
    let rows = noise(TOKENS * N);
    let mut sums = vec![0.0; N * N];
    // Half of the products are needed, and counted.
    line("second moments, 4096 tokens", tokens * n * n, || {
        second_moments(isa, black_box(&rows), N, &mut sums);
    });
    line("cross moments, 4096 tokens", 2.0 * tokens * n * n, || {
        cross_moments(isa, (black_box(&rows), N), (&rows, N), &mut sums);
    });
    let mut moments = vec![0.0; N * N];
    second_moments(isa, &rows, N, &mut moments);
    let diagonal = moments[0];
    (0..N).for_each(|j| moments[j * N + j] += 0.01 * diagonal);
    let lower = |at: usize| moments[(at % N).min(at / N) * N + (at % N).max(at / N)] / diagonal;
    let matrix: Vec<f32> = (0..N * N).map(|at| lower(at) as f32).collect();
    line("Cholesky", n * n * n / 3.0, || {
        black_box(factor(isa, N, |i, j| matrix[i * N + j]).expect("it is positive definite"));
    });
    let prepared = InputMoments::new(isa, N, &moments, Damping::default());
    let prepared = prepared.expect("it is positive definite");
    let weights = noise(ROWS * N);
    for ty in [GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::Q8_0] {
        let bytes = ty.bytes_for(weights.len() as u64).expect("rows are whole");
        let mut out = vec![0; bytes as usize];
        for passes in [0, 3] {
            // Repairs reach half of the columns on average, a pass and the loss all of them.
            let products = ROWS as f64 * n * n * (1.0 + 2.0 * (passes as f64 + 1.0));
            let name = format!("{ty}, {ROWS} rows, {passes} passes");
            line(&name, products, || {
                let how = Feedback::of_inputs(&prepared, passes);
                black_box(quantize_rows(isa, ty, black_box(&weights), how, &mut out));
            });
        }
    }
}

/// The median of some rounds after one that warms up.
fn line(name: &str, flop: f64, mut run: impl FnMut()) {
    run();
    let round = |_| {
        let begun = Instant::now();
        run();
        begun.elapsed().as_secs_f64()
    };
    let mut rounds: Vec<f64> = (0..ROUNDS).map(round).collect();
    rounds.sort_by(f64::total_cmp);
    let seconds = rounds[ROUNDS / 2];
    println!(
        "{name:32} {:8.0} {:8.0}",
        seconds * 1e3,
        flop / seconds / 1e9
    );
}

fn noise(count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}
