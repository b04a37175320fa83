//! Kernels that take arrays value by value.

use super::{groups_of, word};
use crate::array::{Array, Device};
use crate::error::Result;
use crate::kernels::{self, Kernel};

impl Device {
    /// Values that one launch may take: a multiple of every alignment.
    pub(super) fn part_values(&self) -> usize {
        self.view_bytes() / 4096 * 1024
    }

    /// Runs a kernel over one array, in parts.
    fn each(&self, kernel: &'static Kernel, array: &Array, parameters: &[u32]) -> Result<()> {
        for first in (0..array.len()).step_by(self.part_values()) {
            let end = array.len().min(first + self.part_values());
            let words: Vec<u32> = [word(end - first)]
                .iter()
                .chain(parameters)
                .copied()
                .collect();
            let groups = groups_of(end - first, kernel.threads);
            self.launch(kernel, groups, &[array.part(first..end).0], &words)?;
        }
        Ok(())
    }

    /// `max(x, 0)^2`, in place; a NaN stays one.
    ///
    /// # Errors
    /// Device lost.
    pub fn relu_squared(&self, values: &mut Array) -> Result<()> {
        self.each(&kernels::RELU_SQUARED, values, &[])
    }

    /// Multiplies every value, in place.
    ///
    /// # Errors
    /// Device lost.
    pub fn scale(&self, values: &mut Array, factor: f32) -> Result<()> {
        self.each(&kernels::SCALE, values, &[factor.to_bits()])
    }

    /// `sum += values`.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn add(&self, sum: &mut Array, values: &Array) -> Result<()> {
        assert_eq!(sum.len(), values.len());
        let kernel = &kernels::ADD;
        for first in (0..sum.len()).step_by(self.part_values()) {
            let part = first..sum.len().min(first + self.part_values());
            let views = [sum.part(part.clone()).0, values.part(part.clone()).0];
            let groups = groups_of(part.len(), kernel.threads);
            self.launch(kernel, groups, &views, &[word(part.len())])?;
        }
        Ok(())
    }

    /// `sums += values` without loss: `sums` are pairs of floats, the large and the small part of each sum.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn accumulate(&self, sums: &mut Array, values: &Array) -> Result<()> {
        assert_eq!(sums.len(), 2 * values.len());
        let kernel = &kernels::ACCUMULATE;
        let step = self.part_values() / 2;
        for first in (0..values.len()).step_by(step) {
            let part = first..values.len().min(first + step);
            let views = [
                sums.part(2 * part.start..2 * part.end).0,
                values.part(part.clone()).0,
            ];
            // The last one is a zero that compilers must not know.
            let parameters = [word(part.len()), 0];
            let groups = groups_of(part.len(), kernel.threads);
            self.launch(kernel, groups, &views, &parameters)?;
        }
        Ok(())
    }

    /// Whether no value is NaN or infinite; waits for the device.
    ///
    /// # Errors
    /// Device lost.
    pub fn is_finite(&self, values: &Array) -> Result<bool> {
        let found = self.zeros(1)?;
        let kernel = &kernels::IS_FINITE;
        for first in (0..values.len()).step_by(self.part_values()) {
            let part = first..values.len().min(first + self.part_values());
            let views = [values.part(part.clone()).0, found.view()];
            let groups = groups_of(part.len(), kernel.threads);
            self.launch(kernel, groups, &views, &[word(part.len())])?;
        }
        Ok(self.download(&found, 0..1)?[0].to_bits() == 0)
    }
}
