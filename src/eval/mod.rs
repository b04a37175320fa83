//! Benchmarks with the semantics of lm-evaluation-harness 0.4.13.
//!
//! Enters: rows of data, an encoder and a [`Scorer`](crate::forward::scoring::Scorer). Leaves: scored samples, result
//! files, comparisons. Knows nothing of weights, layers and screens.

pub mod comparison;
pub mod document;
pub mod files;
pub mod journal;
pub mod merge;
pub mod metrics;
mod parquet;
pub mod python_text;
pub mod requests;
pub mod results;
pub mod run;
pub mod samples;
pub mod shard;
pub mod tasks;

#[cfg(test)]
mod gold_tests;

/// Hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
