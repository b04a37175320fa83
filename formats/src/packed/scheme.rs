//! What a layout is: where codes, scales and zero points of a linear are, and what becomes of its inputs.

use super::bits::Width;
use crate::Dtype;
use crate::checkpoint::TensorEntry;
use std::fmt;

/// How one linear is stored and run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheme {
    /// Its tensors.
    pub layout: Layout,
    /// What the runtime does to the inputs before it multiplies.
    pub inputs: Inputs,
}

/// The tensors of a weight `[out_features, in_features]`. Values are `(code - zero) * scale`, zero points absent from
/// symmetric weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// compressed-tensors `pack-quantized`: integers in 32-bit words.
    PackQuantized {
        /// Bits of a code.
        width: Width,
        /// What shares a scale.
        group: Group,
        /// No zero points.
        symmetric: bool,
    },
    /// compressed-tensors `int-quantized`: integers in I8, whatever their width.
    IntQuantized {
        /// Bits of a code, 1 to 8.
        bits: usize,
        /// What shares a scale.
        group: Group,
        /// No zero points.
        symmetric: bool,
    },
    /// F8_E4M3 values with scales: one for all, one per row, or one per block.
    Float8 {
        /// Name of the scale tensor, `weight_scale` or `weight_scale_inv`; a factor in both cases.
        scale: &'static str,
    },
    /// E2M1 values, an F8_E4M3 scale per 16, one F32 scale above them.
    Nvfp4(Nvfp4Names),
    /// GPTQ: integers in 32-bit words, packed along `in_features`.
    Gptq {
        /// Bits of a code.
        width: Width,
        /// What shares a scale: a row or a part of it.
        group: Group,
        /// Zero points are there but all in the middle.
        symmetric: bool,
        /// How zero points are stored.
        zeros: GptqZeros,
    },
}

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// All.
    Tensor,
    /// Those of a row.
    Row,
    /// So many consecutive ones of a row.
    Columns(usize),
}

/// Who named the tensors of an NVFP4 linear, and with them the sense of its second scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nvfp4Names {
    /// `weight_packed` and `weight_global_scale`, which divides.
    CompressedTensors,
    /// `weight` and `weight_scale_2`, which multiplies.
    ModelOpt,
}

/// The two versions of GPTQ's zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GptqZeros {
    /// `gptq`: one less than they are.
    MinusOne,
    /// `gptq_v2`: as they are.
    AsTheyAre,
}

/// What a runtime does to the inputs of a linear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inputs {
    /// Nothing.
    AsTheyAre,
    /// Symmetric 8-bit integers, a scale per token.
    Int8PerToken,
    /// Symmetric 8-bit integers, the scale `input_scale` for every token.
    Int8PerTensor,
    /// F8_E4M3 floats, a scale per token.
    Float8PerToken,
    /// F8_E4M3 floats, the scale `input_scale` for every token.
    Float8PerTensor,
    /// F8_E4M3 floats, a scale per so many consecutive values of a token.
    Float8PerGroup(usize),
    /// E2M1 floats, an F8_E4M3 scale per 16 consecutive values of a token, one scale above them for every token.
    Nvfp4,
    /// Something else, in words.
    Other(String),
}

impl Scheme {
    /// FP8 weights with a scale tensor of this name.
    pub const fn float8(scale: &'static str, inputs: Inputs) -> Self {
        let layout = Layout::Float8 { scale };
        Self { layout, inputs }
    }
}

