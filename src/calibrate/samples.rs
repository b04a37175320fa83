//! Token sequences that a model reads while it is calibrated.
//!
//! Enters: text or documents and a tokenizer. Leaves: sequences with their digest. Knows no model.

use sha2::{Digest, Sha256};

use super::cells::cells;
use crate::error::{Error, Fault, Result};
use crate::model::tokenizer::TextEncoder;

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSettings {
    /// Tokens per sequence.
    pub context_tokens: usize,
    /// Sequences at most.
    pub max_sequences: usize,
    /// Chooses among more sequences than that.
    pub seed: u64,
}

impl Default for SampleSettings {
    fn default() -> Self {
        Self {
            context_tokens: 512,
            max_sequences: 512,
            seed: 0,
        }
    }
}

/// Sequences of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    /// Each is run from an empty state.
    pub sequences: Vec<Vec<u32>>,
}

impl Samples {
    /// Cuts a text into windows as llama-imatrix and llama-perplexity do: whole windows only, and where the tokenizer puts
    /// BOS before a text it replaces the first token of each. Of more windows than `max_sequences` a seeded choice stays,
    /// in order.
    ///
    /// # Errors
    /// The text is shorter than one window, or the encoder refuses it.
    pub fn of_text(encoder: &TextEncoder, text: &str, settings: SampleSettings) -> Result<Self> {
        let tokens = encoder.encode(text, None)?;
        let bos = encoder
            .bos()
            .map(|bos| bos.id)
            .filter(|bos| tokens.first() == Some(bos));
        let mut sequences: Vec<Vec<u32>> = tokens
            .chunks_exact(settings.context_tokens)
            .map(<[u32]>::to_vec)
            .collect();
        if sequences.is_empty() {
            let what = format!(
                "the calibration text has {} tokens, one sequence needs {}",
                tokens.len(),
                settings.context_tokens
            );
            let hint = "use a longer text, or shorter sequences with `--calibration-context`";
            return Err(Error::Data(Fault::new(what).hint(hint)));
        }
        for sequence in &mut sequences {
            if let Some(bos) = bos {
                sequence[0] = bos;
            }
        }
        Ok(Self {
            sequences: choose(sequences, settings),
        })
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// The sequences of every cell.
    pub fn cells(&self) -> impl Iterator<Item = &[Vec<u32>]> {
        cells(self.sequences.len()).map(|range| &self.sequences[range])
    }

    /// SHA-256 of the ids, little-endian, each sequence after its length.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        for sequence in &self.sequences {
            hasher.update((sequence.len() as u64).to_le_bytes());
            sequence
                .iter()
                .for_each(|id| hasher.update(id.to_le_bytes()));
        }
        hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The sequences with the smallest hashes of seed and position.
fn choose(sequences: Vec<Vec<u32>>, settings: SampleSettings) -> Vec<Vec<u32>> {
    if sequences.len() <= settings.max_sequences {
        return sequences;
    }
    let rank =
        |at: usize| xxhash_rust::xxh3::xxh3_64_with_seed(&(at as u64).to_le_bytes(), settings.seed);
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|at| rank(*at));
    let mut kept = vec![false; sequences.len()];
    order[..settings.max_sequences]
        .iter()
        .for_each(|at| kept[*at] = true);
    let chosen = sequences.into_iter().zip(kept);
    chosen
        .filter(|(_, kept)| *kept)
        .map(|(sequence, _)| sequence)
        .collect()
}
