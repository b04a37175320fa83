//! The sidecar: rewrites as a safetensors file beside the artifact.
//!
//! Enters: rewrites, or a file nobody has checked. Leaves: the file, or rewrites whose factors are positive, whose
//! rotations are orthogonal and whose orders are permutations. Memory grows with the file, never with a size it claims.
//!
//! The file holds `rewrites` (U8, JSON: version, settings, spaces), `rotation` (F64 `[hidden, hidden]`) and for each space
//! `SPACE.scale` (F64 `[matrices, width]`), `SPACE.order` (U32, the same shape) and the rotation it names (F64).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::{Dtype, Error as FormatError};
use serde::{Deserialize, Serialize};

use super::matrix::SquareMatrix;
use super::random::SplitMix64;
use super::space::Space;
use super::{RewriteSettings, Rewrites};
use crate::error::{Error, Result};
use crate::write::tensor_file::{NewTensor, TensorReader, write_header, write_numbers};
use crate::write::whole_file::WholeFile;

/// The key under which an artifact records the SHA-256 of its sidecar, lower-case hexadecimal.
pub const SHA256_KEY: &str = "nemoconv.rewrite.sha256";
/// The key of the one-line summary.
pub const SUMMARY_KEY: &str = "nemoconv.rewrite.summary";
/// What a sidecar's name ends in.
pub const SIDECAR_SUFFIX: &str = ".rewrites.safetensors";
/// The sidecar's name inside a packed folder: no reader takes it for weights.
pub const SIDECAR_IN_FOLDER: &str = "rewrites.nemoconv";

const VERSION: u32 = 1;
/// Ten spaces in each of 512 blocks take a hundredth of it.
const MAX_JSON_BYTES: usize = 16 << 20;
/// How far from 1 the length of an image of a unit vector may be.
const ORTHOGONAL: f64 = 1e-9;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    settings: RewriteSettings,
    spaces: BTreeMap<String, SpaceEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpaceEntry {
    matrices: usize,
    width: usize,
    /// The tensor that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotation: Option<String>,
}

/// `NAME.rewrites.safetensors` beside `NAME.gguf`; of a split model without the number of the part.
pub fn sidecar_of(artifact: &Path) -> PathBuf {
    let name = artifact.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let whole = stem.rsplit_once("-of-").and_then(|(before, count)| {
        let (whole, part) = before.rsplit_once('-')?;
        (digits(count) && digits(part)).then_some(whole)
    });
    let stem = whole.unwrap_or(stem);
    artifact.with_file_name(format!("{stem}{SIDECAR_SUFFIX}"))
}

impl Rewrites {
    /// Writes the sidecar, which appears whole or not at all, and returns its SHA-256 for [`SHA256_KEY`]. The same
    /// rewrites give the same bytes.
    ///
    /// # Errors
    /// The system refuses.
    pub fn save(&self, path: &Path) -> Result<String> {
        WholeFile::create(path)?.publish(|out| self.write(out))
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let contents = self.contents();
        let json = serde_json::to_vec(&contents)?;
        let mut tensors = vec![Tensor::new(
            "rewrites",
            vec![json.len()],
            Data::Bytes(&json),
        )];
        if let Some(rotation) = &self.rotation {
            tensors.push(Tensor::square("rotation", rotation));
        }
        for (name, space) in &self.spaces {
            let shape = vec![space.matrices, space.width];
            if let Some(scale) = &space.scale {
                let name = format!("{name}.scale");
                tensors.push(Tensor::new(name, shape.clone(), Data::Floats(scale)));
            }
            if let Some(order) = &space.order {
                let name = format!("{name}.order");
                tensors.push(Tensor::new(name, shape, Data::Indices(order)));
            }
            let own = format!("{name}.rotation");
            let holds_it = contents.spaces[name].rotation.as_ref() == Some(&own);
            if let (Some(rotation), true) = (&space.rotation, holds_it) {
                tensors.push(Tensor::square(&own, rotation));
            }
        }
        write_tensors(out, &tensors)
    }

