//! Our answers beside those of the published programs.

mod converter;
mod metadata;
mod mixes;
mod quantization_error;
