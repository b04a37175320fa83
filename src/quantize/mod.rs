//! Choosing scales and codes: f32 rows in, ggml blocks out.
//!
//! Enters: rows, a target type, column importance. Leaves: packed blocks and what did not fit.

mod affine;
pub mod iq4_xs;
pub mod lanes;
pub mod q2_k;
pub mod q3_k;
pub mod q4_k;
pub mod q5_k;
pub mod q6_k;
mod super_block;
mod symmetric;

/// How many scales, or for F16 and BF16 elements, are too large for their type and became infinite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "infinite scales make a file useless"]
pub struct ScaleOverflow(pub u64);
