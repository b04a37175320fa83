//! The Nemotron-H network at run time.
//!
//! Enters: a stored model and token ids. Leaves: logits, states, scores. Written once against the backend trait; knows
//! no benchmark, no file format and no report.

pub mod block;
pub(crate) mod linear;
pub mod log_softmax;
pub(crate) mod mixers;
pub mod network;
pub mod numerics;
pub mod observer;
pub mod places;
pub mod scoring;
pub mod state;

pub use linear::required;
