//! Prefill and decode speed of stored models on this machine's CPU: tokens per second, medians.
//!
//! `cargo bench --bench forward -- MODEL... [--threads N] [--prompt 512] [--generate 32] [--runs 3]`

#![allow(clippy::print_stdout, reason = "a bench prints its result")]

use std::sync::Arc;
use std::time::Instant;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::cpu::{Cpu, Residence};
use nemoconv::forward::network::{Network, Sequence};
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::observer::Silent;
use serde_json::json;

struct Settings {
    models: Vec<String>,
    threads: usize,
    prompt: usize,
    generate: usize,
    runs: usize,
}

fn settings() -> Settings {
    let mut settings = Settings {
        models: Vec::new(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        prompt: 512,
        generate: 32,
        runs: 3,
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        let mut number = || {
            args.next()
                .and_then(|n| n.parse().ok())
                .expect("a number follows")
        };
        match arg.as_str() {
            "--threads" => settings.threads = number(),
            "--prompt" => settings.prompt = number(),
            "--generate" => settings.generate = number(),
            "--runs" => settings.runs = number(),
            _ => settings.models.push(arg),
        }
    }
    settings
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let settings = settings();
    rayon::ThreadPoolBuilder::new()
        .num_threads(settings.threads)
        .build()
        .expect("the threads are there")
        .install(|| measure(&settings));
}

fn measure(settings: &Settings) {
    for path in &settings.models {
        let model = Arc::new(StoredModel::open(path).expect("the model opens"));
        let numerics = Numerics::of_target(&model);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        let network = Network::open(&model, backend, &numerics).expect("the model runs");
        let tokens: Vec<u32> = (0..settings.prompt as u32).map(|i| i % 997 + 3).collect();
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for run in 0..=settings.runs {
            let mut state = network.empty_state().unwrap();
            let begun = Instant::now();
            let sequence = Sequence {
                tokens: &tokens,
                state: &mut state,
            };
            let normed = network.run(&mut [sequence], &mut Silent).expect("it runs");
            let last = tokens.len() as u32 - 1;
            network
                .logits(&normed, &[last], &mut Silent)
                .expect("it runs");
            let seconds = begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            for token in 0..settings.generate as u32 {
                let sequence = Sequence {
                    tokens: &[token + 3],
                    state: &mut state,
                };
                let normed = network.run(&mut [sequence], &mut Silent).expect("it runs");
                network.logits(&normed, &[0], &mut Silent).expect("it runs");
            }
            // The first run brings the file into memory.
            if run > 0 {
                prefill.push(settings.prompt as f64 / seconds);
                decode.push(settings.generate as f64 / begun.elapsed().as_secs_f64());
            }
        }
        let line = json!({ "model": path, "threads": settings.threads,
            "prefill_tokens_per_second": median(prefill), "decode_tokens_per_second": median(decode) });
        println!("{line}");
    }
}
