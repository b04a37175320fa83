//! The samples through the network and back, one block in memory at a time.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::block::{Block, OutputObserver};
use crate::artifact::{MemoryTensor, StoredModel};
use crate::backend::Machines;
use crate::backend::cpu::{Cpu, Residence};
use crate::calibrate::capture::Capture;
use crate::calibrate::layer::Layer;
use crate::calibrate::samples::Samples;
use crate::calibrate::stream::Streams;
use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::rewrite::RewrittenModel;

/// What stays the same on the way.
pub struct Walk<'a> {
    /// The network.
    pub weights: &'a RewrittenModel,
    /// Rows of each sequence, per cell.
    pub cells: Vec<Vec<Range<usize>>>,
    /// Called before every cell of every block.
    pub watch: &'a dyn Fn() -> Result<()>,
    in_file: bool,
}

impl<'a> Walk<'a> {
    /// `in_file` keeps streams in temporary files.
    pub fn new(
        weights: &'a RewrittenModel,
        samples: &Samples,
        in_file: bool,
        watch: &'a dyn Fn() -> Result<()>,
    ) -> Self {
        let rows = |sequences: &[Vec<u32>]| {
            let mut end = 0;
            let rows = sequences.iter().map(|sequence| {
                let first = end;
                end += sequence.len();
                first..end
            });
            rows.collect()
        };
        Self {
            weights,
            cells: samples.cells().map(rows).collect(),
            watch,
            in_file,
        }
    }

    /// Sizes of the network.
    pub fn config(&self) -> &'a NemotronHConfig {
        self.weights.stored().config()
    }

    /// Cells that have any sequence, with their numbers.
    pub fn filled_cells(&self) -> impl Iterator<Item = (usize, &[Range<usize>])> {
        let cells = self.cells.iter().map(Vec::as_slice).enumerate();
        cells.filter(|(_, sequences)| !sequences.is_empty())
    }

    /// Streams of zeros.
    pub fn streams(&self) -> Result<Streams> {
        let hidden = self.config().hidden_size;
        let rows = self
            .cells
            .iter()
            .map(|cell| cell.last().map_or(0, |rows| rows.end));
        Streams::new(rows.map(|rows| rows * hidden).collect(), self.in_file)
    }

    /// For operations without weights.
    pub fn backend(&self) -> Result<Cpu> {
        let nothing =
            StoredModel::in_memory(Path::new("no weights"), self.config().clone(), Vec::new())?;
        Ok(Cpu::new(Arc::new(nothing), Residence::Mapped))
    }

    /// The streams before every block, and behind the last.
    ///
    /// # Errors
    /// A token without an embedding, a block that computes something that is not a number, a file that cannot be read,
    /// whatever `watch` returns.
    pub fn forward(&self, samples: &Samples) -> Result<Vec<Streams>> {
        samples.check_vocabulary(self.config().vocab_size)?;
        let mut all = vec![self.embed(samples)?];
        for block in 0..self.blocks() {
            let layer = Layer::open(&Machines::Cpu, self.config(), block, self.tensors(block)?)?;
            let mut behind = self.streams()?;
            for (cell, sequences) in self.filled_cells() {
                (self.watch)()?;
                let lengths: Vec<usize> = sequences.iter().map(Range::len).collect();
                let mut stream = all[block].read(cell)?;
                layer.run_values(&mut stream, &lengths, &mut Capture::new(&[], None))?;
                behind.write(cell, stream)?;
            }
            all.push(behind);
        }
        Ok(all)
    }

    /// Turns the gradients behind block `block` into those before it; `before` are the streams there.
    ///
    /// # Errors
    /// A gradient that is not a number, a file that cannot be read, whatever `watch` returns.
    pub fn back(
        &self,
        block: usize,
        before: &Streams,
        gradients: &mut Streams,
        observer: &mut dyn OutputObserver,
    ) -> Result<()> {
        let layer = Block::open(self.config(), block, self.tensors(block)?)?;
        for (cell, sequences) in self.filled_cells() {
            (self.watch)()?;
            let (stream, gradient) = (before.read(cell)?, gradients.read(cell)?);
            let gradient = layer.back(&stream, sequences, gradient, observer)?;
            if !gradient.iter().all(|value| value.is_finite()) {
                let what = format!("the gradient before block {block} is not finite");
                return Err(Error::Run(Fault::new(what)));
            }
            gradients.write(cell, gradient)?;
        }
        Ok(())
    }

    /// Blocks of the network.
    pub fn blocks(&self) -> usize {
        self.config().pattern.kinds().len()
    }

    /// All tensors of a block.
    pub fn tensors(&self, block: usize) -> Result<Vec<MemoryTensor>> {
        let prefix = format!("blk.{block}.");
        let tensors = self.weights.stored().tensors().iter();
        let tensors = tensors.filter(|tensor| tensor.name.starts_with(&prefix));
        tensors
            .map(|tensor| self.weights.in_memory(&tensor.name))
            .collect()
    }

    fn embed(&self, samples: &Samples) -> Result<Streams> {
        let hidden = self.config().hidden_size;
        let embedding = self.weights.matrix("token_embd.weight", 0)?;
        let mut streams = self.streams()?;
        for (cell, sequences) in samples.cells().enumerate() {
            let tokens = sequences.iter().flatten();
            let rows = tokens.map(|token| &embedding[*token as usize * hidden..][..hidden]);
            streams.write(cell, rows.flatten().copied().collect())?;
        }
        Ok(streams)
    }
}
