//! Exact rewrites of the network: other weights, the same function, easier to round.
//!
//! Enters: a stored model, settings, statistics of its activations. Leaves: [`Rewrites`], the chosen rewrites with their
//! parameters, and [`RewrittenModel`], which gives the values of every tensor after them. Knows no rounding and no file
//! but its own sidecar.
//!
//! All of them are free at run time, so that any runtime of the architecture computes what it computed before:
//!
//! | space | rewrite | producer | consumer |
//! |---|---|---|---|
//! | residual stream | rotation `x R` | embedding, writers | readers, head |
//! | normed stream | weight of the norm folded, scale | norm | readers, head |
//! | gated norm of Mamba-2 | scale, order inside heads | `ssm_norm` (and z, x, convolution) | `ssm_out` |
//! | keys and queries of a head | scale | `attn_k` | `attn_q` |
//! | values of a head | scale, rotation | `attn_v` | `attn_output` |
//! | hidden units behind relu2 | scale, order | up | down |
//! | latent space before experts | scale, rotation | `ffn_latent_down` | `ffn_up_exps` |
//! | latent space behind experts | scale, rotation | `ffn_down_exps` | `ffn_latent_up` |
//!
//! Source: MambaQuant, arXiv:2501.13484 (Karhunen-Loeve times Hadamard, smoothing), carried over from Mamba-1 to the
//! hybrid: with a gated norm the smoothing before `ssm_out` needs no changed activation. Rotation of the residual stream:
//! QuaRot, arXiv:2404.00456.

mod choose;
mod eigen;
mod exact_floats;
mod kept;
mod map;
mod matrix;
mod mixer;
mod model;
mod orthogonal;
mod random;
mod restore;
mod sidecar;
mod smoothing;
mod space;
mod spaces;
mod summary;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use kept::Kept;
pub use matrix::SquareMatrix;
pub(crate) use matrix::{Packed, padded, product_on};
pub use mixer::{MixedPart, Mixer, Mixing};
pub(crate) use model::Rewritten;
pub use model::RewrittenModel;
pub use restore::Restore;
pub use sidecar::{SHA256_KEY, SIDECAR_IN_FOLDER, SIDECAR_SUFFIX, SUMMARY_KEY, sidecar_of};
pub use space::Space;
pub use summary::RewriteSummary;

/// How the residual stream is rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rotation {
    /// Not at all.
    #[default]
    None,
    /// Random signs and a Hadamard matrix: needs no statistics.
    Hadamard,
    /// Principal axes of the normed stream, then signs and Hadamard: every channel gets the same mean square.
    Klt,
}

impl std::fmt::Display for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Hadamard => "hadamard",
            Self::Klt => "klt",
        })
    }
}

/// What of an activation stands for its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Magnitude {
    /// Root mean square: for scales per block or per token.
    #[default]
    RootMeanSquare,
    /// Largest magnitude: for one scale per tensor. Of the residual stream only the mean square is known.
    Maximum,
}

/// How the size of a channel is shared between activation and weights, in quarters that go to the activation's divisor:
/// `s = a^(q/4) / w^(1 - q/4)`. Quarters, because square roots are the same on every machine and powers are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Balance(u8);

impl Balance {
    /// All to the weights: every column of a matrix becomes as large as any other.
    pub const WEIGHTS: Self = Self(0);
    /// A quarter to the activations. A step follows the largest of its group, so that what else lies in the group hardly
    /// counts: less than half for the side that is rounded more finely.
    pub const MOSTLY_WEIGHTS: Self = Self(1);
    /// Half to each, as SmoothQuant has it.
    pub const EVEN: Self = Self(2);

    /// 0 (all activations equally large) is `s = 1 / w`, 4 is `s = a`.
    pub fn quarters(quarters: u8) -> Option<Self> {
        (quarters <= 4).then_some(Self(quarters))
    }
}

impl Default for Balance {
    fn default() -> Self {
        Self::MOSTLY_WEIGHTS
    }
}

impl TryFrom<u8> for Balance {
    type Error = String;

    fn try_from(quarters: u8) -> Result<Self, String> {
        Self::quarters(quarters).ok_or_else(|| format!("{quarters} quarters are more than a whole"))
    }
}

impl From<Balance> for u8 {
    fn from(balance: Balance) -> u8 {
        balance.0
    }
}

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewriteSettings {
    /// Rotation of the residual stream; with one, values and latent spaces are rotated too.
    pub rotation: Rotation,
    /// Scales of every space.
    pub smoothing: bool,
    /// How they share.
    pub balance: Balance,
    /// What they are made from.
    pub magnitude: Magnitude,
    /// Channels before `ssm_out` (inside heads) and before down projections by descending mean square, after smoothing: the
    /// loud are rounded first, and share their scales with the loud. Of no use where smoothing has made them alike.
    pub sort: bool,
    /// Of signs and of random matrices.
    pub seed: u64,
    /// Tensors that will not be quantized, where floats must hold what they held: they are left alone, and scales are such
    /// that norms become short floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floats: Option<Vec<String>>,
    /// The artifact will hold the multi-token-prediction head, which reads the normed stream once more: then the stream
    /// cannot be rotated and the final norm keeps its weight.
    pub with_mtp: bool,
}

/// Sizes of the channels of an activation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChannelStatistics {
    /// E[u^2]; of a stack all experts, one after the other. 0 where nothing was seen.
    pub mean_square: Vec<f64>,
    /// Largest |u|, in the same order. Only [`Magnitude::Maximum`] asks for it.
    pub max_abs: Vec<f32>,
}

/// Statistics of the original network that the choice of rewrites needs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RewriteStatistics {
    /// Per block `E[rms(x)^T rms(x)]` of the normalized residual before the norm's weight, `[hidden * hidden]`; the last
    /// entry is that of the final norm. Not centred.
    pub residual: Vec<Kept>,
    /// Inputs of the matrices that do not read the residual stream, by GGUF name: `ssm_out`, `attn_output`, `ffn_down`,
    /// `ffn_down_exps`, `ffn_down_shexp`, `ffn_latent_up`.
    pub inputs: BTreeMap<String, ChannelStatistics>,
}

/// Chosen rewrites with their parameters: pure data, the same for the same model, settings and statistics.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rewrites {
    /// What was asked for.
    settings: RewriteSettings,
    /// R, `[hidden, hidden]`: the stream becomes `x R`.
    rotation: Option<SquareMatrix>,
    /// Rewritten spaces by the tensor that produces them, such as `blk.0.ffn_up`. A norm that is there is folded into its
    /// readers.
    spaces: BTreeMap<String, Space>,
}

impl Rewrites {
    /// Nothing is rewritten.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether nothing is rewritten.
    pub fn is_none(&self) -> bool {
        self.rotation.is_none() && self.spaces.is_empty()
    }

    /// What was asked for.
    pub fn settings(&self) -> &RewriteSettings {
        &self.settings
    }

    /// R of the residual stream: it becomes `x R`.
    pub fn rotation(&self) -> Option<&SquareMatrix> {
        self.rotation.as_ref()
    }

    /// A rewritten space, by the tensor that produces it.
    pub fn space(&self, producer: &str) -> Option<&Space> {
        self.spaces.get(producer)
    }
}
