//! Recipes: everything that decides an artifact's numbers, as one reviewed YAML file.
//!
//! Enters: YAML, or the flags that mean the same. Leaves: [`Recipe`], complete and in range. Texts, names and places of
//! files are no part of it.

mod entries;
#[cfg(test)]
mod tests;
mod yaml;

use serde::Deserialize;

use super::Settings;
use super::packed::entries::PackedRecipe;
use super::types::{Scheme, TensorTypeRule, TypeSettings, WantedType};
use crate::calibrate::samples::SampleSettings;
use crate::convert::calibrated::Rounding;
use crate::rewrite::{Balance, Magnitude, RewriteSettings, Rotation};
pub use entries::{CalibrationEntries, OutType, RecipeEntries, RewriteEntries, parse_size};

/// What decides the types of tensors that no rule names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Aim {
    /// The checkpoint's own float type.
    OwnType,
    /// A named mix or a phase.
    Scheme(Scheme),
    /// Types allocated by sensitivity: so many bits per weight, over all weights.
    BitsPerWeight(f64),
    /// Types allocated by sensitivity: at most so many bytes, over all files.
    FileBytes(u64),
}

/// Settings of every stage.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Types.
    pub aim: Aim,
    /// Types by name; the first match wins.
    pub rules: Vec<TensorTypeRule>,
    /// Type of `output.weight`.
    pub output: Option<WantedType>,
    /// Type of `token_embd.weight`.
    pub token_embedding: Option<WantedType>,
    /// Every matrix takes the base type of the named mix.
    pub pure: bool,
    /// Whether llama.cpp's substitute may stand in for a type that does not fit.
    pub allow_fallback: bool,
    /// Widen exactly to multiples of 256.
    pub widen: bool,
    /// Keep the multi-token-prediction head.
    pub mtp: bool,
    /// How weights are rounded when there is a calibration text.
    pub rounding: Rounding,
    /// How much of the text is read.
    pub samples: SampleSettings,
    /// Exact rewrites before rounding, for a calibrated model; `None` where it stays as it is.
    pub rewrite: Option<RewriteRecipe>,
    /// What packed folders take.
    pub packed: PackedRecipe,
}

/// `rotation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WantedRotation {
    /// The one whose rounding loses least on a few blocks; none unless another is clearly better.
    #[default]
    Auto,
    /// Not rotated.
    None,
    /// Random signs and a Hadamard matrix.
    Hadamard,
    /// Principal axes, then the same.
    Klt,
}

impl WantedRotation {
    /// The rotation, where it is decided.
    pub fn decided(self) -> Option<Rotation> {
        match self {
            Self::Auto => None,
            Self::None => Some(Rotation::None),
            Self::Hadamard => Some(Rotation::Hadamard),
            Self::Klt => Some(Rotation::Klt),
        }
    }
}

impl From<Rotation> for WantedRotation {
    fn from(rotation: Rotation) -> Self {
        match rotation {
            Rotation::None => Self::None,
            Rotation::Hadamard => Self::Hadamard,
            Rotation::Klt => Self::Klt,
        }
    }
}

/// How a calibrated network is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RewriteRecipe {
    /// Of the residual stream.
    pub rotation: WantedRotation,
    /// Scales of every space.
    pub smoothing: bool,
    /// How they share, where that is said.
    pub balance: Option<Balance>,
    /// Channels by their mean square.
    pub sort: bool,
}

impl Recipe {
    /// Settings of a plan whose types `scheme` decides.
    pub fn settings(&self, scheme: Scheme, calibrated: bool) -> Settings {
        Settings {
            types: TypeSettings {
                scheme,
                pure: self.pure,
                output: self.output,
                token_embedding: self.token_embedding,
                rules: self.rules.clone(),
                allow_fallback: self.allow_fallback,
            },
            widen: self.widen,
            calibrated,
            with_mtp: self.mtp,
        }
    }

    /// How the network is rewritten, without a rotation where that is still to be chosen; `usual` balance where none is
    /// said; `has_mtp`: the model has a multi-token-prediction head.
    pub fn rewrites(&self, usual: Balance, has_mtp: bool) -> Option<RewriteSettings> {
        self.rewrite.map(|rewrite| RewriteSettings {
            rotation: rewrite.rotation.decided().unwrap_or_default(),
            smoothing: rewrite.smoothing,
            balance: rewrite.balance.unwrap_or(usual),
            magnitude: Magnitude::RootMeanSquare,
            sort: rewrite.sort,
            seed: self.samples.seed,
            floats: None,
            with_mtp: self.mtp && has_mtp,
        })
    }
}
