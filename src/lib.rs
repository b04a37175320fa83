//! Converts NVIDIA Nemotron-H hybrids into quantized artifacts, with proof that they are right.

pub mod quantize;

pub use nemoconv_formats as formats;
