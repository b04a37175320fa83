//! Two networks run over the same text, compared at every block and every scored position.
//!
//! Enters: opened networks, a chunked text. Leaves: [`Measured`]. Both run the same tokens in the same pieces, an eighth
//! of a chunk at a time, so that states can be compared on the way.

use std::ops::Range;

use super::logits::drift::{DriftAccumulator, ScoredPosition};
use super::logits::kl_divergence::PositionDrift;
use super::logits::layers::LayerAccumulator;
use super::logits::perplexity::{Chunk, ChunkedText};
use crate::backend::{Backend, ExpertRows, Exponentials, LogitRows};
use crate::error::{Error, Fault, NotFinite, Result};
use crate::forward::network::{Network, Sequence};
use crate::forward::observer::{Observer, Silent};
use crate::forward::state::{BlockState, State};
use crate::model::hybrid_pattern::BlockKind;
use crate::report::{LayerDrift, LogitsDrift};
use crate::rewrite::{Restore, Rewrites};

/// What a comparison of two networks gives.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Drift of the predictions.
    pub logits: LogitsDrift,
    /// Drift of every block.
    pub layers: Vec<LayerDrift>,
}

/// Told how many chunks are done of how many; an error stops the run.
pub type Watch<'a> = &'a dyn Fn(usize, usize) -> Result<()>;

/// Tokens that are run together: pieces of several chunks.
const BATCH_TOKENS: usize = 1024;
/// Tokens per piece whose hidden states are compared.
const SAMPLED_ROWS: usize = 16;
/// Logits that are held at a time, per network.
const LOGITS_AT_ONCE: usize = 1 << 22;

/// Compares `artifact` with `reference` on every chunk of `text`. Hidden values are compared in the reference's terms:
/// `rewrites` are those that the artifact underwent.
///
/// Positions where the artifact computes no numbers are counted as such, with all that are run together with them.
///
/// # Errors
/// The networks are of different models, the reference computes no numbers, a file cannot be read, `watch` says stop.
pub fn side_by_side<B: Backend>(
    reference: &Network<B>,
    artifact: &Network<B>,
    rewrites: &Rewrites,
    text: &ChunkedText,
    watch: Watch,
) -> Result<Measured> {
    check_same_model(reference, artifact)?;
    rewrites.check(artifact.config())?;
    let restore = rewrites.restore();
    let config = artifact.config();
    let kinds = config.pattern.kinds().iter().map(|kind| name_of(*kind));
    let mut layers = LayerAccumulator::new(kinds, text.context_tokens());
    let mut drift = DriftAccumulator::new(text.context_tokens(), config.vocab_size);
    let chunks: Vec<Chunk> = text.chunks().collect();
    let together = (BATCH_TOKENS * layers.state_times().len() / text.context_tokens()).max(1);
    for (index, group) in chunks.chunks(together).enumerate() {
        watch(index * together, chunks.len())?;
        let mut pair = Pair {
            reference: Side::new(reference, group.len())?,
            artifact: Side::new(artifact, group.len())?,
            restore: &restore,
            layers: &mut layers,
            drift: &mut drift,
        };
        pair.run(group)?;
    }
    watch(chunks.len(), chunks.len())?;
    Ok(Measured {
        logits: drift.finish(),
        layers: layers.finish(),
    })
}

/// The reference and the artifact have the same blocks and the same vocabulary.
fn check_same_model<B: Backend>(reference: &Network<B>, artifact: &Network<B>) -> Result<()> {
    let (theirs, ours) = (reference.config(), artifact.config());
    let what = if theirs.pattern != ours.pattern {
        "other blocks"
    } else if theirs.vocab_size.next_multiple_of(8) != ours.vocab_size.next_multiple_of(8) {
        "another vocabulary size"
    } else if theirs.hidden_size > ours.hidden_size {
        "a larger hidden size"
    } else {
        return Ok(());
    };
    let fault = Fault::new(format!("the reference has {what} than the artifact"));
    Err(Error::Run(fault.hint("they are different models")))
}

