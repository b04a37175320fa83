//! Second moments of a layer's inputs, made ready for rounding.
//!
//! Enters: `M = E[u^T u]`. Leaves: M in units of its mean diagonal, damped, with its factor.

use rayon::prelude::*;

use super::cholesky::{Factor, Strips, factor};
use crate::backend::cpu::kernels::Isa;

/// What is added to the diagonal of M, as a share of its mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Damping {
    /// Tried first (GPTQ's `damp_percent` is 0.01).
    pub first: f64,
    /// Tried last, after factors of ten in between.
    pub last: f64,
}

impl Default for Damping {
    fn default() -> Self {
        Self {
            first: 0.01,
            last: 1.0,
        }
    }
}

/// Second moments ready for rounding.
#[derive(Debug, Clone)]
pub struct InputMoments {
    pub(super) matrix: Strips,
    pub(super) factor: Factor,
    /// The mean of the diagonal as it was measured: losses are in units of it.
    pub unit: f64,
    /// The damping that was needed.
    pub damping: f64,
    /// Inputs that were never anything but zero.
    pub dead_inputs: usize,
}

impl InputMoments {
    /// Prepares `matrix`, `[n, n]` symmetric, of which the part with column >= row is read. Inputs that were never seen get
    /// the mean.
    ///
    /// Gives `None` where it holds values that are no numbers, is zero, or is not positive definite with any damping.
    pub fn new(isa: Isa, n: usize, matrix: &[f64], damping: Damping) -> Option<Self> {
        assert_eq!(matrix.len(), n * n);
        let diagonal = || (0..n).map(|j| matrix[j * n + j]);
        let unit = diagonal().sum::<f64>() / n as f64;
        if !(unit.is_finite() && unit > 0.0) || diagonal().any(|x| x < 0.0) {
            return None;
        }
        // Row i, column j with i <= j.
        let upper = |i: usize, j: usize, damping: f64| {
            let stored = matrix[i * n + j] / unit;
            match i == j {
                true => ((if stored == 0.0 { 1.0 } else { stored }) + damping) as f32,
                false => stored as f32,
            }
        };
        let is_number = |i: usize| (i..n).all(|j| upper(i, j, 0.0).is_finite());
        if !(0..n).into_par_iter().all(is_number) {
            return None;
        }
        let mut tried = damping.first;
        loop {
            if let Some(factor) = factor(isa, n, |i, j| upper(i, j, tried)) {
                return Some(Self {
                    matrix: Strips::new(n, |i, j| upper(i.min(j), i.max(j), tried)),
                    factor,
                    unit,
                    damping: tried,
                    dead_inputs: diagonal().filter(|x| *x == 0.0).count(),
                });
            }
            if tried >= damping.last {
                return None;
            }
            tried = (tried * 10.0).max(1e-6);
        }
    }

    /// `in_features`.
    pub fn in_features(&self) -> usize {
        self.matrix.n()
    }
}
