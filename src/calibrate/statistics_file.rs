//! Statistics as a safetensors file, so that one pass over the samples serves many conversions.
//!
//! Enters: statistics with where they come from, or a file nobody has checked. Leaves: the file, or statistics whose
//! numbers are finite and whose shapes agree. Memory grows with the file, never with a size it claims.
//!
//! The header's metadata says what was read by what ([`Origin`]). The tensors, with `blocks + 1` streams:
//!
//! | tensor | type and shape | |
//! |---|---|---|
//! | `residual.tokens` | U64 `[streams]` | tokens of each normed stream |
//! | `residual.N` | F64 `[hidden (hidden + 1) / 2]` | sums of products of the stream before block N: rows of the upper triangle |
//! | `NAME.squares` | F64 `[matrices, in_features]` | sums of squared inputs of tensor NAME |
//! | `NAME.weights` | F64 `[matrices]` | sums of squared router weights |
//! | `NAME.tokens` | U64 `[matrices]` | tokens; an expert that saw none has zeros everywhere |
//! | `NAME.max_abs` | F32 `[matrices, in_features]` | largest magnitudes |

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::{Dtype, Error as FormatError};

use super::samples::{SampleSettings, Samples};
use super::statistics::{InputSums, Statistics, StreamMoments};
use crate::artifact::StoredModel;
use crate::error::{Error, Fault, Result};
use crate::rewrite::Kept;
use crate::write::tensor_file::{NewTensor, TensorReader, write_header, write_numbers};

/// What the files say they are.
const FORMAT: &str = "nemoconv.statistics";
const VERSION: &str = "1";
const SQUARES: &str = ".squares";

/// Where statistics come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Version of the program.
    pub nemoconv: String,
    /// SHA-256 of every file of the model's weights, in order, lower-case hexadecimal.
    pub model_sha256: Vec<String>,
    /// Digest of the samples ([`Samples::digest`]).
    pub samples_sha256: String,
    /// Tokens of the samples.
    pub tokens: u64,
    /// Their sequences.
    pub sequences: u64,
    /// Most tokens of a sequence.
    pub context_tokens: u64,
    /// Chose among more sequences.
    pub seed: u64,
}

impl Origin {
    /// Of statistics that this program collects of the model with these files on these samples.
    pub fn new(model_sha256: Vec<String>, samples: &Samples, settings: SampleSettings) -> Self {
        Self {
            nemoconv: env!("CARGO_PKG_VERSION").to_owned(),
            model_sha256,
            samples_sha256: samples.digest(),
            tokens: samples.tokens() as u64,
            sequences: samples.sequences.len() as u64,
            context_tokens: settings.context_tokens as u64,
            seed: settings.seed,
        }
    }

    /// The statistics are of these files of weights and of these samples.
    ///
    /// # Errors
    /// They are not: which of the two, and both digests.
    pub fn check(&self, model_sha256: &[String], samples: &Samples) -> Result<()> {
        if self.model_sha256 != model_sha256 {
            let what = format!(
                "the statistics are of another model: its sha256 is {}, that of this one {}",
                self.model_sha256.join(", "),
                model_sha256.join(", ")
            );
            return Err(Error::Plan(Fault::new(what).hint(
                "run `nemoconv calibrate` on this model, or leave `--statistics` out",
            )));
        }
        let digest = samples.digest();
        if self.samples_sha256 == digest {
            return Ok(());
        }
        let what = format!(
            "the statistics are of other samples: their sha256 is {}, that of these {digest}",
            self.samples_sha256
        );
        let hint = format!(
            "they were {} sequences of at most {} tokens, seed {}: give the same text and the same flags",
            self.sequences, self.context_tokens, self.seed
        );
        Err(Error::Plan(Fault::new(what).hint(hint)))
    }