/// The report's word for a kind of block.
pub fn name_of(kind: BlockKind) -> &'static str {
    match kind {
        BlockKind::Mamba => "mamba2",
        BlockKind::Attention => "attention",
        BlockKind::Mlp => "mlp",
        BlockKind::Moe => "moe",
    }
}

/// One network with the states of some chunks.
struct Side<'a, B: Backend> {
    network: &'a Network<B>,
    states: Vec<State<B>>,
}

/// One network's view of a piece.
struct Seen<B: Backend> {
    normed: B::Buffer,
    outputs: Vec<Vec<f32>>,
    experts: Vec<(usize, Vec<Vec<u32>>)>,
}

impl<'a, B: Backend> Side<'a, B> {
    fn new(network: &'a Network<B>, chunks: usize) -> Result<Self> {
        let states = (0..chunks).map(|_| network.empty_state());
        Ok(Self {
            states: states.collect::<Result<_>>()?,
            network,
        })
    }

    /// Runs the same piece of every chunk.
    fn advance(&mut self, inputs: &[Vec<u32>], piece: &Range<usize>) -> Result<Seen<B>> {
        let mut capture = Capture {
            width: self.network.config().hidden_size,
            rows: sampled_rows(inputs.len(), piece.len()),
            outputs: Vec::new(),
            experts: Vec::new(),
        };
        let sequences = inputs.iter().zip(&mut self.states);
        let mut sequences: Vec<_> = sequences
            .map(|(tokens, state)| Sequence {
                tokens: &tokens[piece.clone()],
                state,
            })
            .collect();
        let normed = self.network.run(&mut sequences, &mut capture)?;
        Ok(Seen {
            normed,
            outputs: capture.outputs,
            experts: capture.experts,
        })
    }

    fn ssm_state(&self, chunk: usize, block: usize) -> Result<Option<Vec<f32>>> {
        Ok(match &self.states[chunk].blocks[block] {
            BlockState::Mamba { ssm, .. } => {
                let shape = self.network.scan_shape();
                let backend = self.network.backend_of(block);
                backend.on_host("state_drift");
                Some(backend.download(ssm, 0..shape.state_len())?)
            }
            _ => None,
        })
    }
}

/// Rows of a batch, spread over each of its pieces.
fn sampled_rows(pieces: usize, len: usize) -> Vec<u32> {
    let step = len.div_ceil(SAMPLED_ROWS).max(1);
    let rows = (0..pieces).flat_map(|piece| (piece * len..(piece + 1) * len).step_by(step));
    rows.map(|row| row as u32).collect()
}

/// Keeps the outputs of every block at some rows, and all expert choices.
struct Capture {
    width: usize,
    rows: Vec<u32>,
    outputs: Vec<Vec<f32>>,
    experts: Vec<(usize, Vec<Vec<u32>>)>,
}

impl<B: Backend> Observer<B> for Capture {
    fn residual(
        &mut self,
        block: usize,
        backend: &B,
        residual: &B::Buffer,
        _: usize,
    ) -> Result<()> {
        if block > 0 {
            let rows = backend.gather(residual, self.width, &self.rows)?;
            backend.on_host("block_drift");
            self.outputs.push(backend.download_all(rows)?);
        }
        Ok(())
    }

    fn experts(&mut self, block: usize, experts: &[ExpertRows]) {
        let all = experts.iter().flat_map(|expert| &expert.rows);
        let rows = all.max().map_or(0, |row| *row as usize + 1);
        let mut chosen = vec![Vec::new(); rows];
        for (index, expert) in experts.iter().enumerate() {
            for row in &expert.rows {
                chosen[*row as usize].push(index as u32);
            }
        }
        self.experts.push((block, chosen));
    }
}

