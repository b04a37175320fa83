//! Benchmarks with the semantics of lm-evaluation-harness 0.4.13.
//!
//! Enters: rows of data, an encoder and a [`Scorer`](crate::forward::scoring::Scorer). Leaves: scored samples, result
//! files, comparisons. Knows nothing of weights, layers and screens.

pub mod document;
mod parquet;
pub mod python_text;
pub mod tasks;