    fn texts(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            ("format", FORMAT.to_owned()),
            ("format.version", VERSION.to_owned()),
            ("nemoconv", self.nemoconv.clone()),
            ("model.sha256", self.model_sha256.join(",")),
            ("samples.sha256", self.samples_sha256.clone()),
            ("samples.tokens", self.tokens.to_string()),
            ("samples.sequences", self.sequences.to_string()),
            ("samples.context", self.context_tokens.to_string()),
            ("samples.seed", self.seed.to_string()),
        ])
    }

    fn parse(texts: &BTreeMap<String, String>) -> Parsed<Self> {
        let hint = "`nemoconv calibrate MODEL --text FILE` writes statistics";
        let text = |key: &str| {
            texts.get(key).map(String::as_str).ok_or_else(|| {
                FormatError::missing(format!("these are no statistics: key `{key}` is missing"))
                    .hint(hint)
            })
        };
        let number = |key: &str| {
            let number = text(key)?.parse();
            number.map_err(|_| FormatError::malformed("must be a number").in_tensor(key))
        };
        for (key, expected) in [("format", FORMAT), ("format.version", VERSION)] {
            if text(key)? != expected {
                let what = format!("must be `{expected}`, found `{}`", text(key)?);
                return Err(FormatError::malformed(what).in_tensor(key).hint(hint));
            }
        }
        let model_sha256 = text("model.sha256")?.split(',');
        Ok(Self {
            nemoconv: text("nemoconv")?.to_owned(),
            model_sha256: model_sha256.map(str::to_owned).collect(),
            samples_sha256: text("samples.sha256")?.to_owned(),
            tokens: number("samples.tokens")?,
            sequences: number("samples.sequences")?,
            context_tokens: number("samples.context")?,
            seed: number("samples.seed")?,
        })
    }
}

impl Statistics {
    /// Writes the file. The same statistics and origin give the same bytes.
    ///
    /// # Errors
    /// The sink refuses.
    pub fn write(&self, origin: &Origin, out: &mut dyn Write) -> io::Result<()> {
        write_header(out, &origin.texts(), &self.tensors())?;
        let tokens: Vec<u64> = self.residual.iter().map(|stream| stream.tokens).collect();
        write_numbers(out, &tokens, u64::to_le_bytes)?;
        for stream in &self.residual {
            let triangle = stream.triangle.read().map_err(io::Error::other)?;
            write_numbers(out, triangle.iter(), f64::to_le_bytes)?;
        }
        for matrices in self.inputs.values().filter(|all| width_of(all) > 0) {
            write_inputs(out, matrices)?;
        }
        Ok(())
    }

    fn tensors(&self) -> Vec<NewTensor> {
        let tensor = |name: String, dtype, shape: &[usize]| NewTensor {
            name,
            dtype,
            shape: shape.to_vec(),
        };
        let streams = self.residual.len();
        let mut tensors = vec![tensor("residual.tokens".into(), Dtype::U64, &[streams])];
        for (index, stream) in self.residual.iter().enumerate() {
            let shape = [triangle(stream.n)];
            tensors.push(tensor(format!("residual.{index}"), Dtype::F64, &shape));
        }
        for (name, all) in &self.inputs {
            let (matrices, width) = (all.len(), width_of(all));
            if width == 0 {
                continue;
            }
            let whole = [matrices, width];
            tensors.push(tensor(format!("{name}{SQUARES}"), Dtype::F64, &whole));
            tensors.push(tensor(format!("{name}.weights"), Dtype::F64, &whole[..1]));
            tensors.push(tensor(format!("{name}.tokens"), Dtype::U64, &whole[..1]));
            tensors.push(tensor(format!("{name}.max_abs"), Dtype::F32, &whole));
        }
        tensors
    }

