//! The Nemotron-H network at run time.
//!
//! Enters: a stored model and token ids. Leaves: logits, states, scores. Knows no benchmark, no file format and no
//! report.

pub mod scoring;
