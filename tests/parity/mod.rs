//! Against other implementations.

mod quantization_error;
