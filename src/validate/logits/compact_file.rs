//! The compact reference file: what a gate in CI needs of a model that is too large to keep there.
//!
//! Enters: [`CompactRow`]s and who made them, or such a file. Leaves: the other of the two. A file is believed only after
//! its checksum, and every row is checked again.
//!
//! Layout, little endian: `nemo-ref`; u32 version; u32 bytes of the JSON [`ReferenceHeader`], the header; u32 chunks;
//! u32 tokens of all chunks; per scored position u32 kept, u32 top, f64 nll, tail mass, tail p ln p, min ln p, step, the
//! kept tokens as LEB128 differences, u16 codes; f64 mean and largest tail mass, largest step; SHA-256 of everything
//! before it.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::compact_reference::CompactRow;
use super::kld_base::{MAX_VOCAB, persist, temporary, write_error};
use super::perplexity::{ChunkedText, MAX_CONTEXT_TOKENS};
use crate::error::{Error, Fault, Result};
use crate::formats;

const MAGIC: &[u8; 8] = b"nemo-ref";
const VERSION: u32 = 1;
const MAX_HEADER_BYTES: u32 = 1 << 20;
const BOUND_BYTES: u64 = 24;
const CHECKSUM_BYTES: u64 = 32;

/// Who made a reference, and of what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceHeader {
    /// Name of the model.
    pub model: String,
    /// Its float type, such as `BF16`.
    pub file_type: String,
    /// Rows of the output matrix.
    pub vocab_size: usize,
    /// Tokens of a chunk.
    pub context_tokens: usize,
    /// The token that begins every chunk where it is run, if the model adds one.
    pub bos: Option<u32>,
    /// The program that wrote it.
    pub written_by: String,
}

/// What the file states about its own error.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StatedBound {
    /// Mean mass of the tokens that were not kept.
    pub mean_tail_mass: f64,
    /// Largest mass at one position.
    pub max_tail_mass: f64,
    /// Largest step of ln p at one position.
    pub max_step: f64,
}

impl StatedBound {
    /// The mean KL divergence exceeds the lumped one by at most this, rounding aside, if at every position the artifact
    /// gives to no token outside the kept ones less than e^-spread of what it gives to all of them together.
    pub fn kl_error(&self, spread: f64) -> f64 {
        self.mean_tail_mass * spread
    }
}

/// Writes a reference under a temporary name; [`CompactFileWriter::finish`] gives it its own.
#[derive(Debug)]
pub struct CompactFileWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    digest: Sha256,
    bound: StatedBound,
    rows: usize,
    rows_left: usize,
}

