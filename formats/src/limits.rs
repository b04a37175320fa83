//! Caps on what a header may claim, each with its origin.

/// ggml: `GGML_MAX_DIMS`.
pub const GGUF_MAX_DIMS: usize = 4;
/// ggml: `GGML_MAX_NAME` is 64 including the terminating NUL.
pub const GGUF_MAX_TENSOR_NAME_BYTES: usize = 63;
/// ggml: `GGUF_MAX_STRING_LENGTH`.
pub const GGUF_MAX_STRING_BYTES: u64 = 1 << 30;
/// ggml: `GGUF_MAX_ARRAY_ELEMENTS`.
pub const GGUF_MAX_ARRAY_ELEMENTS: u64 = 1 << 30;
/// Ours, for files written: the header is padded to the alignment, and nothing maps larger pages than 2 MiB.
pub const GGUF_MAX_WRITTEN_ALIGNMENT: u32 = 2 << 20;
/// safetensors: `MAX_HEADER_SIZE`.
pub const SAFETENSORS_MAX_HEADER_BYTES: u64 = 100_000_000;
/// config.json, index and tokenizer files: none in the field is near 256 MiB.
pub const MAX_JSON_BYTES: u64 = 256 << 20;
