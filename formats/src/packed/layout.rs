//! The one table of packed tensors: what a linear of each layout consists of. Readers check against it, writers plan by
//! it.
//!
//! Source: compressed-tensors 0.19 `compressors`, GPTQModel 7.7 `BaseQuantLinear`, ModelOpt 0.47 exports.

use super::scheme::{Group, Inputs, Layout, Nvfp4Names, Scheme};
use crate::Dtype::{self, Bf16, F8E4M3, F16, F32, I8, I32, I64, U8};
use crate::{Error, Result};

/// Values that share a scale in NVFP4.
pub const NVFP4_GROUP: usize = 16;

/// Edge of a block of block-scaled FP8 weights.
pub const FLOAT8_BLOCK: usize = 128;

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Codes, or values of 8 or 4 bits.
    Codes,
    /// Scales.
    Scale,
    /// The scale of all scales.
    SecondScale,
    /// Zero points.
    ZeroPoint,
    /// `out_features` and `in_features`.
    Shape,
    /// Group of each column.
    GroupIndex,
    /// Scale of the inputs.
    InputScale,
    /// Zero point of the inputs.
    InputZeroPoint,
}

/// A tensor of a packed linear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// What it is for.
    pub role: Role,
    /// What follows the module's name and a dot.
    pub suffix: &'static str,
    /// Types that are read; the first is what the format's own tools write for a BF16 model.
    pub dtypes: &'static [Dtype],
    /// Shapes that are read; the first is what is written.
    pub shapes: Vec<Vec<usize>>,
    /// Whether a linear without it is incomplete.
    pub required: bool,
}

const SCALES: &[Dtype] = &[Bf16, F16, F32];
const GPTQ_SCALES: &[Dtype] = &[F16, Bf16, F32];
const FLOAT8_SCALES: &[Dtype] = &[F32, Bf16, F16];

impl Scheme {
    /// The tensors of a linear `[rows, columns]`, which is `[out_features, in_features]`.
    ///
    /// # Errors
    /// The layout cannot hold such a matrix: groups do not divide the rows, codes do not fill whole words.
    pub fn tensors(&self, rows: usize, columns: usize) -> Result<Vec<TensorSpec>> {
        let mut tensors = self.layout.tensors(rows, columns)?;
        let is_float = matches!(self.layout, Layout::Float8 { .. } | Layout::Nvfp4(_));
        let is_needed = matches!(
            self.inputs,
            Inputs::Int8PerTensor | Inputs::Float8PerTensor | Inputs::Nvfp4
        );
        let name = match self.layout {
            Layout::Nvfp4(Nvfp4Names::CompressedTensors) => "input_global_scale",
            _ => "input_scale",
        };
        // Tools that write floats leave the scale there even where only weights are quantized.
        if is_float || is_needed {
            let dtypes = if is_float { FLOAT8_SCALES } else { SCALES };
            let input = spec(Role::InputScale, name, dtypes, [1]);
            tensors.push(TensorSpec {
                required: is_needed,
                ..input
            });
        }
        Ok(tensors)
    }
}