    /// Reads a file.
    ///
    /// # Errors
    /// The file cannot be read, contradicts the format, or holds what are no statistics: a number that is not finite or
    /// is negative where it cannot be, shapes that do not belong together, a tensor that nothing names.
    pub fn open(path: &Path) -> Result<(Self, Origin)> {
        let made_here = "it is damaged, or no file of `nemoconv calibrate`: make it again";
        let file = Checkpoint::open(path).map_err(|error| error.hint(made_here))?;
        let named = |error: FormatError| Error::Input(error.in_file(path));
        let no_texts = BTreeMap::new();
        let texts = file.shards().first().map_or(&no_texts, |s| s.metadata());
        let origin = Origin::parse(texts).map_err(named)?;
        let mut reader = TensorReader::new(&file);
        let statistics = read(&file, &mut reader, &named)?;
        match reader.left_over() {
            None => Ok((statistics, origin)),
            Some(name) => Err(named(
                FormatError::malformed("belongs to no statistics").in_tensor(name),
            )),
        }
    }

    /// The statistics have the shapes that `model` gives them.
    ///
    /// # Errors
    /// They have not, naming the tensor.
    pub fn check_model(&self, model: &StoredModel) -> Result<()> {
        let hint =
            "statistics are of a model as it is: they do not fit `--widen`, nor another model";
        let refuse = |what: String| Error::Plan(Fault::new(what).hint(hint));
        let config = model.config();
        let found = [
            self.residual.len(),
            self.residual.first().map_or(0, |s| s.n),
        ];
        let expected = [config.pattern.kinds().len() + 1, config.hidden_size];
        if found != expected {
            let what = format!(
                "the statistics are of [streams, hidden] {found:?}, the model has {expected:?}"
            );
            return Err(refuse(what));
        }
        for (name, matrices) in &self.inputs {
            let found = [matrices.len(), width_of(matrices)];
            let expected = model.tensor(name).map(|t| [t.matrices, t.columns]);
            if expected != Some(found) {
                let expected = expected.map_or("has no such tensor".into(), |shape| {
                    format!("has {shape:?}")
                });
                let what = format!(
                    "the statistics of `{name}` are of [matrices, in_features] {found:?}, the model {expected}"
                );
                return Err(refuse(what));
            }
        }
        Ok(())
    }
}

type Parsed<T> = std::result::Result<T, FormatError>;

/// `in_features` of a stack; 0 where no matrix saw a token.
fn width_of(matrices: &[Option<InputSums>]) -> usize {
    let seen = matrices.iter().flatten().next();
    seen.map_or(0, |sums| sums.squares.len())
}

fn triangle(n: usize) -> usize {
    n * (n + 1) / 2
}

fn write_inputs(out: &mut dyn Write, matrices: &[Option<InputSums>]) -> io::Result<()> {
    let unseen = InputSums {
        squares: vec![0.0; width_of(matrices)],
        max_abs: vec![0.0; width_of(matrices)],
        tokens: 0,
        weight: 0.0,
    };
    let all = || matrices.iter().map(|sums| sums.as_ref().unwrap_or(&unseen));
    write_numbers(out, all().flat_map(|sums| &sums.squares), f64::to_le_bytes)?;
    write_numbers(out, all().map(|sums| &sums.weight), f64::to_le_bytes)?;
    write_numbers(out, all().map(|sums| &sums.tokens), u64::to_le_bytes)?;
    write_numbers(out, all().flat_map(|sums| &sums.max_abs), f32::to_le_bytes)
}

fn read(
    file: &Checkpoint,
    reader: &mut TensorReader,
    named: &impl Fn(FormatError) -> Error,
) -> Result<Statistics> {
    let shape = reader.shape("residual.tokens");
    let tokens = reader.numbers(
        "residual.tokens",
        Dtype::U64,
        &[shape.first().copied().unwrap_or(0)],
        u64::from_le_bytes,
    );
    let tokens = tokens.map_err(named)?;
    let mut statistics = Statistics::default();
    for (index, tokens) in tokens.into_iter().enumerate() {
        let name = format!("residual.{index}");
        let (n, triangle) = read_stream(reader, &name).map_err(named)?;
        if statistics
            .residual
            .first()
            .is_some_and(|first| first.n != n)
        {
            let error = FormatError::malformed("is of another width than the first stream");
            return Err(named(error.in_tensor(name)));
        }
        statistics.residual.push(StreamMoments {
            n,
            triangle: Kept::new(triangle)?,
            tokens,
        });
    }
    for entry in file.tensors() {
        if let Some(name) = entry.name.strip_suffix(SQUARES) {
            let inputs = read_inputs(reader, name).map_err(named)?;
            statistics.inputs.insert(name.to_owned(), inputs);
        }
    }
    Ok(statistics)
}

