//! Kernels of hybrid networks in WGSL and CUDA C++, and the drivers that run them.
//!
//! Enters: arrays of f32, bytes of stored weights. Leaves: arrays of f32. A [`Driver`] allocates, copies and launches; a
//! [`Device`] gives every kernel a typed method, computes its launch grid and packs its parameters: the same for every
//! driver. Knows no models and no files.

mod array;
mod choice;
#[cfg(feature = "cuda")]
pub mod cuda;
mod driver;
mod error;
pub mod kernels;
mod ops;
mod spare;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use array::{Array, Bytes, Device, Doubles, MatmulKernel, Traffic};
pub use choice::{DeviceName, Found, devices, open};
pub use driver::{Description, Driver, Family, Handle, Launch, Limits, View};
pub use error::{DeviceError, Result};
pub use ops::{
    AttentionLayout, CodeValues, ColumnSums, ConvLayout, FEEDBACK_CHUNK, FeedbackGrid,
    FeedbackRows, FloatLayout, IntegerLayout, KlDivergence, LogitRows, MagnitudeBins, MatmulLayout,
    Packed, Packing, Rounding, ScaleLattice, ScaleSearch, ScanLayout, SoftmaxSums, Splitting,
    Tries, can_dequantize, has_minima,
};
pub use spare::Spare;
