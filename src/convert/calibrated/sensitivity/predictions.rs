//! What a network predicts, and how far apart two predictions are.

use std::path::Path;
use std::sync::Arc;

use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::Backend;
use crate::backend::activation::Activation;
use crate::backend::cpu::{Cpu, Residence};
use crate::error::Result;
use crate::forward::log_softmax::LogSoftmax;
use crate::forward::required;
use crate::model::config::NemotronHConfig;

/// Positions whose logits are compared, and how many logits may be kept for it.
pub const POSITIONS: usize = 2048;
pub const KEPT_LOGITS: usize = 1 << 26;

/// Positions of a batch with what the original network predicts there.
pub struct Reference {
    pub rows: Vec<u32>,
    /// `[rows, vocab_size]`.
    pub logits: Vec<f32>,
}

/// A head in memory.
pub struct Head {
    backend: Cpu,
    weight: <Cpu as Backend>::Weight,
    hidden: usize,
}

impl Head {
    /// Of a tensor of a network.
    pub fn new(config: &NemotronHConfig, tensor: MemoryTensor) -> Result<Self> {
        let (name, hidden) = (tensor.name.clone(), tensor.columns);
        let model =
            StoredModel::in_memory(Path::new("a rounded head"), config.clone(), vec![tensor])?;
        let model = Arc::new(model);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        let weight = backend.weight(required(&model, &name)?)?;
        Ok(Self {
            backend,
            weight,
            hidden,
        })
    }

    /// Logits of some rows of the normed stream.
    pub fn logits(&self, normed: &Vec<f32>, rows: &[u32]) -> Result<Vec<f32>> {
        let chosen = self.backend.gather(normed, self.hidden, rows)?;
        self.backend
            .matmul(&self.weight, 0, &chosen, rows.len(), Activation::None)
    }
}

/// KL(original || rounded) of one position, nats.
pub fn kl_divergence(original: &[f32], rounded: &[f32]) -> f64 {
    let (p, q) = (LogSoftmax::of(original), LogSoftmax::of(rounded));
    let terms = original.iter().zip(rounded).map(|(original, rounded)| {
        let log_p = p.log_probability(*original);
        f64::from(crate::backend::cpu::exp(log_p as f32)) * (log_p - q.log_probability(*rounded))
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_do_not_diverge() {
        let logits = [1.0, 2.5, -0.5];
        assert!(kl_divergence(&logits, &logits).abs() < 1e-9);
        assert!(kl_divergence(&logits, &[2.5, 1.0, -0.5]) > 0.1);
    }
}
