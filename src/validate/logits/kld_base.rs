//! llama.cpp's KLD base file (`--save-all-logits`, `--kl-divergence-base`), row by row.
//!
//! Enters: such a file, or logits to store. Leaves: log-probabilities with 16 bits, or such a file. A header is believed
//! only where the length of the file bears it out.
//!
//! Layout, little endian: `_logits_`; i32 n_ctx, n_vocab, n_chunk; i32 tokens of all chunks; per scored position f32
//! scale, f32 min_log_prob, u16 code per token of the vocabulary, padded to an even count. ln p = scale code +
//! min_log_prob. Source: llama.cpp `tools/perplexity/perplexity.cpp`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::perplexity::{MAX_CONTEXT_TOKENS, scored_positions};
use crate::error::{Error, Fault, Result};
use crate::formats;

const MAGIC: &[u8; 8] = b"_logits_";
const HEADER_BYTES: u64 = 20;
/// No vocabulary in the field comes near.
pub(super) const MAX_VOCAB: usize = 1 << 24;
/// Logits further below the largest are clipped.
const RANGE: f32 = 16.0;

/// Reads a base file from the front to the end.
#[derive(Debug)]
pub struct KldBaseReader {
    path: PathBuf,
    file: BufReader<File>,
    context_tokens: usize,
    vocab_size: usize,
    tokens: Vec<u32>,
    rows_left: usize,
    bytes: Vec<u8>,
}

impl KldBaseReader {
    /// Opens a file and reads its header and tokens.
    ///
    /// # Errors
    /// A file that cannot be read, is no base file, or has another length than its header asks for.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read_header(path).map_err(|error| Error::Input(error.in_file(path)))
    }

    fn read_header(path: &Path) -> formats::Result<Self> {
        let file = File::open(path)?;
        let found = file.metadata()?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        if found < HEADER_BYTES {
            return Err(truncated(HEADER_BYTES, found));
        }
        let mut magic = [0; MAGIC.len()];
        file.read_exact(&mut magic)?;
        if &magic != MAGIC {
            return Err(formats::Error::malformed(
                "this is not a KLD base file of llama.cpp",
            ));
        }
        let context_tokens = count(&mut file, "n_ctx", 3, MAX_CONTEXT_TOKENS)?;
        let vocab_size = count(&mut file, "n_vocab", 1, MAX_VOCAB)?;
        let chunks = count(&mut file, "n_chunk", 1, i32::MAX as usize)?;
        let expected = file_bytes(context_tokens, vocab_size, chunks);
        if found < expected {
            return Err(truncated(expected, found).hint("it was cut short, or its run was"));
        }
        if found > expected {
            let what = format!("{} bytes follow the last position", found - expected);
            return Err(formats::Error::malformed(what).at(expected));
        }
        // The file is as long as its header says, so this allocates no more than there is.
        let tokens = read_tokens(&mut file, context_tokens * chunks, vocab_size)?;
        Ok(Self {
            path: path.into(),
            file,
            context_tokens,
            vocab_size,
            rows_left: scored_positions(context_tokens).len() * chunks,
            tokens,
            bytes: vec![0; row_bytes(vocab_size) as usize],
        })
    }

    /// Tokens of a chunk.
    pub fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// Rows of the output matrix.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokens of all chunks, as they are scored: BOS replacement is up to the model.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Reads the log-probabilities of the next scored position; false after the last.
    ///
    /// # Errors
    /// The system refuses, or a row has a scale that is no number.
    pub fn read_row(&mut self, log_probs: &mut Vec<f32>) -> Result<bool> {
        if self.rows_left == 0 {
            return Ok(false);
        }
        self.rows_left -= 1;
        let read = self.file.read_exact(&mut self.bytes);
        read.map_err(|error| Error::Input(formats::Error::from(error).in_file(&self.path)))?;
        decode_row(&self.bytes, self.vocab_size, log_probs).map_err(|what| {
            let row = self.rows_left;
            let what = format!("{what}, {row} positions before the end");
            Error::Input(formats::Error::malformed(what).in_file(&self.path))
        })?;
        Ok(true)
    }
}

