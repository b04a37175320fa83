//! Bytes to typed tensors and back: GGUF files, Hugging Face checkpoint folders plain and packed, ggml block codecs.
//!
//! Enters: files nobody has checked. Leaves: headers, tensor views and packed blocks that have been.
//! Knows nothing of scales, searches or networks: choosing codes is the caller's business.

pub mod block;
pub mod checkpoint;
mod cursor;
pub mod dtype;
mod error;
pub mod float;
pub mod ggml_type;
pub mod gguf;
pub mod imatrix;
pub mod limits;
pub mod mapped;
pub mod packed;
pub mod positioned;

pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Place};
pub use ggml_type::GgmlType;
pub use imatrix::Imatrix;
pub use mapped::MappedFile;

/// A result whose error names the file, tensor and offset at fault.
pub type Result<T> = std::result::Result<T, Error>;
