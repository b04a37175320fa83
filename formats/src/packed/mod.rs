//! Packed safetensors: linears whose weights are codes, scales and zero points, in the layouts of compressed-tensors,
//! GPTQ and ModelOpt.
//!
//! Enters: a checkpoint and its `quantization_config`, which nobody has checked. Leaves: which linears are packed, how,
//! and their codes or exact values, any rows at a time. Knows no architecture and chooses no codes.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        reason = "the bytes read here are untrusted"
    )
)]

pub mod bits;
pub mod config;
mod layout;
mod linear;
mod pattern;
mod scheme;

pub use bits::Width;
pub use config::Quantization;
pub use layout::{Role, TensorSpec};
pub use linear::{
    FloatCodes, IntegerCodes, PackedLinear, RowBuffers, SecondScale, StoredFloats, StoredIntegers,
    StoredLinear,
};
pub use scheme::{GptqZeros, Group, Inputs, Layout, Nvfp4Names, Scheme};
