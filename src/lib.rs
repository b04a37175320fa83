//! Converts NVIDIA Nemotron-H hybrids into quantized artifacts, with proof that they are right.

pub mod convert;
pub mod error;
pub mod model;
pub mod plan;
pub mod quantize;
pub mod write;

pub use nemoconv_formats as formats;