impl CompactFileWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// A folder that cannot be written to, or tokens that do not fit the header.
    pub fn create(path: &Path, header: &ReferenceHeader, text: &ChunkedText) -> Result<Self> {
        let tokens = text.tokens();
        let fits = header.context_tokens == text.context_tokens()
            && header.bos == text.bos()
            && tokens
                .iter()
                .chain(&header.bos)
                .all(|&token| (token as usize) < header.vocab_size);
        if !fits {
            let fault = Fault::new("the header of the reference does not fit its text");
            return Err(Error::Plan(fault.in_file(path)));
        }
        let mut writer = Self {
            path: path.into(),
            file: BufWriter::with_capacity(1 << 20, temporary(path)?),
            digest: Sha256::new(),
            bound: StatedBound::default(),
            rows: text.positions(),
            rows_left: text.positions(),
        };
        let json = serde_json::to_vec(header).expect("a header holds nothing but data");
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((json.len() as u32).to_le_bytes());
        bytes.extend(json);
        bytes.extend((text.chunks().len() as u32).to_le_bytes());
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        writer.put(&bytes)?;
        Ok(writer)
    }

    /// Adds the next scored position.
    ///
    /// # Errors
    /// The system refuses, or there are more rows than positions.
    pub fn write_row(&mut self, row: &CompactRow) -> Result<()> {
        if self.rows_left == 0 {
            let fault = Fault::new("more rows than scored positions");
            return Err(Error::Verify(fault.in_file(&self.path)));
        }
        self.rows_left -= 1;
        let bound = &mut self.bound;
        bound.mean_tail_mass += row.tail_mass / self.rows as f64;
        bound.max_tail_mass = bound.max_tail_mass.max(row.tail_mass);
        bound.max_step = bound.max_step.max(row.step);
        let bytes = encode_row(row);
        self.put(&bytes)
    }

    /// Adds bound and checksum and gives the file its name.
    ///
    /// # Errors
    /// The system refuses, or a position is missing.
    pub fn finish(mut self) -> Result<StatedBound> {
        if self.rows_left > 0 {
            let what = format!("{} positions were never written", self.rows_left);
            return Err(Error::Verify(Fault::new(what).in_file(&self.path)));
        }
        let bound = self.bound;
        let parts = [bound.mean_tail_mass, bound.max_tail_mass, bound.max_step];
        self.put(&parts.map(f64::to_le_bytes).concat())?;
        let checksum = self.digest.finalize();
        let written = self.file.write_all(&checksum);
        written.map_err(|source| write_error(&self.path, source))?;
        persist(self.file, &self.path)?;
        Ok(bound)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        let written = self.file.write_all(bytes);
        written.map_err(|source| write_error(&self.path, source))
    }
}

/// Reads a reference from the front to the end.
#[derive(Debug)]
pub struct CompactFileReader {
    path: PathBuf,
    file: BufReader<File>,
    header: ReferenceHeader,
    text: ChunkedText,
    bound: StatedBound,
    rows_left: usize,
}

impl CompactFileReader {
    /// Opens a file, verifies its checksum and reads header and tokens.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or is no compact reference of a version this program knows.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read_start(path).map_err(|error| match error {
            Error::Input(error) => Error::Input(error.in_file(path)),
            error => error,
        })
    }

    fn read_start(path: &Path) -> Result<Self> {
        let mut file = BufReader::with_capacity(1 << 20, open_file(path)?);
        let bound_at = verify(&mut file)?;
        let bound = read_bound(&mut file, bound_at)?;
        file.rewind().map_err(formats::Error::from)?;
        let header = read_header(&mut file)?;
        let text = read_text(&mut file, &header, bound_at)?;
        Ok(Self {
            path: path.into(),
            rows_left: text.positions(),
            file,
            header,
            text,
            bound,
        })
    }

    /// Who made it.
    pub fn header(&self) -> &ReferenceHeader {
        &self.header
    }

    /// The text it was made of, cut into the same chunks.
    pub fn text(&self) -> &ChunkedText {
        &self.text
    }

    /// What it states about its own error.
    pub fn bound(&self) -> StatedBound {
        self.bound
    }

    /// The next scored position; `None` after the last.
    ///
    /// # Errors
    /// The system refuses, or a row contradicts itself.
    pub fn read_row(&mut self) -> Result<Option<CompactRow>> {
        if self.rows_left == 0 {
            return Ok(None);
        }
        self.rows_left -= 1;
        let row = decode_row(&mut self.file, self.header.vocab_size);
        row.map(Some)
            .map_err(|error| Error::Input(error.in_file(&self.path)))
    }
}

fn open_file(path: &Path) -> formats::Result<File> {
    Ok(File::open(path)?)
}