/// Writes a base file under a temporary name; [`KldBaseWriter::finish`] gives it its own.
#[derive(Debug)]
pub struct KldBaseWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    vocab_size: usize,
    rows_left: usize,
    bytes: Vec<u8>,
}

impl KldBaseWriter {
    /// Begins a file for whole chunks of `tokens`.
    ///
    /// # Errors
    /// Numbers the format cannot hold, or a folder that cannot be written to.
    pub fn create(
        path: &Path,
        context_tokens: usize,
        vocab_size: usize,
        tokens: &[u32],
    ) -> Result<Self> {
        let chunks = tokens.len() / context_tokens.max(1);
        let fits = (3..=MAX_CONTEXT_TOKENS).contains(&context_tokens)
            && (1..=MAX_VOCAB).contains(&vocab_size)
            && chunks > 0
            && chunks * context_tokens == tokens.len()
            && tokens.iter().all(|&token| (token as usize) < vocab_size);
        if !fits {
            let what = format!(
                "{} tokens in chunks of {context_tokens}, vocabulary {vocab_size}: a KLD base file cannot hold these",
                tokens.len()
            );
            return Err(Error::Plan(Fault::new(what).in_file(path)));
        }
        let mut header = MAGIC.to_vec();
        let counts = [context_tokens as u32, vocab_size as u32, chunks as u32];
        let words = counts.iter().chain(tokens);
        header.extend(words.flat_map(|word| word.to_le_bytes()));
        let mut file = BufWriter::with_capacity(1 << 20, temporary(path)?);
        file.write_all(&header)
            .map_err(|source| write_error(path, source))?;
        Ok(Self {
            path: path.into(),
            file,
            vocab_size,
            rows_left: scored_positions(context_tokens).len() * chunks,
            bytes: Vec::new(),
        })
    }

    /// Stores the logits of the next scored position.
    ///
    /// # Errors
    /// The system refuses, a logit is not finite, or there are more rows than positions.
    pub fn write_row(&mut self, logits: &[f32]) -> Result<()> {
        let wrong =
            logits.len() != self.vocab_size || !logits.iter().all(|logit| logit.is_finite());
        if wrong || self.rows_left == 0 {
            let what = "a position has logits that are not numbers, too many or too few";
            return Err(Error::Weights(Fault::new(what).in_file(&self.path)));
        }
        self.rows_left -= 1;
        self.bytes.clear();
        encode_row(logits, &mut self.bytes);
        let written = self.file.write_all(&self.bytes);
        written.map_err(|source| write_error(&self.path, source))
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The system refuses, or a position is missing.
    pub fn finish(self) -> Result<()> {
        if self.rows_left > 0 {
            let what = format!("{} positions were never written", self.rows_left);
            return Err(Error::Verify(Fault::new(what).in_file(&self.path)));
        }
        persist(self.file, &self.path)
    }
}

/// A temporary file beside `path`.
pub(super) fn temporary(path: &Path) -> Result<NamedTempFile> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let file = NamedTempFile::new_in(folder.unwrap_or(Path::new(".")));
    file.map_err(|source| write_error(path, source))
}

/// Syncs a temporary file and gives it its name.
pub(super) fn persist(file: BufWriter<NamedTempFile>, path: &Path) -> Result<()> {
    let write = || -> io::Result<()> {
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|source| write_error(path, source))
}

pub(super) fn write_error(path: &Path, source: io::Error) -> Error {
    let fault = Fault::new("cannot write").in_file(path);
    Error::Write { fault, source }
}

fn truncated(expected: u64, found: u64) -> formats::Error {
    formats::Error::new(formats::ErrorKind::Truncated { expected, found })
}

fn count(file: &mut impl Read, what: &str, least: usize, most: usize) -> formats::Result<usize> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)?;
    let found = i32::from_le_bytes(bytes);
    usize::try_from(found)
        .ok()
        .filter(|found| (least..=most).contains(found))
        .ok_or_else(|| {
            let what = format!("{what} is {found}, expected {least} to {most}");
            formats::Error::malformed(what)
        })
}

