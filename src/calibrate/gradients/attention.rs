//! Grouped-query attention backwards.

use super::block::{BlockWeights, Pass, segments};
use super::matrix::Matrix;
use super::vjp;
use crate::backend::{AttentionShape, Backend, KeyValues};
use crate::error::Result;
use crate::forward::numerics::Numerics;

/// Twin of [`crate::forward::mixers::Attention`].
pub struct Attention {
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    shape: AttentionShape,
}

impl Attention {
    /// Opens the weights.
    pub fn open(weights: &BlockWeights) -> Result<Self> {
        let config = weights.config();
        Ok(Self {
            query: weights.matrix("attn_q")?,
            key: weights.matrix("attn_k")?,
            value: weights.matrix("attn_v")?,
            output: weights.matrix("attn_output")?,
            shape: AttentionShape {
                heads: config.num_attention_heads,
                key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                arithmetic: Numerics::EXACT.attention,
            },
        })
    }

    /// The gradient at `input [rows, hidden]`.
    pub fn back(&self, mut pass: Pass, input: &Vec<f32>, gradient: &[f32]) -> Result<Vec<f32>> {
        let backend = pass.backend;
        let query = self.query.apply(backend, 0, input)?;
        let keys = self.key.apply(backend, 0, input)?;
        let values = self.value.apply(backend, 0, input)?;
        let mut caches = pass.fresh(KeyValues::default());
        let mut caches = segments(pass.sequences, &mut caches);
        let mixed = backend.attention(&query, &keys, &values, self.shape, &mut caches)?;
        let at_mixed = pass.back(&self.output, 0, &mixed, gradient)?;
        let inputs = vjp::Attention {
            query: &query,
            keys: &keys,
            values: &values,
            shape: self.shape,
            gradient: &at_mixed,
        };
        let found = vjp::attention(&inputs, pass.sequences);
        let mut sum = pass.back(&self.query, 0, input, &found.query)?;
        for (matrix, gradient) in [(&self.key, found.keys), (&self.value, found.values)] {
            let part = pass.back(matrix, 0, input, &gradient)?;
            backend.add(&mut sum, &part)?;
        }
        Ok(sum)
    }
}
