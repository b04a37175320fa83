//! One block of a network, run on the residual streams of a cell.

use std::path::Path;
use std::sync::Arc;

use super::capture::Capture;
use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::cpu::Residence;
use crate::backend::{Backend, ExpertRows, Machine, MachineBuffer, Machines};
use crate::error::{Fault, NotFinite, Result};
use crate::forward::block::Block;
use crate::forward::numerics::Numerics;
use crate::forward::observer::Observer;
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;

/// A block with all its weights in memory.
pub struct Layer {
    model: Arc<StoredModel>,
    machine: Machine,
    block: Block<Machine>,
    index: usize,
}

impl Layer {
    /// Opens block `index` of the network that `config` describes, with the weights given.
    ///
    /// # Errors
    /// A tensor of the block is missing or has a wrong shape.
    pub fn open(
        machines: &Machines,
        config: &NemotronHConfig,
        index: usize,
        tensors: Vec<MemoryTensor>,
    ) -> Result<Self> {
        let name = format!("block {index}");
        let model = Arc::new(StoredModel::in_memory(
            Path::new(&name),
            config.clone(),
            tensors,
        )?);
        let machine = machines.machine(Arc::clone(&model), Residence::Mapped);
        let block = Block::open(&model, &machine, index, &Numerics::EXACT)?;
        Ok(Self {
            model,
            machine,
            block,
            index,
        })
    }

    /// What the block is.
    pub fn kind(&self) -> BlockKind {
        self.block.kind()
    }

    /// Runs fresh sequences of `lengths` tokens, one after the other in `stream`, through the block.
    ///
    /// # Errors
    /// A value that is not finite, naming the block; the machine fails.
    pub fn run(
        &self,
        stream: &mut MachineBuffer,
        lengths: &[usize],
        observer: &mut dyn Observer<Machine>,
    ) -> Result<()> {
        let is_finite = self.block.run_fresh(
            &self.model,
            &self.machine,
            stream,
            lengths,
            &Numerics::EXACT,
            observer,
        )?;
        if is_finite {
            return Ok(());
        }
        let what = format!(
            "block {} ({:?}) produced a value that is not finite",
            self.index,
            self.block.kind()
        );
        let hint = "`nemoconv validate` names weights that are NaN or out of range";
        let block = Some(self.index);
        let fault = Fault::new(what).hint(hint);
        Err(NotFinite { block, fault }.into())
    }

    /// The same with a stream that this computer holds.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_values(
        &self,
        residual: &mut Vec<f32>,
        lengths: &[usize],
        observer: &mut dyn Observer<Machine>,
    ) -> Result<()> {
        let mut stream = self.machine.upload(std::mem::take(residual))?;
        self.run(&mut stream, lengths, observer)?;
        *residual = self.machine.download_all(stream)?;
        Ok(())
    }

    /// Shows the inputs of matrices that read the normed stream, without running the block: `routing` says which rows
    /// experts read.
    ///
    /// # Errors
    /// The machine fails.
    pub fn show_readers(
        &self,
        stream: &MachineBuffer,
        routing: Option<&[ExpertRows]>,
        capture: &mut Capture,
    ) -> Result<()> {
        let hidden = self.model.config().hidden_size;
        let rows = self.machine.len(stream) / hidden;
        let normed = self.block.normed(&self.machine, stream)?;
        if let Some(routing) = routing {
            capture.experts(self.index, routing);
        }
        for tensor in self.model.tensors() {
            let experts = routing.filter(|_| tensor.matrices > 1);
            for matrix in 0..tensor.matrices {
                let mut show = |input: &MachineBuffer, rows| {
                    capture.input(&tensor.name, matrix, &self.machine, input, rows)
                };
                match experts.map(|experts| &experts[matrix].rows) {
                    None => show(&normed, rows)?,
                    Some(rows) if rows.is_empty() => {}
                    Some(rows) => {
                        let gathered = self.machine.gather(&normed, hidden, rows)?;
                        show(&gathered, rows.len())?;
                    }
                }
            }
        }
        Ok(())
    }
}