fn read_tokens(file: &mut impl Read, count: usize, vocab_size: usize) -> formats::Result<Vec<u32>> {
    let mut bytes = vec![0; count * 4];
    file.read_exact(&mut bytes)?;
    let words = bytes.as_chunks::<4>().0.iter().copied();
    let tokens: Vec<u32> = words.map(u32::from_le_bytes).collect();
    match tokens.iter().find(|&&token| token as usize >= vocab_size) {
        Some(token) => {
            let what = format!("token {token} is outside the vocabulary of {vocab_size}");
            Err(formats::Error::malformed(what))
        }
        None => Ok(tokens),
    }
}

fn row_bytes(vocab_size: usize) -> u64 {
    8 + 2 * vocab_size.next_multiple_of(2) as u64
}

/// All factors are capped, so nothing here overflows.
fn file_bytes(context_tokens: usize, vocab_size: usize, chunks: usize) -> u64 {
    let rows = scored_positions(context_tokens).len() as u128 * u128::from(row_bytes(vocab_size));
    let chunk = 4 * context_tokens as u128 + rows;
    let bytes = u128::from(HEADER_BYTES) + chunk * chunks as u128;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn decode_row(
    bytes: &[u8],
    vocab_size: usize,
    log_probs: &mut Vec<f32>,
) -> std::result::Result<(), &'static str> {
    log_probs.clear();
    let (head, codes) = bytes.split_at(8);
    let (scale, min_log_prob) = head.split_at(4);
    let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let (scale, min_log_prob) = (float(scale), float(min_log_prob));
    if !(scale.is_finite() && scale >= 0.0 && min_log_prob.is_finite()) {
        return Err("a row has a scale that is no number");
    }
    let codes = codes.as_chunks::<2>().0.iter().take(vocab_size);
    let value = |code: &[u8; 2]| scale * f32::from(u16::from_le_bytes(*code)) + min_log_prob;
    log_probs.extend(codes.map(value));
    Ok(())
}

