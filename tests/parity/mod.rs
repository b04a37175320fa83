//! Our answers beside those of the published programs.

mod metadata;
mod quantization_error;