/// Checks magic and checksum; says where the bound lies.
fn verify(file: &mut BufReader<File>) -> formats::Result<u64> {
    let bytes = file.get_ref().metadata()?.len();
    let least = MAGIC.len() as u64 + BOUND_BYTES + CHECKSUM_BYTES;
    let mut magic = [0; MAGIC.len()];
    if bytes >= least {
        file.read_exact(&mut magic)?;
    }
    if &magic != MAGIC {
        return Err(formats::Error::malformed("this is not a compact reference"));
    }
    let mut digest = Sha256::new();
    digest.update(magic);
    let mut left = bytes - CHECKSUM_BYTES - MAGIC.len() as u64;
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let part = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        file.read_exact(&mut buffer[..part])?;
        digest.update(&buffer[..part]);
        left -= part as u64;
    }
    let mut stored = [0; CHECKSUM_BYTES as usize];
    file.read_exact(&mut stored)?;
    if digest.finalize()[..] != stored {
        let error = formats::Error::malformed("the checksum does not fit: the file is damaged");
        return Err(error.hint("fetch it again, or make it again with `--save-reference`"));
    }
    Ok(bytes - CHECKSUM_BYTES - BOUND_BYTES)
}

fn read_bound(file: &mut BufReader<File>, at: u64) -> formats::Result<StatedBound> {
    file.seek(SeekFrom::Start(at))?;
    let bound = StatedBound {
        mean_tail_mass: f64::from_le_bytes(array(file)?),
        max_tail_mass: f64::from_le_bytes(array(file)?),
        max_step: f64::from_le_bytes(array(file)?),
    };
    let masses = [bound.mean_tail_mass, bound.max_tail_mass];
    let plausible = masses.iter().all(|mass| (0.0..=1.0 + 1e-6).contains(mass));
    if !plausible || !bound.max_step.is_finite() {
        return Err(formats::Error::malformed("the stated bound is no bound").at(at));
    }
    Ok(bound)
}

fn read_header(file: &mut BufReader<File>) -> formats::Result<ReferenceHeader> {
    let _magic: [u8; 8] = array(file)?;
    let version = u32::from_le_bytes(array(file)?);
    if version != VERSION {
        let what = format!("version {version} of compact references, this program knows {VERSION}");
        return Err(formats::Error::unsupported(what));
    }
    let bytes = u32::from_le_bytes(array(file)?);
    if bytes > MAX_HEADER_BYTES {
        return Err(formats::Error::malformed(format!(
            "a header of {bytes} bytes"
        )));
    }
    let mut json = vec![0; bytes as usize];
    file.read_exact(&mut json)?;
    let header: ReferenceHeader = serde_json::from_slice(&json)
        .map_err(|error| formats::Error::malformed(format!("header: {error}")))?;
    let fits = (3..=MAX_CONTEXT_TOKENS).contains(&header.context_tokens)
        && (1..=MAX_VOCAB).contains(&header.vocab_size);
    if !fits {
        return Err(formats::Error::malformed(
            "header: context or vocabulary out of range",
        ));
    }
    Ok(header)
}

fn read_text(
    file: &mut BufReader<File>,
    header: &ReferenceHeader,
    end: u64,
) -> Result<ChunkedText> {
    let chunks = u32::from_le_bytes(array(file)?);
    let count = u64::from(chunks) * header.context_tokens as u64;
    let at = file.stream_position().map_err(formats::Error::from)?;
    if count * 4 > end.saturating_sub(at) {
        let what = format!(
            "{chunks} chunks of {} tokens do not fit the file",
            header.context_tokens
        );
        return Err(formats::Error::malformed(what).at(at).into());
    }
    // No more than the file has.
    let mut bytes = vec![0; count as usize * 4];
    file.read_exact(&mut bytes).map_err(formats::Error::from)?;
    let words = bytes.as_chunks::<4>().0.iter().copied();
    let tokens: Vec<u32> = words.map(u32::from_le_bytes).collect();
    let outside = |token: &&u32| **token as usize >= header.vocab_size;
    if let Some(token) = tokens.iter().chain(&header.bos).find(outside) {
        let what = format!(
            "token {token} is outside the vocabulary of {}",
            header.vocab_size
        );
        return Err(formats::Error::malformed(what).into());
    }
    ChunkedText::new(tokens, header.context_tokens, header.bos, None)
}