fn encode_row(logits: &[f32], bytes: &mut Vec<u8>) {
    let (least, most) = logits
        .iter()
        .fold((f32::MAX, f32::MIN), |(least, most), &logit| {
            (least.min(logit), most.max(logit))
        });
    let least = least.max(most - RANGE);
    let sum_exp: f64 = logits
        .iter()
        .map(|&logit| f64::from((logit - most).exp()))
        .sum();
    let min_log_prob = least - most - sum_exp.ln() as f32;
    let scale = (most - least) / f32::from(u16::MAX);
    bytes.extend(scale.to_le_bytes());
    bytes.extend(min_log_prob.to_le_bytes());
    let code = |logit: f32| {
        if scale > 0.0 && logit > least {
            ((logit - least) / scale).round_ties_even() as u16
        } else {
            0
        }
    };
    bytes.extend(logits.iter().flat_map(|&logit| code(logit).to_le_bytes()));
    if logits.len() % 2 == 1 {
        bytes.extend([0, 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    const VOCAB: usize = 5;

    fn row(seed: usize) -> Vec<f32> {
        (0..VOCAB)
            .map(|i| ((i * 7 + seed * 3) % 11) as f32 * 0.7 - 3.0)
            .collect()
    }

    /// Two chunks of 8 tokens, three scored positions each, odd vocabulary.
    fn written(path: &Path) {
        let tokens: Vec<u32> = (0..16).map(|i| i % VOCAB as u32).collect();
        let mut writer = KldBaseWriter::create(path, 8, VOCAB, &tokens).unwrap();
        for seed in 0..6 {
            writer.write_row(&row(seed)).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn rows_come_back_within_half_a_step() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("base.kld");
        written(&path);
        let mut reader = KldBaseReader::open(&path).unwrap();
        assert_eq!((reader.context_tokens(), reader.vocab_size()), (8, VOCAB));
        assert_eq!(reader.tokens()[6], 1);
        let mut log_probs = Vec::new();
        for seed in 0..6 {
            assert!(reader.read_row(&mut log_probs).unwrap());
            let exact = super::super::kl_divergence::LogitsRow::new(&log_probs).unwrap();
            let sum: f64 = log_probs.iter().map(|&p| f64::from(p).exp()).sum();
            assert!((sum - 1.0).abs() < 1e-3, "{sum} {exact:?}");
            let row = row(seed);
            let log_sum = row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            for (found, logit) in log_probs.iter().zip(&row) {
                let expected = f64::from(*logit) - log_sum;
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4,
                    "{found} {expected}"
                );
            }
        }
        assert!(!reader.read_row(&mut log_probs).unwrap());
    }

    #[test]
    fn logits_far_below_are_clipped() {
        let mut bytes = Vec::new();
        encode_row(&[0.0, -40.0], &mut bytes);
        let mut log_probs = Vec::new();
        decode_row(&bytes, 2, &mut log_probs).unwrap();
        assert!((log_probs[0]).abs() < 1e-5 && (log_probs[1] + 16.0).abs() < 1e-5);
        bytes.clear();
        encode_row(&[2.0, 2.0], &mut bytes);
        decode_row(&bytes, 2, &mut log_probs).unwrap();
        assert!((log_probs[1] + std::f32::consts::LN_2).abs() < 1e-6);
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("base.kld");
        written(&path);
        let good = std::fs::read(&path).unwrap();
        let check = |edit: &dyn Fn(&mut Vec<u8>), expected: &str| {
            let mut bytes = good.clone();
            edit(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            let error = KldBaseReader::open(&path).unwrap_err().to_string();
            assert!(
                error.contains(expected) && error.contains("base.kld"),
                "{error}"
            );
        };
        check(&|bytes| bytes.truncate(0), "truncated");
        check(&|bytes| bytes.truncate(19), "truncated");
        check(&|bytes| bytes.truncate(bytes.len() - 1), "truncated");
        check(&|bytes| bytes.push(0), "1 bytes follow");
        check(&|bytes| bytes[0] = b'X', "not a KLD base file");
        let word = |at: usize, value: i32| {
            move |bytes: &mut Vec<u8>| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes())
        };
        check(&word(8, 0), "n_ctx is 0");
        check(&word(8, -1), "n_ctx is -1");
        check(&word(8, i32::MAX), "n_ctx is 2147483647");
        check(&word(8, 1 << 24), "truncated");
        check(&word(12, -5), "n_vocab is -5");
        check(&word(12, 1 << 24), "truncated");
        check(&word(16, 0), "n_chunk is 0");
        check(&word(16, i32::MAX), "truncated");
        check(&word(20, 5), "token 5 is outside");
        check(&word(20, -1), "is outside");
    }

    #[test]
    fn scales_that_are_no_numbers_are_refused() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("base.kld");
        written(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        let first_row = HEADER_BYTES as usize + 16 * 4;
        bytes[first_row..first_row + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let mut reader = KldBaseReader::open(&path).unwrap();
        let error = reader.read_row(&mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("scale that is no number"), "{error}");
    }

    #[test]
    fn unfinished_files_have_no_name() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("base.kld");
        let mut writer = KldBaseWriter::create(&path, 8, VOCAB, &[0; 8]).unwrap();
        writer.write_row(&row(0)).unwrap();
        assert!(writer.write_row(&[f32::NAN; VOCAB]).is_err());
        assert!(writer.write_row(&[0.0; 3]).is_err());
        assert!(writer.finish().is_err());
        assert!(!path.exists());
        assert!(KldBaseWriter::create(&path, 8, VOCAB, &[0; 9]).is_err());
        assert!(KldBaseWriter::create(&path, 8, VOCAB, &[9; 8]).is_err());
        assert!(KldBaseWriter::create(&path, 0, VOCAB, &[0; 8]).is_err());
    }
}
