//! What became of every tensor: the receipt's lines, and the journal's.

use serde::{Deserialize, Serialize};

/// How a tensor was rounded in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Treatment {
    /// Stored as a float.
    Kept,
    /// Nearest, data-free search.
    Rtn,
    /// Nearest, search weighted by the inputs.
    Imatrix,
    /// With error feedback.
    Gptq,
    /// Feedback was asked for, but the second moments could not be factored.
    Fallback,
}

/// What one expert was shown.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ExpertTokens {
    /// Tokens routed to it.
    pub tokens: u64,
    /// Sum of their squared router weights.
    pub weight: f64,
    /// How it was rounded.
    pub treatment: Treatment,
}

/// What became of a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorOutcome {
    /// GGUF name.
    pub tensor: String,
    /// Stored type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Real bits per weight of the type.
    pub bits_per_weight: f64,
    /// How it was rounded; of experts the most common.
    pub treatment: Treatment,
    /// `tr(E M E^T) / tr(W M W^T)` of data-free rounding.
    pub rtn_loss: Option<f64>,
    /// The same of what was stored.
    pub loss: Option<f64>,
    /// The largest damping that was needed.
    pub damping: Option<f64>,
    /// Calibration tokens that were seen.
    pub tokens: Option<u64>,
    /// Inputs that were never anything but zero.
    pub dead_inputs: usize,
    /// Largest magnitude of an input, in the network as it is rounded.
    #[serde(default)]
    pub largest_input: Option<f32>,
    /// Where one 8-bit scale for all inputs should clip them, so that their squared error is least.
    #[serde(default)]
    pub input_clip: Option<f32>,
    /// NaN and infinite weights.
    pub nonfinite: u64,
    /// Scales too large for F16.
    pub overflows: u64,
    /// One per expert.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub experts: Vec<ExpertTokens>,
}
