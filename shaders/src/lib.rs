//! Kernels of hybrid networks in WGSL and CUDA C++, and the drivers that run them.
//!
//! Enters: arrays of f32, bytes of stored weights. Leaves: arrays of f32. A [`Driver`] allocates, copies and launches; a
//! `Device` gives every kernel a typed method, computes its launch grid and packs its parameters: the same for every
//! driver. Knows no models and no files.

#[cfg(feature = "cuda")]
pub mod cuda;
mod driver;
mod error;
pub mod kernels;

pub use driver::{Description, Driver, Family, Handle, Launch, Limits, MAX_GROUPS, View};
pub use error::{DeviceError, Result};