impl Layout {
    /// What a configuration calls it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PackQuantized { .. } => "pack-quantized",
            Self::IntQuantized { .. } => "int-quantized",
            Self::Float8 { .. } => "float-quantized",
            Self::Nvfp4(Nvfp4Names::CompressedTensors) => "nvfp4-pack-quantized",
            Self::Nvfp4(Nvfp4Names::ModelOpt) => "modelopt NVFP4",
            Self::Gptq { zeros, .. } => match zeros {
                GptqZeros::MinusOne => "gptq",
                GptqZeros::AsTheyAre => "gptq_v2",
            },
        }
    }

    /// Whether a tensor can hold this layout's codes, by name and type alone.
    pub fn is_codes(&self, entry: &TensorEntry) -> bool {
        let (suffix, dtype) = match self {
            Self::PackQuantized { .. } => (".weight_packed", Dtype::I32),
            Self::IntQuantized { .. } => (".weight", Dtype::I8),
            Self::Float8 { .. } => (".weight", Dtype::F8E4M3),
            Self::Nvfp4(Nvfp4Names::CompressedTensors) => (".weight_packed", Dtype::U8),
            Self::Nvfp4(Nvfp4Names::ModelOpt) => (".weight", Dtype::U8),
            Self::Gptq { .. } => (".qweight", Dtype::I32),
        };
        entry.name.ends_with(suffix) && entry.dtype == dtype
    }

    /// Codes in one element of the tensor that holds them.
    pub const fn per_element(&self) -> usize {
        match self {
            Self::PackQuantized { width, .. } | Self::Gptq { width, .. } => width.per_word(),
            Self::IntQuantized { .. } | Self::Float8 { .. } => 1,
            Self::Nvfp4(_) => 2,
        }
    }

    /// Bits of a code.
    pub const fn bits(&self) -> usize {
        match self {
            Self::PackQuantized { width, .. } | Self::Gptq { width, .. } => width.bits(),
            Self::IntQuantized { bits, .. } => *bits,
            Self::Float8 { .. } => 8,
            Self::Nvfp4(_) => 4,
        }
    }

    /// What shares a scale; `None` where only the scale tensor's shape says so.
    pub const fn group(&self) -> Option<Group> {
        match self {
            Self::PackQuantized { group, .. }
            | Self::IntQuantized { group, .. }
            | Self::Gptq { group, .. } => Some(*group),
            Self::Nvfp4(_) => Some(Group::Columns(super::layout::NVFP4_GROUP)),
            Self::Float8 { .. } => None,
        }
    }

    /// Whether zero points can be other than in the middle.
    pub const fn is_symmetric(&self) -> bool {
        match self {
            Self::PackQuantized { symmetric, .. }
            | Self::IntQuantized { symmetric, .. }
            | Self::Gptq { symmetric, .. } => *symmetric,
            Self::Float8 { .. } | Self::Nvfp4(_) => true,
        }
    }
}

/// As people write it: `W4A16 g128, pack-quantized`; the alternate form ends at the comma.
impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let float = match self.layout {
            Layout::Float8 { .. } | Layout::Nvfp4(_) => " float",
            _ => "",
        };
        write!(f, "W{}A{}{float}", self.layout.bits(), self.inputs)?;
        match self.layout.group() {
            Some(Group::Columns(columns)) => write!(f, " g{columns}")?,
            Some(Group::Row) => f.write_str(" per row")?,
            Some(Group::Tensor) => f.write_str(" per tensor")?,
            None => {}
        }
        if !self.layout.is_symmetric() {
            f.write_str(" asymmetric")?;
        }
        if f.alternate() {
            return Ok(());
        }
        write!(f, ", {}", self.layout.name())?;
        match &self.inputs {
            Inputs::AsTheyAre => Ok(()),
            Inputs::Int8PerToken => f.write_str(", int8 inputs per token"),
            Inputs::Int8PerTensor => f.write_str(", int8 inputs with a fixed scale"),
            Inputs::Float8PerToken => f.write_str(", float8 inputs per token"),
            Inputs::Float8PerTensor => f.write_str(", float8 inputs with a fixed scale"),
            Inputs::Float8PerGroup(group) => write!(f, ", float8 inputs per {group} of a token"),
            Inputs::Nvfp4 => f.write_str(", NVFP4 inputs"),
            Inputs::Other(what) => write!(f, ", {what}"),
        }
    }
}

/// Bits of the inputs.
impl fmt::Display for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsTheyAre => "16",
            Self::Int8PerToken | Self::Int8PerTensor => "8",
            Self::Float8PerToken | Self::Float8PerTensor | Self::Float8PerGroup(_) => "8",
            Self::Nvfp4 => "4",
            Self::Other(what) if what.starts_with('4') => "4",
            Self::Other(what) if what.starts_with('8') => "8",
            Self::Other(_) => "?",
        })
    }
}
