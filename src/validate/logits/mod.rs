//! How far the computations of an artifact are from those of its reference.
//!
//! Enters: logits, layer outputs, states and expert sets of both, position by position. Leaves: the figures of the
//! report. Runs no network.

pub mod compact_file;
pub mod compact_reference;
pub mod drift;
pub mod kl_divergence;
pub mod kld_base;
pub mod layers;
pub mod perplexity;

mod findings;
mod statistics;

pub use findings::findings;
