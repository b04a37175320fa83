//! `down(relu(up x)^2)` backwards: a dense MLP, a shared expert, or a stack of routed ones.

use super::block::{BlockWeights, Pass};
use super::matrix::Matrix;
use super::vjp;
use crate::backend::Backend;
use crate::error::Result;

/// Twin of [`crate::forward::mixers::Mlp`].
pub struct Mlp {
    up: Matrix,
    down: Matrix,
}

/// What the forward pass computes on its way.
pub struct Hidden {
    /// What `up` gives, `[rows, intermediate]`.
    before: Vec<f32>,
    /// What `down` reads, the same.
    after: Vec<f32>,
}

impl Mlp {
    /// Opens the weights.
    pub fn open(weights: &BlockWeights, up: &str, down: &str) -> Result<Self> {
        Ok(Self {
            up: weights.matrix(up)?,
            down: weights.matrix(down)?,
        })
    }

    /// Width of what it reads and gives.
    pub fn width(&self) -> usize {
        self.down.out_features()
    }

    /// Hidden units of matrix `index` of the stack.
    pub fn hidden(&self, pass: &Pass, index: usize, input: &Vec<f32>) -> Result<Hidden> {
        let before = self.up.apply(pass.backend, index, input)?;
        let mut after = before.clone();
        pass.backend.relu_squared(&mut after)?;
        Ok(Hidden { before, after })
    }

    /// What hidden units become.
    pub fn output(&self, pass: &Pass, index: usize, hidden: &Hidden) -> Result<Vec<f32>> {
        self.down.apply(pass.backend, index, &hidden.after)
    }

    /// The gradient at `input`.
    pub fn back(
        &self,
        mut pass: Pass,
        index: usize,
        input: &Vec<f32>,
        gradient: &[f32],
    ) -> Result<Vec<f32>> {
        let hidden = self.hidden(&pass, index, input)?;
        self.back_from(&mut pass, index, (input, &hidden), gradient)
    }

    /// The same where the hidden units of `input` are known.
    pub fn back_from(
        &self,
        pass: &mut Pass,
        index: usize,
        (input, hidden): (&[f32], &Hidden),
        gradient: &[f32],
    ) -> Result<Vec<f32>> {
        let mut at_hidden = pass.back(&self.down, index, &hidden.after, gradient)?;
        vjp::relu_squared(&hidden.before, &mut at_hidden);
        pass.back(&self.up, index, input, &at_hidden)
    }
}
