//! The whole network: embedding, pre-norm residual blocks, final norm, head.

use super::block::Block;
use super::linear::{Linear, required};
use super::mixers::{Turn, scan_shape};
use super::numerics::Numerics;
use super::observer::{Observer, Silent};
use super::places::Places;
use super::state::State;
use crate::artifact::{StoredModel, StoredTensor};
use crate::backend::{Backend, ScanShape};
use crate::error::{Error, Fault, NotFinite, Result};
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;

/// A model that can be run.
pub struct Network<B: Backend> {
    places: Places<B>,
    config: NemotronHConfig,
    scan: ScanShape,
    embedding: Linear<B>,
    blocks: Vec<Block<B>>,
    norm: B::Buffer,
    /// `None` where the embedding serves.
    head: Option<Linear<B>>,
}

/// One sequence of a batch: the tokens to run and the state they continue.
pub struct Sequence<'a, B: Backend> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Advanced by the run.
    pub state: &'a mut State<B>,
}

/// Bytes of a block's weights.
fn bytes_of(model: &StoredModel, block: usize) -> u64 {
    let prefix = format!("blk.{block}.");
    let tensors = model.tensors().iter();
    let own = tensors.filter(|tensor| tensor.name.starts_with(&prefix));
    own.map(StoredTensor::bytes).sum()
}

impl<B: Backend> Network<B> {
    /// Opens every weight of `model`.
    ///
    /// # Errors
    /// A tensor is missing, of a type that cannot be decoded, or cannot be read.
    pub fn open(model: &StoredModel, backend: B, numerics: &Numerics) -> Result<Self> {
        Self::open_on(model, vec![backend], numerics)
    }