struct Pair<'a, B: Backend> {
    reference: Side<'a, B>,
    artifact: Side<'a, B>,
    restore: &'a Restore<'a>,
    layers: &'a mut LayerAccumulator,
    drift: &'a mut DriftAccumulator,
}

impl<B: Backend> Pair<'_, B> {
    fn run(&mut self, chunks: &[Chunk]) -> Result<()> {
        let inputs: Vec<Vec<u32>> = chunks.iter().map(Chunk::input).collect();
        let mut begin = 0;
        for (time, end) in self.layers.state_times().to_vec().into_iter().enumerate() {
            let piece = begin..end;
            let reference = self
                .reference
                .advance(&inputs, &piece)
                .map_err(of_reference)?;
            let artifact = match self.artifact.advance(&inputs, &piece) {
                Err(Error::NotFinite(not_finite)) => {
                    let rows = sampled_rows(inputs.len(), piece.len()).len();
                    let rest = begin..inputs.first().map_or(begin, Vec::len);
                    self.give_up(not_finite.block, rows, &scored_in(chunks, &rest));
                    return Ok(());
                }
                advanced => advanced?,
            };
            let routing = self.compare_blocks(&reference, &artifact);
            self.compare_states(time, chunks.len())?;
            let scored = scored_in(chunks, &piece);
            self.compare_logits(&scored, &reference.normed, &artifact.normed, &routing)?;
            begin = end;
        }
        Ok(())
    }

    /// Counts what can no longer be compared: a state that is not finite stays so.
    fn give_up(&mut self, block: Option<usize>, rows: usize, scored: &[Scored]) {
        if let Some(block) = block {
            self.layers.push_non_finite(block, rows);
        }
        for scored in scored {
            self.drift.push(ScoredPosition::new(scored.position, None));
        }
    }

    /// Which rows of the piece changed an expert set in any block; empty for dense models.
    fn compare_blocks(&mut self, reference: &Seen<B>, artifact: &Seen<B>) -> Vec<bool> {
        let width = self.reference.network.config().hidden_size;
        let widened = self.artifact.network.config().hidden_size;
        // A widened stream is `[x, 0] * sqrt(H' / H)`.
        let factor = (width as f32 / widened as f32).sqrt();
        for (layer, (theirs, ours)) in reference.outputs.iter().zip(&artifact.outputs).enumerate() {
            let mut ours = ours.clone();
            self.restore.stream(&mut ours);
            let rows = ours.chunks_exact(widened).flat_map(|row| &row[..width]);
            let ours: Vec<f32> = rows.map(|x| x * factor).collect();
            self.layers.push_output(layer, width, theirs, &ours);
        }
        let mut changed = Vec::new();
        for ((block, theirs), (_, ours)) in reference.experts.iter().zip(&artifact.experts) {
            changed.resize(theirs.len().max(changed.len()), false);
            for (row, (theirs, ours)) in theirs.iter().zip(ours).enumerate() {
                changed[row] |= self.layers.push_experts(*block, theirs, ours);
            }
        }
        changed
    }

    fn compare_states(&mut self, time: usize, chunks: usize) -> Result<()> {
        let config = self.reference.network.config();
        let blocks = 0..config.pattern.kinds().len();
        for (block, chunk) in blocks.flat_map(|block| (0..chunks).map(move |chunk| (block, chunk)))
        {
            let theirs = self.reference.ssm_state(chunk, block)?;
            let ours = self.artifact.ssm_state(chunk, block)?;
            if let (Some(theirs), Some(mut ours)) = (theirs, ours) {
                self.restore.state(block, config.mamba_head_dim, &mut ours);
                let heads = config.mamba_num_heads;
                self.layers.push_state(block, time, heads, &theirs, &ours);
            }
        }
        Ok(())
    }

    fn compare_logits(
        &mut self,
        scored: &[Scored],
        reference: &B::Buffer,
        artifact: &B::Buffer,
        routing: &[bool],
    ) -> Result<()> {
        let theirs = self.reference.network;
        let ours = self.artifact.network;
        for scored in scored.chunks((LOGITS_AT_ONCE / ours.config().vocab_size).max(1)) {
            let rows: Vec<u32> = scored.iter().map(|scored| scored.row).collect();
            let reference = theirs.logits_at_head(reference, &rows, &mut Silent);
            let reference = reference.map_err(of_reference)?;
            let artifact = match ours.logits_at_head(artifact, &rows, &mut Silent) {
                Err(Error::NotFinite(not_finite)) => {
                    self.give_up(not_finite.block, 0, scored);
                    continue;
                }
                logits => logits?,
            };
            let drifts = self.drifts(scored, reference, &artifact)?;
            for (scored, drift) in scored.iter().zip(drifts) {
                self.drift.push(ScoredPosition {
                    routing_changed: routing.get(scored.row as usize).copied(),
                    ..ScoredPosition::new(scored.position, drift)
                });
            }
        }
        Ok(())
    }

    /// What both say about some positions, from their rows of logits; `None` where they are too large to be compared.
    fn drifts(
        &self,
        scored: &[Scored],
        reference: B::Buffer,
        artifact: &B::Buffer,
    ) -> Result<Vec<Option<PositionDrift>>> {
        let (theirs, ours) = (self.reference.network, self.artifact.network);
        let backend = ours.head_backend();
        let reference = match theirs.head_backend().shares_buffers(backend) {
            true => reference,
            false => backend.upload(theirs.head_backend().download_all(reference)?)?,
        };
        let strides = [theirs, ours].map(|network| network.config().vocab_size);
        let [reference, artifact] = [(&reference, strides[0]), (artifact, strides[1])]
            .map(|(logits, stride)| LogitRows { logits, stride });
        // The larger one is padded.
        let vocabulary = strides[0].min(strides[1]);
        let targets_reference = target_logits(backend, &reference, scored)?;
        let targets = target_logits(backend, &artifact, scored)?;
        let rows = backend.kl_divergence(reference, artifact, vocabulary, Exponentials::System)?;
        let targets = targets_reference.into_iter().zip(targets);
        let drifts = rows
            .iter()
            .zip(targets)
            .map(|(row, (reference, artifact))| PositionDrift::new(row, reference, artifact));
        let is_number = |drift: PositionDrift| drift.kl_divergence.is_finite().then_some(drift);
        Ok(drifts.map(is_number).collect())
    }
}

