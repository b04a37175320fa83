//! Second moments of a layer's inputs, made ready for rounding.
//!
//! Enters: `M = E[u^T u]`. Leaves: M in units of its mean diagonal, damped, with its factor.

use super::HERE;
use super::cholesky::{Factor, Strips, factor, factor_on};
use super::held::RowProducts;
use crate::backend::cpu::kernels::Isa;
use crate::error::Result;
use crate::parallel;

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
        let matrix = Moments::new(n, matrix)?;
        let factor = |damping| Ok(factor(isa, n, |i, j| matrix.upper(i, j, damping)));
        matrix.factored(damping, factor).expect(HERE)
    }

    /// The same, with products on another machine.
    ///
    /// # Errors
    /// The machine fails.
    pub fn on(
        machine: &dyn RowProducts,
        n: usize,
        matrix: &[f64],
        damping: Damping,
    ) -> Result<Option<Self>> {
        let Some(matrix) = Moments::new(n, matrix) else {
            return Ok(None);
        };
        let factor = |damping| factor_on(machine, n, |i, j| matrix.upper(i, j, damping));
        matrix.factored(damping, factor)
    }

    /// `in_features`.
    pub fn in_features(&self) -> usize {
        self.matrix.n()
    }
}

/// Second moments that could be factored.
struct Moments<'a> {
    n: usize,
    matrix: &'a [f64],
    /// The mean of the diagonal.
    unit: f64,
}

impl<'a> Moments<'a> {
    fn new(n: usize, matrix: &'a [f64]) -> Option<Self> {
        assert_eq!(matrix.len(), n * n);
        let diagonal = || (0..n).map(|j| matrix[j * n + j]);
        let unit = diagonal().sum::<f64>() / n as f64;
        if !(unit.is_finite() && unit > 0.0) || diagonal().any(|x| x < 0.0) {
            return None;
        }
        let moments = Self { n, matrix, unit };
        let is_number = |i: usize| (i..n).all(|j| moments.upper(i, j, 0.0).is_finite());
        let are_numbers = parallel::map(0..n, is_number);
        are_numbers.iter().all(|row| *row).then_some(moments)
    }

    /// Row i, column j with i <= j, in units of the mean diagonal.
    #[inline(always)]
    fn upper(&self, i: usize, j: usize, damping: f64) -> f32 {
        let stored = self.matrix[i * self.n + j] / self.unit;
        match i == j {
            true => ((if stored == 0.0 { 1.0 } else { stored }) + damping) as f32,
            false => stored as f32,
        }
    }

    /// With as little damping as `factor` needs.
    fn factored(
        &self,
        damping: Damping,
        factor: impl Fn(f64) -> Result<Option<Factor>>,
    ) -> Result<Option<InputMoments>> {
        let n = self.n;
        let mut tried = damping.first;
        loop {
            if let Some(factor) = factor(tried)? {
                return Ok(Some(InputMoments {
                    matrix: Strips::new(n, |i, j| self.upper(i.min(j), i.max(j), tried)),
                    factor,
                    unit: self.unit,
                    damping: tried,
                    dead_inputs: (0..n).filter(|j| self.matrix[j * n + j] == 0.0).count(),
                }));
            }
            if tried >= damping.last {
                return Ok(None);
            }
            tried = (tried * 10.0).max(1e-6);
        }
    }
}
