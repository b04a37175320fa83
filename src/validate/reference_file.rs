//! A file that stands in for the reference model: compact, or a base file of llama.cpp.
//!
//! Enters: a network and a text, or such a file and the network of an artifact. Leaves: the file, or the drift from it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::logits::compact_file::{
    CompactFileReader, CompactFileWriter, ReferenceHeader, StatedBound,
};
use super::logits::compact_reference::{CompactRow, Keep};
use super::logits::drift::{DriftAccumulator, ScoredPosition};
use super::logits::kl_divergence::compare_log_probs;
use super::logits::kld_base::{KldBaseReader, KldBaseWriter};
use super::logits::perplexity::ChunkedText;
use super::side_by_side::{Watch, for_each_scored_row, score_chunk};
use crate::backend::Backend;
use crate::error::{Error, Fault, Result};
use crate::forward::network::Network;
use crate::report::{Finding, LogitsDrift, Rule};

/// An opened reference file; its rows are read once.
#[derive(Debug)]
pub struct ReferenceFile {
    path: PathBuf,
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    Compact(Box<CompactFileReader>),
    KldBase(Box<KldBaseReader>),
}

impl ReferenceFile {
    /// Opens a file that begins as one of the formats does; `None` for what is neither, such as a model.
    ///
    /// # Errors
    /// The file cannot be read, is cut or corrupt.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        if !path.is_file() {
            return Ok(None);
        }
        let failed = |error| Error::from(crate::formats::Error::from(error).in_file(path));
        let mut magic = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(8).read_to_end(&mut magic).map_err(failed)?;
        let rows = match magic.as_slice() {
            b"nemo-ref" => Rows::Compact(Box::new(CompactFileReader::open(path)?)),
            b"_logits_" => Rows::KldBase(Box::new(KldBaseReader::open(path)?)),
            _ => return Ok(None),
        };
        let path = path.to_owned();
        Ok(Some(Self { path, rows }))
    }

    /// Rows of the output matrix of the model it was made of.
    pub fn vocab_size(&self) -> usize {
        match &self.rows {
            Rows::Compact(reader) => reader.header().vocab_size,
            Rows::KldBase(reader) => reader.vocab_size(),
        }
    }

    /// The tokens it was made of: all of them, or those of the first `chunks` chunks.
    ///
    /// A base file does not say whether its chunks begin with a token of their own; `bos` is the artifact's.
    ///
    /// # Errors
    /// There is no whole chunk.
    pub fn text(&self, bos: Option<u32>, chunks: Option<usize>) -> Result<ChunkedText> {
        match &self.rows {
            Rows::Compact(reader) => {
                let text = reader.text();
                let (tokens, context) = (text.tokens().to_vec(), text.context_tokens());
                ChunkedText::new(tokens, context, text.bos(), chunks)
            }
            Rows::KldBase(reader) => {
                let tokens = reader.tokens().to_vec();
                let bos = bos.filter(|bos| tokens.first() == Some(bos));
                ChunkedText::new(tokens, reader.context_tokens(), bos, chunks)
            }
        }
    }

    /// What is wrong if the artifact's tokenizer turns the text that the file was made of into `tokens`.
    pub fn check_tokens(&self, tokens: &[u32]) -> Option<Finding> {
        let theirs = match &self.rows {
            Rows::Compact(reader) => reader.text().tokens(),
            Rows::KldBase(reader) => reader.tokens(),
        };
        let pairs = theirs.iter().zip(tokens);
        let message = match pairs.clone().position(|(a, b)| a != b) {
            Some(at) => format!(
                "the text is not that of the reference file, or is cut into other tokens: token {at} is {}, the file has {}",
                tokens[at], theirs[at]
            ),
            None if tokens.len() < theirs.len() => format!(
                "the text is not that of the reference file: it has {} tokens, the file {}",
                tokens.len(),
                theirs.len()
            ),
            None => return None,
        };
        let finding = Finding::new(Rule::TokenIdsDiffer, message);
        Some(finding.in_file(self.path.display().to_string()))
    }

    /// How far the predictions of `artifact` on `text`, which is [`Self::text`], are from those in the file. Positions
    /// without finite logits are counted as such.
    ///
    /// # Errors
    /// The artifact has another vocabulary, the file ends early or cannot be read, `watch` says stop.
    pub fn measure<B: Backend>(
        mut self,
        artifact: &Network<B>,
        text: &ChunkedText,
        watch: Watch,
    ) -> Result<LogitsDrift> {
        let vocabulary = self.vocab_size();
        self.check_vocabulary(artifact.config().vocab_size)?;
        let mut drift = DriftAccumulator::new(text.context_tokens(), vocabulary);
        let total = text.chunks().len();
        for (done, chunk) in text.chunks().enumerate() {
            watch(done, total)?;
            let mut compared = 0;
            let scored = score_chunk(artifact, &chunk, |position, target, logits| {
                compared += 1;
                drift.push(self.compare_next(position, target, &logits[..vocabulary])?);
                Ok(())
            });
            match scored {
                Err(Error::NotFinite(_)) => {
                    for (position, _) in chunk.scored().skip(compared) {
                        self.skip_next()?;
                        drift.push(ScoredPosition::new(position, None));
                    }
                }
                scored => scored?,
            }
        }
        watch(total, total)?;
        Ok(drift.finish())
    }

    /// Compares the next row.
    fn compare_next(
        &mut self,
        position: usize,
        target: u32,
        logits: &[f32],
    ) -> Result<ScoredPosition> {
        Ok(match &mut self.rows {
            Rows::Compact(reader) => {
                let row = reader.read_row()?.ok_or_else(|| ends_early(&self.path))?;
                let compared = row.compare(logits, target);
                ScoredPosition {
                    kl_interval: compared.map(|(_, interval)| interval),
                    ..ScoredPosition::new(position, compared.map(|(drift, _)| drift))
                }
            }
            Rows::KldBase(reader) => {
                let mut row = Vec::new();
                if !reader.read_row(&mut row)? {
                    return Err(ends_early(&self.path));
                }
                ScoredPosition::new(position, compare_log_probs(&row, logits, target))
            }
        })
    }

    /// Leaves the next row out.
    fn skip_next(&mut self) -> Result<()> {
        let is_there = match &mut self.rows {
            Rows::Compact(reader) => reader.read_row()?.is_some(),
            Rows::KldBase(reader) => reader.read_row(&mut Vec::new())?,
        };
        is_there.then_some(()).ok_or_else(|| ends_early(&self.path))
    }

    fn check_vocabulary(&self, own: usize) -> Result<()> {
        let theirs = self.vocab_size();
        // A GGUF vocabulary is padded to a multiple of 8.
        if theirs <= own && theirs.next_multiple_of(8) >= own {
            return Ok(());
        }
        let what = format!("the reference has a vocabulary of {theirs}, the artifact of {own}");
        let fault = Fault::new(what).in_file(&self.path);
        Err(Error::Run(fault.hint("they are different models")))
    }
}

