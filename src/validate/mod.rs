//! Whether an artifact is what it claims to be.
//!
//! Enters: an artifact and what it was made from. Leaves: findings and figures for `report`. Changes nothing.

pub mod logits;
pub mod side_by_side;