impl Layout {
    fn tensors(&self, rows: usize, columns: usize) -> Result<Vec<TensorSpec>> {
        match *self {
            Self::PackQuantized {
                width,
                group,
                symmetric,
            } => {
                let groups = groups(group, columns)?;
                let words = width.words(columns);
                let mut tensors = vec![
                    spec(Role::Codes, "weight_packed", &[I32], [rows, words]),
                    scale(group, rows, groups),
                    spec(Role::Shape, "weight_shape", &[I64], [2]),
                ];
                if !symmetric {
                    if group == Group::Tensor {
                        let what = "packed zero points of whole tensors are not known";
                        return Err(Error::unsupported(what));
                    }
                    let shape = [width.words(rows), groups];
                    tensors.push(spec(Role::ZeroPoint, "weight_zero_point", &[I32], shape));
                }
                Ok(tensors)
            }
            Self::IntQuantized {
                group, symmetric, ..
            } => {
                let scale = scale(group, rows, groups(group, columns)?);
                let zero_point = TensorSpec {
                    role: Role::ZeroPoint,
                    suffix: "weight_zero_point",
                    dtypes: &[I8],
                    ..scale.clone()
                };
                let codes = spec(Role::Codes, "weight", &[I8], [rows, columns]);
                let tensors = [codes, scale].into_iter();
                Ok(tensors.chain((!symmetric).then_some(zero_point)).collect())
            }
            Self::Float8 { scale } => {
                let blocks = [rows, columns].map(|size| size.div_ceil(FLOAT8_BLOCK));
                let scale = TensorSpec {
                    role: Role::Scale,
                    suffix: scale,
                    dtypes: FLOAT8_SCALES,
                    shapes: vec![vec![rows, 1], vec![1], blocks.to_vec()],
                    required: true,
                };
                let codes = spec(Role::Codes, "weight", &[F8E4M3], [rows, columns]);
                Ok(vec![codes, scale])
            }
            Self::Nvfp4(names) => {
                let groups = groups(Group::Columns(NVFP4_GROUP), columns)?;
                let bytes = columns.div_ceil(2);
                let codes = |suffix| spec(Role::Codes, suffix, &[U8], [rows, bytes]);
                let second = |suffix| spec(Role::SecondScale, suffix, &[F32], [1]);
                let scales = spec(Role::Scale, "weight_scale", &[F8E4M3], [rows, groups]);
                Ok(match names {
                    Nvfp4Names::CompressedTensors => {
                        vec![
                            codes("weight_packed"),
                            scales,
                            second("weight_global_scale"),
                        ]
                    }
                    Nvfp4Names::ModelOpt => {
                        vec![codes("weight"), scales, second("weight_scale_2")]
                    }
                })
            }
            Self::Gptq { width, group, .. } => {
                let groups = groups(group, columns)?;
                let per_word = width.per_word();
                if !columns.is_multiple_of(per_word) || !rows.is_multiple_of(per_word) {
                    let what = format!(
                        "a matrix of {rows} x {columns} does not fill words of {per_word} codes"
                    );
                    return Err(Error::malformed(what));
                }
                let words = width.words(columns);
                let index = spec(Role::GroupIndex, "g_idx", &[I32], [columns]);
                Ok(vec![
                    spec(Role::Codes, "qweight", &[I32], [words, rows]),
                    spec(
                        Role::ZeroPoint,
                        "qzeros",
                        &[I32],
                        [groups, width.words(rows)],
                    ),
                    spec(Role::Scale, "scales", GPTQ_SCALES, [groups, rows]),
                    optional(index),
                ])
            }
        }
    }
}

fn spec<const DIMS: usize>(
    role: Role,
    suffix: &'static str,
    dtypes: &'static [Dtype],
    shape: [usize; DIMS],
) -> TensorSpec {
    TensorSpec {
        role,
        suffix,
        dtypes,
        shapes: vec![shape.to_vec()],
        required: true,
    }
}

fn optional(spec: TensorSpec) -> TensorSpec {
    TensorSpec {
        required: false,
        ..spec
    }
}

/// Scales of compressed-tensors' integers.
fn scale(group: Group, rows: usize, groups: usize) -> TensorSpec {
    match group {
        Group::Tensor => spec(Role::Scale, "weight_scale", SCALES, [1]),
        _ => spec(Role::Scale, "weight_scale", SCALES, [rows, groups]),
    }
}

/// Scales of one row.
fn groups(group: Group, columns: usize) -> Result<usize> {
    match group {
        Group::Tensor | Group::Row => Ok(1),
        Group::Columns(size) if size > 0 && columns.is_multiple_of(size) => {
            Ok(columns.checked_div(size).unwrap_or_default())
        }
        Group::Columns(size) => Err(Error::malformed(format!(
            "groups of {size} do not divide rows of {columns}"
        ))),
    }
}
