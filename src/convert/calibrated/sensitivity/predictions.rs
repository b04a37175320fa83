//! What a network predicts, by its own head or by one in memory.

use std::path::Path;
use std::sync::Arc;

use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::activation::Activation;
use crate::backend::cpu::{Cpu, Residence};
use crate::backend::{Backend, MachineBuffer};
use crate::error::Result;
use crate::forward::required;
use crate::model::config::NemotronHConfig;

/// Positions whose logits are compared, and how many logits may be kept for it.
pub const POSITIONS: usize = 2048;
pub const KEPT_LOGITS: usize = 1 << 26;

/// Positions of a batch with what the original network predicts there.
pub struct Reference {
    pub rows: Vec<u32>,
    /// `[rows, vocab_size]`, on the machine of the head.
    pub logits: MachineBuffer,
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