/// The logit of every row's target.
fn target_logits<B: Backend>(
    backend: &B,
    rows: &LogitRows<'_, B::Buffer>,
    scored: &[Scored],
) -> Result<Vec<f32>> {
    let places = scored.iter().enumerate();
    let places = places.map(|(row, scored)| (row * rows.stride) as u32 + scored.target);
    let places: Vec<u32> = places.collect();
    backend.download_all(backend.gather(rows.logits, 1, &places)?)
}

/// Without a reference there is nothing to compare with.
fn of_reference(error: Error) -> Error {
    let Error::NotFinite(not_finite) = error else {
        return error;
    };
    let NotFinite { block, mut fault } = *not_finite;
    fault.what = format!("the reference computes no numbers: {}", fault.what);
    let fault =
        fault.hint("`nemoconv validate` of the reference alone names its weights that are NaN");
    NotFinite { block, fault }.into()
}

/// A scored position of a batch.
struct Scored {
    row: u32,
    position: usize,
    target: u32,
}

/// The scored positions of the same piece of every chunk.
fn scored_in(chunks: &[Chunk], piece: &Range<usize>) -> Vec<Scored> {
    let chunks = chunks.iter().enumerate();
    chunks
        .flat_map(|(index, chunk)| {
            let inside = chunk
                .scored()
                .filter(|(position, _)| piece.contains(position));
            inside.map(move |(position, target)| Scored {
                row: (index * piece.len() + position - piece.start) as u32,
                position,
                target,
            })
        })
        .collect()
}