    /// Rotations that are equal are written once.
    fn contents(&self) -> Contents {
        let mut written: Vec<(&SquareMatrix, String)> = Vec::new();
        let spaces = self.spaces.iter().map(|(name, space)| {
            let rotation = space.rotation.as_deref().map(|rotation| {
                let same = written.iter().find(|(other, _)| *other == rotation);
                same.map(|(_, tensor)| tensor.clone()).unwrap_or_else(|| {
                    let tensor = format!("{name}.rotation");
                    written.push((rotation, tensor.clone()));
                    tensor
                })
            });
            let entry = SpaceEntry {
                matrices: space.matrices,
                width: space.width,
                rotation,
            };
            (name.clone(), entry)
        });
        Contents {
            version: VERSION,
            spaces: spaces.collect(),
            settings: self.settings.clone(),
        }
    }

    /// Reads a sidecar.
    ///
    /// # Errors
    /// The file cannot be read, contradicts the format, or holds what is no rewrite: a factor that is not positive, a
    /// rotation that is not orthogonal, an order that is no permutation, a tensor that nothing names.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Checkpoint::open_file(path)?;
        let mut reader = Reader {
            tensors: TensorReader::new(&file),
            rotations: BTreeMap::new(),
        };
        let named = |error: FormatError| Error::Input(error.in_file(path));
        let rewrites = reader.rewrites().map_err(named)?;
        match reader.tensors.left_over() {
            None => Ok(rewrites),
            Some(name) => {
                let error = FormatError::malformed("belongs to no rewrite").in_tensor(name);
                Err(named(error))
            }
        }
    }
}

type Parsed<T> = std::result::Result<T, FormatError>;

struct Reader<'a> {
    tensors: TensorReader<'a>,
    rotations: BTreeMap<String, Arc<SquareMatrix>>,
}

impl Reader<'_> {
    fn rewrites(&mut self) -> Parsed<Rewrites> {
        let contents = self.contents()?;
        let rotation = match self.tensors.has("rotation") {
            true => Some(self.square("rotation")?),
            false => None,
        };
        let mut spaces = BTreeMap::new();
        for (name, entry) in contents.spaces {
            let space = self.space(&name, &entry)?;
            spaces.insert(name, space);
        }
        Ok(Rewrites {
            settings: contents.settings,
            rotation,
            spaces,
        })
    }

    fn contents(&mut self) -> Parsed<Contents> {
        let json = self.tensors.bytes("rewrites", Dtype::U8)?;
        let refuse = |what: String| FormatError::malformed(what).in_tensor("rewrites");
        if json.len() > MAX_JSON_BYTES {
            let what = format!("has {} bytes, the limit is {MAX_JSON_BYTES}", json.len());
            return Err(refuse(what));
        }
        let contents: Contents = serde_json::from_slice(json)
            .map_err(|error| refuse(format!("does not say what is rewritten: {error}")))?;
        match contents.version {
            VERSION => Ok(contents),
            other => Err(refuse(format!("is of version {other}, {VERSION} is known"))),
        }
    }

    fn space(&mut self, name: &str, entry: &SpaceEntry) -> Parsed<Space> {
        let shape = [entry.matrices, entry.width];
        let rotation = entry.rotation.as_deref();
        Ok(Space {
            matrices: entry.matrices,
            width: entry.width,
            scale: self.scale(&format!("{name}.scale"), shape)?,
            rotation: rotation.map(|tensor| self.rotation(tensor)).transpose()?,
            order: self.order(&format!("{name}.order"), shape)?,
        })
    }

    fn scale(&mut self, name: &str, shape: [usize; 2]) -> Parsed<Option<Vec<f64>>> {
        if !self.tensors.has(name) {
            return Ok(None);
        }
        let scale = self.tensors.f64s(name, &shape)?;
        match scale.iter().all(|s| s.is_finite() && *s > 0.0) {
            true => Ok(Some(scale)),
            false => Err(FormatError::malformed("a factor is not positive").in_tensor(name)),
        }
    }

    fn order(&mut self, name: &str, shape: [usize; 2]) -> Parsed<Option<Vec<u32>>> {
        if !self.tensors.has(name) {
            return Ok(None);
        }
        let order = self
            .tensors
            .numbers(name, Dtype::U32, &shape, u32::from_le_bytes)?;
        let is_permutation = |part: &[u32]| {
            let mut sorted = part.to_vec();
            sorted.sort_unstable();
            sorted
                .iter()
                .enumerate()
                .all(|(index, source)| index == *source as usize)
        };
        match order.chunks(shape[1].max(1)).all(is_permutation) {
            true => Ok(Some(order)),
            false => Err(FormatError::malformed("is no permutation").in_tensor(name)),
        }
    }

    fn rotation(&mut self, name: &str) -> Parsed<Arc<SquareMatrix>> {
        if let Some(rotation) = self.rotations.get(name) {
            return Ok(Arc::clone(rotation));
        }
        let rotation = Arc::new(self.square(name)?);
        self.rotations
            .insert(name.to_owned(), Arc::clone(&rotation));
        Ok(rotation)
    }

    fn square(&mut self, name: &str) -> Parsed<SquareMatrix> {
        let size = self.tensors.shape(name).first().copied().unwrap_or(0);
        let matrix = SquareMatrix::new(size, self.tensors.f64s(name, &[size, size])?);
        match is_orthogonal(&matrix) {
            true => Ok(matrix),
            false => Err(FormatError::malformed("is not orthogonal").in_tensor(name)),
        }
    }
}