fn array<const N: usize>(file: &mut impl Read) -> formats::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn encode_row(row: &CompactRow) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(48 + 4 * row.tokens.len());
    bytes.extend((row.tokens.len() as u32).to_le_bytes());
    bytes.extend(row.top.to_le_bytes());
    let figures = [
        row.nll,
        row.tail_mass,
        row.tail_p_ln_p,
        row.min_log_prob,
        row.step,
    ];
    bytes.extend(figures.iter().flat_map(|figure| figure.to_le_bytes()));
    let mut before = 0;
    for &token in &row.tokens {
        write_leb128(token - before, &mut bytes);
        before = token;
    }
    bytes.extend(row.codes.iter().flat_map(|code| code.to_le_bytes()));
    bytes
}

fn decode_row(file: &mut impl Read, vocab_size: usize) -> formats::Result<CompactRow> {
    let kept = u32::from_le_bytes(array(file)?) as usize;
    let top = u32::from_le_bytes(array(file)?);
    let mut figures = [0.0; 5];
    for figure in &mut figures {
        *figure = f64::from_le_bytes(array(file)?);
    }
    if !(1..=vocab_size).contains(&kept) {
        return Err(formats::Error::malformed(format!(
            "a position keeps {kept} of {vocab_size} tokens"
        )));
    }
    let tokens = read_tokens(file, kept, vocab_size)?;
    let mut codes = vec![0; kept * 2];
    file.read_exact(&mut codes)?;
    let codes = codes
        .as_chunks::<2>()
        .0
        .iter()
        .copied()
        .map(u16::from_le_bytes);
    let [nll, tail_mass, tail_p_ln_p, min_log_prob, step] = figures;
    let row = CompactRow {
        codes: codes.collect(),
        tokens,
        min_log_prob,
        step,
        top,
        nll,
        tail_mass,
        tail_p_ln_p,
    };
    match objection(&row) {
        Some(what) => Err(formats::Error::malformed(what)),
        None => Ok(row),
    }
}

fn read_tokens(file: &mut impl Read, kept: usize, vocab_size: usize) -> formats::Result<Vec<u32>> {
    let mut tokens: Vec<u32> = Vec::with_capacity(kept);
    for index in 0..kept {
        let difference = read_leb128(file)?;
        let before = tokens.last().copied().unwrap_or(0);
        let token = before
            .checked_add(difference)
            .filter(|&token| (token as usize) < vocab_size);
        match token {
            Some(token) if index == 0 || difference > 0 => tokens.push(token),
            _ => {
                return Err(formats::Error::malformed(
                    "kept tokens are out of order or unknown",
                ));
            }
        }
    }
    Ok(tokens)
}

/// What contradicts itself in a row.
fn objection(row: &CompactRow) -> Option<&'static str> {
    let figures = [row.nll, row.tail_p_ln_p, row.min_log_prob, row.step];
    let in_range = figures.iter().all(|figure| figure.is_finite())
        && (0.0..=1.0).contains(&row.tail_mass)
        && (0.0..=1.0).contains(&row.step)
        && row.min_log_prob <= 1e-6
        && row.tail_p_ln_p <= 0.0;
    let log_probs = row
        .codes
        .iter()
        .map(|&code| row.min_log_prob + row.step * f64::from(code));
    let mass: f64 = log_probs.map(f64::exp).sum();
    if !in_range {
        Some("a position has figures out of range")
    } else if row.tokens.binary_search(&row.top).is_err() {
        Some("the most likely token of a position was not kept")
    } else if (mass + row.tail_mass - 1.0).abs() > row.step + 1e-6 {
        Some("the probabilities of a position do not add up to 1")
    } else {
        None
    }
}

fn write_leb128(mut value: u32, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn read_leb128(file: &mut impl Read) -> formats::Result<u32> {
    let mut value = 0u32;
    for shift in (0..28).step_by(7) {
        let [byte] = array(file)?;
        value |= u32::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(formats::Error::malformed("a token number is too long"))
}

#[cfg(test)]
mod tests;
