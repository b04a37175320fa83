//! One matrix of a block, or a stack of them, in both directions.

use std::ops::Range;
use std::sync::Arc;

use crate::artifact::{StoredModel, StoredTensor};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::gram::{CHUNK_ROWS, Columns, products};
use crate::backend::cpu::kernels::Isa;
use crate::error::Result;
use crate::forward::linear::{Linear, required};
use crate::forward::numerics::Numerics;
use crate::forward::observer::Silent;

/// `y = x W^T + b` with `W [out_features, in_features]`.
pub struct Matrix {
    model: Arc<StoredModel>,
    tensor: StoredTensor,
    linear: Linear<Cpu>,
}

impl Matrix {
    /// The matrix `{stem}.weight` with `{stem}.bias` if there is one.
    ///
    /// # Errors
    /// It is missing.
    pub fn open(backend: &Cpu, model: &Arc<StoredModel>, stem: &str) -> Result<Self> {
        Ok(Self {
            model: Arc::clone(model),
            tensor: required(model, &format!("{stem}.weight"))?.clone(),
            linear: Linear::open(backend, model, stem, &Numerics::EXACT)?,
        })
    }

    /// GGUF name.
    pub fn name(&self) -> &str {
        &self.tensor.name
    }

    /// N.
    pub fn out_features(&self) -> usize {
        self.tensor.rows
    }

    /// K.
    pub fn in_features(&self) -> usize {
        self.tensor.columns
    }

    /// `[rows, in_features]` to `[rows, out_features]`, of matrix `index` of a stack.
    ///
    /// # Errors
    /// The weight cannot be read.
    pub fn apply(&self, backend: &Cpu, index: usize, input: &Vec<f32>) -> Result<Vec<f32>> {
        let rows = input.len() / self.in_features();
        let linear = &self.linear;
        linear.apply_matrix(backend, index, input, rows, &mut Silent)
    }

    /// The gradient at the input, `dY W`: `[rows, out_features]` to `[rows, in_features]`. Every sum runs over the rows
    /// of W in order.
    ///
    /// # Errors
    /// The weight cannot be read.
    pub fn back(&self, index: usize, gradient: &[f32]) -> Result<Vec<f32>> {
        let (out_features, in_features) = (self.out_features(), self.in_features());
        let tokens = gradient.len() / out_features;
        let mut out = vec![0.0; tokens * in_features];
        let (mut bytes, mut weight) = (Vec::new(), Vec::new());
        for first in (0..out_features).step_by(CHUNK_ROWS) {
            let rows = first..out_features.min(first + CHUNK_ROWS);
            weight.resize(rows.len() * in_features, 0.0);
            let model = &self.model;
            model.dequantize_rows(&self.tensor, index, first, &mut bytes, &mut weight)?;
            let gradient = transposed(gradient, out_features, rows.clone());
            products(
                Isa::detect(),
                0..rows.len(),
                &all_columns(&weight, in_features),
                &all_columns(&gradient, tokens),
                false,
                &mut out,
                in_features,
                |out, sum| *out += sum,
            );
        }
        Ok(out)
    }
}

fn all_columns(values: &[f32], stride: usize) -> Columns<'_> {
    Columns {
        values,
        stride,
        range: 0..stride,
    }
}

/// Some columns of `values [_, stride]` as rows.
fn transposed(values: &[f32], stride: usize, columns: Range<usize>) -> Vec<f32> {
    let column = |column: usize| values.iter().skip(column).step_by(stride).copied();
    columns.flat_map(column).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::artifact::MemoryTensor;
    use crate::backend::cpu::Residence;
    use crate::model::config::NemotronHConfig;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0;
        (0..count).map(value).collect()
    }

    #[test]
    fn the_gradient_at_the_input_is_that_at_the_output_times_the_weight() {
        // More rows than are multiplied at once; the second of a stack.
        let (n, k, tokens) = (CHUNK_ROWS + 5, 7, 3);
        let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
        let config: NemotronHConfig = model.config().clone();
        let weight = values(2 * n * k, 1);
        let tensor = MemoryTensor::of_f32("a.weight", [2, n, k], &weight);
        let model = StoredModel::in_memory(Path::new("a"), config, vec![tensor]).unwrap();
        let model = Arc::new(model);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        let matrix = Matrix::open(&backend, &model, "a").unwrap();
        let gradient = values(tokens * n, 2);
        let found = matrix.back(1, &gradient).unwrap();
        for (token, column) in (0..tokens).flat_map(|token| (0..k).map(move |c| (token, c))) {
            let product = |row: usize| {
                f64::from(gradient[token * n + row]) * f64::from(weight[(n + row) * k + column])
            };
            let exact: f64 = (0..n).map(product).sum();
            let error = (f64::from(found[token * k + column]) - exact).abs();
            assert!(error < 1e-4, "{token} {column}: {error}");
        }
    }
}