    /// The same with blocks spread over several machines: streams go from one to the next.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(model: &StoredModel, machines: Vec<B>, numerics: &Numerics) -> Result<Self> {
        let config = model.config().clone();
        let blocks = 0..config.pattern.kinds().len();
        let bytes: Vec<u64> = blocks.clone().map(|block| bytes_of(model, block)).collect();
        let places = Places::spread(machines, &bytes);
        let opened = blocks.map(|block| Block::open(model, places.of(block), block, numerics));
        let open = |backend: &B, stem: &str| Linear::open(backend, model, stem, numerics);
        let head = match model.tensor("output.weight") {
            Some(_) => Some(open(places.last(), "output")?),
            None if places.is_spread() => Some(open(places.last(), "token_embd")?),
            None => None,
        };
        Ok(Self {
            blocks: opened.collect::<Result<_>>()?,
            embedding: open(places.first(), "token_embd")?,
            norm: places
                .last()
                .vector(required(model, "output_norm.weight")?)?,
            head,
            scan: scan_shape(&config, numerics),
            config,
            places,
        })
    }

    /// Sizes of the network.
    pub fn config(&self) -> &NemotronHConfig {
        &self.config
    }

    /// The machine of a block; behind the last block, that of the final norm and the head.
    pub fn backend_of(&self, block: usize) -> &B {
        self.places.of(block)
    }

    /// Sizes of the scan.
    pub fn scan_shape(&self) -> &ScanShape {
        &self.scan
    }

    /// The state before the first token.
    ///
    /// # Errors
    /// The machine fails.
    pub fn empty_state(&self) -> Result<State<B>> {
        State::empty(&self.places, &self.config, &self.scan)
    }

    /// An independent copy of a state: whatever is run from it leaves the other as it is.
    ///
    /// # Errors
    /// The machine fails.
    pub fn fork(&self, state: &State<B>) -> Result<State<B>> {
        state.fork(&self.places)
    }

    /// `count` states like this one, of which the last is it.
    ///
    /// # Errors
    /// The machine fails.
    pub fn forks(&self, state: State<B>, count: usize) -> Result<Vec<State<B>>> {
        let forks = (1..count).map(|_| self.fork(&state));
        let mut forks = forks.collect::<Result<Vec<_>>>()?;
        forks.extend((count > 0).then_some(state));
        Ok(forks)
    }

    /// Runs all sequences together and gives the normed stream, `[tokens of all sequences, hidden]`.
    ///
    /// # Errors
    /// A token outside the vocabulary; a value that is not finite, naming the block that produced it; a file that cannot
    /// be read.
    pub fn run(
        &self,
        sequences: &mut [Sequence<'_, B>],
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        self.run_blocks(sequences, None, observer)
    }

    /// The same, but gives rows `wanted` alone, as does whatever comes after the last block that has a state.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_wanted(
        &self,
        sequences: &mut [Sequence<'_, B>],
        wanted: &[u32],
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        self.run_blocks(sequences, Some(wanted), observer)
    }

    /// The residual stream before the first block, `[tokens, hidden]`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn embed(&self, tokens: &[u32]) -> Result<B::Buffer> {
        self.embedding.rows(self.places.first(), tokens)
    }

    /// Runs fresh sequences of `lengths` tokens each from block `first` on; their residual streams before it lie one after
    /// the other in `residual`, on the machine of that block. Gives the normed stream, on that of the head.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_from(
        &self,
        first: usize,
        mut residual: B::Buffer,
        lengths: &[usize],
    ) -> Result<B::Buffer> {
        let states = lengths.iter().map(|_| self.empty_state());
        let mut states = states.collect::<Result<Vec<State<B>>>>()?;
        let mut rows = 0;
        let turns = states.iter_mut().zip(lengths).map(|(state, length)| {
            let own = rows..rows + length;
            rows = own.end;
            Turn { rows: own, state }
        });
        let mut turns: Vec<_> = turns.collect();
        for block in first..self.blocks.len() {
            residual = self
                .places
                .carry(residual, block.max(first + 1) - 1, block)?;
            self.add_block(block, &mut residual, rows, &mut turns, &mut Silent)?;
        }
        self.normed(&residual)
    }

    fn run_blocks(
        &self,
        sequences: &mut [Sequence<'_, B>],
        wanted: Option<&[u32]>,
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        let tokens = self.tokens_of(sequences)?;
        let mut rows = tokens.len();
        let mut turns = turns_of(sequences);
        let mut residual = self.embed(&tokens)?;
        let states_end = self.states_end();
        for block in 0..states_end {
            residual = self.places.carry(residual, block.max(1) - 1, block)?;
            self.add_block(block, &mut residual, rows, &mut turns, observer)?;
        }
        if let Some(wanted) = wanted {
            let width = self.config.hidden_size;
            let backend = self.places.of(states_end.max(1) - 1);
            residual = backend.gather(&residual, width, wanted)?;
            rows = wanted.len();
        }
        for block in states_end..self.blocks.len() {
            residual = self.places.carry(residual, block.max(1) - 1, block)?;
            self.add_block(block, &mut residual, rows, &mut turns, observer)?;
        }
        observer.residual(self.blocks.len(), self.places.last(), &residual, rows)?;
        for turn in turns {
            turn.state.position += turn.rows.len();
        }
        self.normed(&residual)
    }

    fn normed(&self, residual: &B::Buffer) -> Result<B::Buffer> {
        let eps = self.config.norm_epsilon();
        self.places.last().rms_norm(residual, &self.norm, eps)
    }

    /// Blocks up to the last that has a state; those behind it see every row by itself.
    fn states_end(&self) -> usize {
        let mut blocks = self.blocks.iter();
        let last = blocks
            .rposition(|block| matches!(block.kind(), BlockKind::Mamba | BlockKind::Attention));
        last.map_or(0, |block| block + 1)
    }

    fn add_block(
        &self,
        index: usize,
        residual: &mut B::Buffer,
        rows: usize,
        turns: &mut [Turn<'_, B>],
        observer: &mut dyn Observer<B>,
    ) -> Result<()> {
        let block = &self.blocks[index];
        let backend = self.places.of(index);
        match block.run(backend, residual, rows, turns, observer)? {
            true => Ok(()),
            false => {
                let place = format!("block {index} ({:?})", block.kind());
                Err(not_finite(Some(index), &place))
            }
        }
    }

    /// The machine of the final norm and the head.
    pub fn head_backend(&self) -> &B {
        self.places.last()
    }

    /// Logits of some rows of what [`Self::run`] gave, `[rows, vocab_size]`.
    ///
    /// # Errors
    /// A logit that is not finite, or a file that cannot be read.
    pub fn logits(
        &self,
        normed: &B::Buffer,
        rows: &[u32],
        observer: &mut dyn Observer<B>,
    ) -> Result<Vec<f32>> {
        let logits = self.logits_at_head(normed, rows, observer)?;
        self.head_backend().download_all(logits)
    }

    /// The same, left where they are computed: on [`Self::head_backend`].
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn logits_at_head(
        &self,
        normed: &B::Buffer,
        rows: &[u32],
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let backend = self.places.last();
        let chosen = backend.gather(normed, self.config.hidden_size, rows)?;
        let logits = head.apply(backend, &chosen, rows.len(), observer)?;
        if !backend.is_finite(&logits)? {
            return Err(not_finite(None, "the output head"));
        }
        Ok(logits)
    }

    fn tokens_of(&self, sequences: &[Sequence<'_, B>]) -> Result<Vec<u32>> {
        let tokens: Vec<u32> = sequences
            .iter()
            .flat_map(|sequence| sequence.tokens)
            .copied()
            .collect();
        let vocabulary = self.config.vocab_size;
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            None => Ok(tokens),
            Some(token) => Err(Error::Run(
                Fault::new(format!(
                    "token id {token} is outside the model's vocabulary of {vocabulary}"
                ))
                .hint("the tokenizer is not this model's"),
            )),
        }
    }
}

fn turns_of<'a, B: Backend>(sequences: &'a mut [Sequence<'_, B>]) -> Vec<Turn<'a, B>> {
    let mut next = 0;
    sequences
        .iter_mut()
        .map(|sequence| {
            let rows = next..next + sequence.tokens.len();
            next = rows.end;
            Turn {
                rows,
                state: sequence.state,
            }
        })
        .collect()
}

fn not_finite(block: Option<usize>, place: &str) -> Error {
    let fault = Fault::new(format!("{place} produced a value that is not finite"));
    let fault = fault.hint("`nemoconv validate` names weights that are NaN or out of range");
    NotFinite { block, fault }.into()
}
