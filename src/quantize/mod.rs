//! Choosing scales and codes: f32 rows in, ggml blocks out.
//!
//! Enters: rows, a target type, column importance. Leaves: packed blocks and what did not fit.

pub mod lanes;