fn ends_early(path: &Path) -> Error {
    crate::formats::Error::malformed("has fewer positions than its header says")
        .in_file(path)
        .into()
}

/// Writes a compact reference of `network` on `text`.
///
/// # Errors
/// The system refuses, a logit is not finite, and as [`for_each_scored_row`].
pub fn write_compact<B: Backend>(
    path: &Path,
    header: &ReferenceHeader,
    keep: Keep,
    (network, text): (&Network<B>, &ChunkedText),
    watch: Watch,
) -> Result<StatedBound> {
    let mut writer = CompactFileWriter::create(path, header, text)?;
    for_each_scored_row(network, text, watch, |_, target, logits| {
        let not_finite = || Error::Run(Fault::new("the reference's logits are not finite"));
        writer.write_row(&CompactRow::new(logits, target, keep).ok_or_else(not_finite)?)
    })?;
    writer.finish()
}

/// Writes a base file in llama.cpp's format.
///
/// # Errors
/// The system refuses, and as [`for_each_scored_row`].
pub fn write_kld_base<B: Backend>(
    path: &Path,
    network: &Network<B>,
    text: &ChunkedText,
    watch: Watch,
) -> Result<()> {
    let vocab_size = network.config().vocab_size;
    let context_tokens = text.context_tokens();
    let mut writer = KldBaseWriter::create(path, context_tokens, vocab_size, text.tokens())?;
    for_each_scored_row(network, text, watch, |_, _, logits| {
        writer.write_row(logits)
    })?;
    writer.finish()
}
