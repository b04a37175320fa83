//! Whether an artifact is what it claims to be.
//!
//! Enters: an artifact and what it was made from. Leaves: findings and figures for `report`. Changes nothing.

pub mod container;
mod found;
pub mod logits;
pub mod reference_file;
mod rewritten;
pub mod side_by_side;
pub mod static_levels;
pub mod tokenizer;
pub mod weights;

pub use found::Found;
pub use rewritten::{Recorded, recorded};
