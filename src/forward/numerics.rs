//! Whose arithmetic is followed: how activations are taken, how the time step is bounded, how the cache is kept.

use std::collections::BTreeMap;

use nemoconv_formats::GgmlType;

use crate::artifact::{Container, StoredModel, StoredTensor};
use crate::backend::AttentionArithmetic;
use crate::backend::activation::Activation;
use crate::model::config::TimeStep;

/// How the inputs of matrix products are taken.
#[derive(Debug, Clone, PartialEq)]
pub enum ActivationScheme {
    /// As f32: the network itself.
    None,
    /// As llama.cpp takes them for each stored type.
    Runtime,
    /// Rounded to BF16: the noise floor of the field.
    Bf16,
    /// 8 bit per block of 32 for every quantizable matrix.
    Q8_0,
    /// 8 bit per block of 256; per block of 32 where rows are no multiple of it.
    Q8K,
    /// 8 bit with one scale per token.
    TokenInt8,
    /// 8 bit with one scale per tensor, by GGUF name; tensors without one stay f32.
    StaticInt8(BTreeMap<String, f32>),
    /// As a packed checkpoint declares it for each tensor, by GGUF name; the others see f32.
    Declared(BTreeMap<String, Activation>),
}

/// Which bounds the time step has after softplus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeStepRule {
    /// `time_step_limit` of the config: what the model was trained with. None in GGUF files.
    Limit,
    /// At least `time_step_min`, as transformers' chunked path has it; for parity with that library.
    Minimum,
}

/// The arithmetic of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Numerics {
    /// How inputs of matrix products are taken.
    pub activations: ActivationScheme,
    /// Bounds of the time step.
    pub time_step: TimeStepRule,
    /// In what attention is computed.
    pub attention: AttentionArithmetic,
}

impl Numerics {
    /// The network as it is defined: f32 throughout.
    pub const EXACT: Self = Self {
        activations: ActivationScheme::None,
        time_step: TimeStepRule::Limit,
        attention: AttentionArithmetic::F32,
    };

    /// What the runtime of a container does: llama.cpp's arithmetic for GGUF, the definition for a checkpoint, with inputs
    /// quantized where a packed one declares it.
    pub fn of_target(model: &StoredModel) -> Self {
        match model.container() {
            Container::Checkpoint if !model.declared_inputs().is_empty() => Self {
                activations: ActivationScheme::Declared(model.declared_inputs().clone()),
                ..Self::EXACT
            },
            Container::Checkpoint | Container::Memory => Self::EXACT,
            Container::Gguf => Self {
                activations: ActivationScheme::Runtime,
                attention: AttentionArithmetic::F16,
                ..Self::EXACT
            },
        }
    }

    /// How the input of one matrix is taken.
    pub fn activation(&self, tensor: &StoredTensor) -> Activation {
        let StoredTensor {
            name, ty, columns, ..
        } = tensor;
        // Matrices that no runtime quantizes, the router above all, see f32.
        let is_kept = *ty == GgmlType::F32 && !tensor.is_packed;
        let columns = *columns;
        let wanted = match &self.activations {
            ActivationScheme::None => Activation::None,
            ActivationScheme::Runtime => Activation::of_runtime(*ty),
            ActivationScheme::Declared(inputs) => {
                inputs.get(name).copied().unwrap_or(Activation::None)
            }
            _ if is_kept => Activation::None,
            ActivationScheme::Bf16 => Activation::Bf16,
            ActivationScheme::Q8_0 => Activation::Q8_0,
            ActivationScheme::Q8K if Activation::Q8K.fits(columns) => Activation::Q8K,
            ActivationScheme::Q8K => Activation::Q8_0,
            ActivationScheme::TokenInt8 => Activation::TokenInt8,
            ActivationScheme::StaticInt8(scales) => scales
                .get(name)
                .map_or(Activation::None, |scale| Activation::StaticInt8(*scale)),
        };
        if wanted.fits(columns) {
            wanted
        } else {
            Activation::None
        }
    }

    /// The bounds in force.
    pub fn time_step(&self, config: TimeStep) -> (f32, f32) {
        match self.time_step {
            TimeStepRule::Limit => config.limit,
            TimeStepRule::Minimum => (config.min, f32::INFINITY),
        }
    }
}
