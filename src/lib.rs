#![doc = include_str!("ARCHITECTURE.md")]

pub mod artifact;
pub mod backend;
pub mod calibrate;
pub mod convert;
pub mod error;
pub mod eval;
pub mod forward;
pub mod model;
pub(crate) mod parallel;
pub mod plan;
pub mod quantize;
pub mod report;
pub mod rewrite;
pub mod validate;
pub mod write;

pub use nemoconv_formats as formats;
