//! Vector-Jacobian products: from the gradient at the output of an operation to the gradients at its inputs.
//!
//! Enters: the inputs that an operation of [`crate::backend::Backend`] had, the gradient at its output. Leaves: gradients
//! of the same shapes as the inputs. One file per operation, under its name; weights get no gradient. Sums run in one
//! order whatever the threads, exponentials are the project's own.

mod attention;
mod conv1d;
#[cfg(test)]
pub mod differences;
mod relu_squared;
mod rms_norm;
mod selective_scan;

pub use attention::{Attention, attention};
pub use conv1d::conv1d_silu;
pub use relu_squared::relu_squared;
pub use rms_norm::{gated_rms_norm, rms_norm};
pub use selective_scan::{Scan, selective_scan};

use crate::backend::cpu::exp;

/// Some columns of rows of `stride` values.
#[derive(Debug, Clone, Copy)]
pub struct Channels<'a> {
    /// All rows.
    pub values: &'a [f32],
    /// Row length.
    pub stride: usize,
    /// First channel.
    pub first: usize,
}

impl<'a> Channels<'a> {
    /// `channels` values of a row.
    pub fn row(&self, row: usize, channels: usize) -> &'a [f32] {
        &self.values[row * self.stride + self.first..][..channels]
    }
}

/// Rows of `stride` values that are put together from parts.
#[derive(Debug)]
pub struct Assembly {
    /// All rows.
    pub values: Vec<f32>,
    stride: usize,
}

impl Assembly {
    /// Zeros.
    pub fn new(rows: usize, stride: usize) -> Self {
        Self {
            values: vec![0.0; rows * stride],
            stride,
        }
    }

    /// Adds `part [_, width]` to the columns from `column` on of the rows from `row` on.
    pub fn add(&mut self, row: usize, column: usize, part: &[f32], width: usize) {
        let rows = self.values[row * self.stride..].chunks_exact_mut(self.stride);
        for (row, part) in rows.zip(part.chunks_exact(width)) {
            let sums = row[column..].iter_mut();
            sums.zip(part).for_each(|(sum, value)| *sum += value);
        }
    }
}

/// `1 / (1 + e^-x)`: the derivative of softplus.
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x sigmoid(x)` and its derivative.
fn silu(x: f32) -> (f32, f32) {
    let share = sigmoid(x);
    (x * share, share * (1.0 + x * (1.0 - share)))
}
