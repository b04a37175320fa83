//! ggml blocks: one file per type, with the struct, its size, packing and unpacking.
//!
//! Enters: codes and scales somebody chose, or bytes of a file. Leaves: bytes, or f32 values.