/// Runs one network over a text and hands out the logits of every scored position, in order.
///
/// # Errors
/// A value is not finite, a file cannot be read, `watch` says stop, and whatever `take` returns.
pub fn for_each_scored_row<B: Backend>(
    network: &Network<B>,
    text: &ChunkedText,
    watch: Watch,
    mut take: impl FnMut(usize, u32, &[f32]) -> Result<()>,
) -> Result<()> {
    let total = text.chunks().len();
    for (done, chunk) in text.chunks().enumerate() {
        watch(done, total)?;
        score_chunk(network, &chunk, &mut take)?;
    }
    watch(total, total)
}

/// The same of one chunk.
///
/// # Errors
/// A value is not finite, a file cannot be read, and whatever `take` returns.
pub fn score_chunk<B: Backend>(
    network: &Network<B>,
    chunk: &Chunk,
    mut take: impl FnMut(usize, u32, &[f32]) -> Result<()>,
) -> Result<()> {
    let vocabulary = network.config().vocab_size;
    let tokens = chunk.input();
    let mut state = network.empty_state()?;
    let sequence = Sequence {
        tokens: &tokens,
        state: &mut state,
    };
    let normed = network.run(&mut [sequence], &mut Silent)?;
    let scored: Vec<(usize, u32)> = chunk.scored().collect();
    for scored in scored.chunks((LOGITS_AT_ONCE / vocabulary).max(1)) {
        let rows: Vec<u32> = scored
            .iter()
            .map(|(position, _)| *position as u32)
            .collect();
        let logits = network.logits(&normed, &rows, &mut Silent)?;
        for ((position, target), logits) in scored.iter().zip(logits.chunks_exact(vocabulary)) {
            take(*position, *target, logits)?;
        }
    }
    Ok(())
}

/// Largest magnitude of every matrix input over some chunks, divided by 127: the scales of static 8-bit activations.
///
/// Of a chunk that leaves the numbers counts what comes before: whoever compares meets the same, and says whose it is.
pub fn static_scales<B: Backend>(
    network: &Network<B>,
    text: &ChunkedText,
    chunks: usize,
) -> Result<std::collections::BTreeMap<String, f32>> {
    let mut seen = Magnitudes::default();
    for chunk in text.chunks().take(chunks) {
        match seen.add(network, &chunk) {
            Ok(()) | Err(Error::NotFinite(_)) => {}
            Err(error) => return Err(error),
        }
    }
    let scales = seen.0.into_iter().map(|(name, max)| (name, max / 127.0));
    Ok(scales.collect())
}

/// The largest magnitude of each tensor's input.
#[derive(Default)]
struct Magnitudes(std::collections::BTreeMap<String, f32>);

impl Magnitudes {
    fn add<B: Backend>(&mut self, network: &Network<B>, chunk: &Chunk) -> Result<()> {
        let tokens = chunk.input();
        let mut state = network.empty_state()?;
        let sequence = Sequence {
            tokens: &tokens,
            state: &mut state,
        };
        let normed = network.run(&mut [sequence], self)?;
        let all: Vec<u32> = (0..tokens.len() as u32).collect();
        for rows in all.chunks((LOGITS_AT_ONCE / network.config().vocab_size).max(1)) {
            network.logits(&normed, rows, self)?;
        }
        Ok(())
    }
}

impl<B: Backend> Observer<B> for Magnitudes {
    fn input(
        &mut self,
        tensor: &str,
        _: usize,
        backend: &B,
        input: &B::Buffer,
        rows: usize,
    ) -> Result<()> {
        let Some(in_features) = backend.len(input).checked_div(rows) else {
            return Ok(());
        };
        let columns = backend.column_sums(input, in_features)?;
        let max = columns.max_abs.into_iter().fold(0.0, f32::max);
        let entry = self.0.entry(tensor.to_string()).or_default();
        *entry = entry.max(max);
        Ok(())
    }
}