/// Whether rows are of length 1 and random vectors keep theirs.
fn is_orthogonal(matrix: &SquareMatrix) -> bool {
    let size = matrix.size();
    let near_one = |square: f64| (square - 1.0).abs() <= ORTHOGONAL;
    let square = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>();
    let rows = matrix.values().chunks_exact(size.max(1));
    let mut random = SplitMix64::new(0);
    let mut keeps_length = || {
        let vector: Vec<f64> = (0..size).map(|_| random.next_uniform()).collect();
        let mut image = vec![0.0; size];
        for (x, row) in vector.iter().zip(matrix.values().chunks_exact(size)) {
            image.iter_mut().zip(row).for_each(|(sum, r)| *sum += x * r);
        }
        near_one(square(&image) / square(&vector))
    };
    size > 0 && rows.map(square).all(near_one) && (0..4).all(|_| keeps_length())
}

/// A tensor to be written, with its data.
struct Tensor<'a> {
    tensor: NewTensor,
    data: Data<'a>,
}

enum Data<'a> {
    Bytes(&'a [u8]),
    Floats(&'a [f64]),
    Indices(&'a [u32]),
}

impl<'a> Tensor<'a> {
    fn new(name: impl Into<String>, shape: Vec<usize>, data: Data<'a>) -> Self {
        let dtype = match data {
            Data::Bytes(_) => Dtype::U8,
            Data::Floats(_) => Dtype::F64,
            Data::Indices(_) => Dtype::U32,
        };
        let name = name.into();
        let tensor = NewTensor { name, dtype, shape };
        Self { tensor, data }
    }

    fn square(name: &str, matrix: &'a SquareMatrix) -> Self {
        Self::new(name, vec![matrix.size(); 2], Data::Floats(matrix.values()))
    }
}

fn write_tensors(out: &mut dyn Write, tensors: &[Tensor]) -> io::Result<()> {
    let headers: Vec<_> = tensors.iter().map(|tensor| tensor.tensor.clone()).collect();
    write_header(out, &BTreeMap::new(), &headers)?;
    tensors.iter().try_for_each(|tensor| match tensor.data {
        Data::Bytes(bytes) => out.write_all(bytes),
        Data::Floats(values) => write_numbers(out, values, f64::to_le_bytes),
        Data::Indices(values) => write_numbers(out, values, u32::to_le_bytes),
    })
}
