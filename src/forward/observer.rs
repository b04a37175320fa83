//! Looking into a run: hidden states after every block, expert choices, inputs of matrices.

use crate::backend::{Backend, ExpertRows};
use crate::error::Result;

/// Told what happens inside a run. Every method may be left out.
pub trait Observer<B: Backend> {
    /// The residual stream `[rows, hidden]` before block `block`; after the last block it is called with the number of
    /// blocks.
    ///
    /// # Errors
    /// The stream cannot be copied from the machine.
    fn residual(
        &mut self,
        block: usize,
        backend: &B,
        residual: &B::Buffer,
        rows: usize,
    ) -> Result<()> {
        let _ = (block, backend, residual, rows);
        Ok(())
    }

    /// Which rows of the batch went to which expert.
    fn experts(&mut self, block: usize, experts: &[ExpertRows]) {
        let _ = (block, experts);
    }

    /// Experts to use instead of those that the router would choose now, one entry per expert.
    fn routing(&mut self, block: usize) -> Option<Vec<ExpertRows>> {
        let _ = block;
        None
    }

    /// The input of a matrix, `[rows, in_features]`; `matrix` counts experts.
    ///
    /// # Errors
    /// The input cannot be copied from the machine.
    fn input(
        &mut self,
        tensor: &str,
        matrix: usize,
        backend: &B,
        input: &B::Buffer,
        rows: usize,
    ) -> Result<()> {
        let _ = (tensor, matrix, backend, input, rows);
        Ok(())
    }

    /// Whether anybody looks at what this tensor's matrices give. If not, they may be left out: zeros take the place of
    /// their outputs.
    fn needs(&mut self, tensor: &str) -> bool {
        let _ = tensor;
        true
    }
}

/// Looks at nothing.
pub struct Silent;

impl<B: Backend> Observer<B> for Silent {}
