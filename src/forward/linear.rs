//! One matrix of the network with its bias and the way its input is taken.

use super::numerics::Numerics;
use super::observer::Observer;
use crate::artifact::{StoredModel, StoredTensor};
use crate::backend::Backend;
use crate::backend::activation::Activation;
use crate::error::{Error, Fault, Result};

/// `x W^T + b`, or a stack of such matrices.
pub struct Linear<B: Backend> {
    name: String,
    weight: B::Weight,
    /// What the products of each matrix are multiplied with; empty for nothing.
    scales: Vec<f32>,
    bias: Option<B::Buffer>,
    activation: Activation,
    /// `out_features`.
    pub out_features: usize,
}

impl<B: Backend> Linear<B> {
    /// The matrix `{stem}.weight` with `{stem}.bias` if there is one.
    pub fn open(backend: &B, model: &StoredModel, stem: &str, numerics: &Numerics) -> Result<Self> {
        let tensor = required(model, &format!("{stem}.weight"))?;
        let bias = model.tensor(&format!("{stem}.bias"));
        Ok(Self {
            name: tensor.name.clone(),
            weight: backend.weight(tensor)?,
            scales: (0..tensor.matrices)
                .filter_map(|matrix| model.second_scale(tensor, matrix))
                .collect(),
            bias: bias.map(|bias| backend.vector(bias)).transpose()?,
            activation: numerics.activation(tensor),
            out_features: tensor.rows,
        })
    }

    /// `[rows, in_features]` to `[rows, out_features]`.
    pub fn apply(
        &self,
        backend: &B,
        input: &B::Buffer,
        rows: usize,
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        self.apply_matrix(backend, 0, input, rows, observer)
    }

    /// The same for one matrix of a stack.
    pub fn apply_matrix(
        &self,
        backend: &B,
        matrix: usize,
        input: &B::Buffer,
        rows: usize,
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        observer.input(&self.name, matrix, backend, input, rows)?;
        if !observer.needs(&self.name) {
            return backend.zeros(rows * self.out_features);
        }
        let mut out = backend.matmul(&self.weight, matrix, input, rows, self.activation)?;
        if let Some(scale) = self.scales.get(matrix) {
            backend.scale(&mut out, *scale)?;
        }
        if let Some(bias) = &self.bias {
            backend.add_bias(&mut out, bias)?;
        }
        Ok(out)
    }

    /// Rows of the matrix itself: an embedding.
    pub fn rows(&self, backend: &B, tokens: &[u32]) -> Result<B::Buffer> {
        backend.embed(&self.weight, tokens)
    }
}

/// A tensor that the architecture requires.
pub fn required<'a>(model: &'a StoredModel, name: &str) -> Result<&'a StoredTensor> {
    model.tensor(name).ok_or_else(|| {
        let fault = Fault::new("is missing").in_tensor(name);
        Error::Model(fault.in_file(model.path()))
    })
}
