//! Artifacts: keys, tensor order and files.

pub mod gguf;