/// Channels, and the rows of the upper triangle.
fn read_stream(reader: &mut TensorReader, name: &str) -> Parsed<(usize, Vec<f64>)> {
    let len = reader.shape(name).first().copied().unwrap_or(0);
    let values = reader.f64s(name, &[len])?;
    let refuse = |what: &str| FormatError::malformed(what).in_tensor(name);
    // The root is within one of the truth: 8 * len stays far below 2^53.
    let root = ((8.0 * len as f64 + 1.0).sqrt() as usize).saturating_sub(1) / 2;
    let n = (root.saturating_sub(1)..=root + 1)
        .find(|n| triangle(*n) == len)
        .filter(|n| *n > 0)
        .ok_or_else(|| refuse("is no triangle of a square matrix"))?;
    if values.iter().any(|value| !value.is_finite()) {
        return Err(refuse("values must be finite"));
    }
    let mut diagonal = (0..n).scan(0, |place, i| {
        let own = *place;
        *place += n - i;
        Some(values[own])
    });
    if diagonal.any(|square| square < 0.0) {
        return Err(refuse("sums of squares must not be negative"));
    }
    Ok((n, values))
}

fn read_inputs(reader: &mut TensorReader, name: &str) -> Parsed<Vec<Option<InputSums>>> {
    let squares_name = format!("{name}{SQUARES}");
    let refuse = |what: &str| FormatError::malformed(what).in_tensor(name);
    let &[matrices, width] = reader.shape(&squares_name) else {
        return Err(FormatError::malformed("must have two dimensions").in_tensor(squares_name));
    };
    if matrices == 0 || width == 0 {
        return Err(refuse("statistics of nothing"));
    }
    let whole = [matrices, width];
    let squares = reader.f64s(&squares_name, &whole)?;
    let weights = reader.f64s(&format!("{name}.weights"), &whole[..1])?;
    let tokens = format!("{name}.tokens");
    let tokens = reader.numbers(&tokens, Dtype::U64, &whole[..1], u64::from_le_bytes)?;
    let max_abs = format!("{name}.max_abs");
    let max_abs = reader.numbers(&max_abs, Dtype::F32, &whole, f32::from_le_bytes)?;
    let are_sizes = squares
        .iter()
        .chain(&weights)
        .all(|x| x.is_finite() && *x >= 0.0)
        && max_abs.iter().all(|x| x.is_finite() && *x >= 0.0);
    if !are_sizes {
        return Err(refuse("values must be finite and not negative"));
    }
    if tokens.iter().all(|tokens| *tokens == 0) {
        return Err(refuse("no matrix of it saw a token"));
    }
    let of = |index: usize| index * width..(index + 1) * width;
    let has_sums = |index: usize| {
        weights[index] > 0.0
            || squares[of(index)].iter().any(|x| *x > 0.0)
            || max_abs[of(index)].iter().any(|x| *x > 0.0)
    };
    if (0..matrices).any(|index| tokens[index] == 0 && has_sums(index)) {
        return Err(refuse("a matrix that saw no token has sums"));
    }
    let matrix = |index: usize| {
        let range = of(index);
        (tokens[index] > 0).then(|| InputSums {
            squares: squares[range.clone()].to_vec(),
            max_abs: max_abs[range].to_vec(),
            tokens: tokens[index],
            weight: weights[index],
        })
    };
    Ok((0..matrices).map(matrix).collect())
}

#[cfg(test)]
mod tests;
