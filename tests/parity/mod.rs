//! Our answers beside those of the published programs.

mod converter;
mod forward;
mod imatrix;
mod independent_reader;
mod kl_divergence;
mod llama_cpp;
mod llm_compressor;
mod lm_eval;
mod metadata;
mod mixes;
mod packed;
mod packed_runtime;
mod quantization_error;
