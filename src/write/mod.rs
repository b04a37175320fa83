//! Artifacts: keys, tensor order and files.

pub mod gguf;
pub mod packed;
pub(crate) mod tensor_file;
pub mod whole_file;
