//! GGUF v3 containers: metadata, tensor infos, offsets.

mod metadata;

pub use metadata::{Array, Metadata, Value};
