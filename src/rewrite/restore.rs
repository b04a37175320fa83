//! What a rewritten network computes inside, in the terms of the original: for comparisons of the two.

use super::Rewrites;
use super::matrix::{SquareMatrix, product};

/// Undoes what rewrites do to hidden values.
#[derive(Debug)]
pub struct Restore<'a> {
    rewrites: &'a Rewrites,
    /// R^T.
    back: Option<SquareMatrix>,
}

impl Rewrites {
    /// The way back for hidden values.
    pub fn restore(&self) -> Restore<'_> {
        let back = |rotation: &SquareMatrix| {
            SquareMatrix::new(rotation.size(), rotation.transposed().to_vec())
        };
        Restore {
            rewrites: self,
            back: self.rotation.as_ref().map(back),
        }
    }
}

impl Restore<'_> {
    /// Turns rows of the residual stream, `[rows, hidden]`, back: `x R^T`.
    ///
    /// # Panics
    /// The rows are not of the rotation's width.
    pub fn stream(&self, rows: &mut [f32]) {
        let Some(back) = &self.back else {
            return;
        };
        assert!(rows.len().is_multiple_of(back.size()), "whole rows");
        let values: Vec<f64> = rows.iter().map(|x| f64::from(*x)).collect();
        let restored = product(&values, back.size(), back);
        let pairs = rows.iter_mut().zip(restored);
        pairs.for_each(|(x, value)| *x = value as f32);
    }

    /// Puts the channels of a block's SSM state, `[head, state, head_dim]`, back in order.
    ///
    /// # Panics
    /// The state is not of the sizes that the rewrites are for.
    pub fn state(&self, block: usize, head_dim: usize, state: &mut [f32]) {
        let space = self.rewrites.space(&format!("blk.{block}.ssm_norm"));
        let Some(order) = space.and_then(|space| space.order_of(0)) else {
            return;
        };
        let found = state.to_vec();
        let states = state.len() / order.len();
        for (index, source) in order.iter().enumerate() {
            let (head, from, to) = (
                index / head_dim,
                index % head_dim,
                *source as usize % head_dim,
            );
            for row in head * states..(head + 1) * states {
                state[row * head_dim + to] = found[row * head_dim + from];
            }
        }
    }
}
