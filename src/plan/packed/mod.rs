//! The plan of a packed folder: which linear takes which scheme, every tensor of every shard, `quantization_config`.
//!
//! Enters: a checkpoint's headers, [`PackedSettings`]. Leaves: [`PackedPlan`], from which all offsets follow. Reads no
//! weights.

mod choose;
mod config;
pub mod entries;
pub mod linears;
pub mod readers;
pub mod scheme;
mod shards;
mod targets;
mod tensors;
use std::collections::BTreeMap;
use std::str::FromStr;

use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::packed::Role;
use regex::Regex;
use serde_json::Value;

use super::phase::Phase;
use super::types::TypeSettings;
use super::{Plan, Settings};
use crate::error::{Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::quantize::integer::IntegerGrid;
use linears::Linear;
use readers::Reader;
use scheme::{LinearScheme, NamedScheme};
pub use shards::ShardLayout;

/// Bytes of a shard's tensors at most, as the hub has them.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// What linears that no rule names become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedAim {
    /// All the same.
    Scheme(NamedScheme),
    /// By what they are.
    Phase(Phase),
}

impl PackedAim {
    /// As it stands in folder names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scheme(scheme) => scheme.name(),
            Self::Phase(phase) => phase.name(),
        }
    }
}

/// What the linears whose module a pattern is found in become.
#[derive(Debug, Clone)]
pub struct LinearRule {
    /// Searched for anywhere in the module's name.
    pub pattern: Regex,
    /// `None`: kept in its float.
    pub scheme: Option<NamedScheme>,
}

/// What the largest code of inputs with a fixed scale stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationClip {
    /// The largest input of the samples.
    Max,
    /// The magnitude that leaves the least squared error over all inputs of the samples.
    #[default]
    Mse,
}

impl ActivationClip {
    /// As it is written in flags and recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Max => "max",
            Self::Mse => "mse",
        }
    }
}

impl FromStr for ActivationClip {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = [Self::Max, Self::Mse]
            .into_iter()
            .find(|clip| clip.name() == text);
        found.ok_or_else(|| format!("clip must be max or mse, found `{text}`"))
    }
}

/// What the user decided.
#[derive(Debug, Clone)]
pub struct PackedSettings {
    /// Of linears that no rule names.
    pub aim: PackedAim,
    /// The first match wins.
    pub rules: Vec<LinearRule>,
    /// Columns per group; `None`: for each matrix the largest that divides its rows.
    pub group_size: Option<usize>,
    /// Programs that must load the folder.
    pub readers: Vec<Reader>,
    /// Bytes of a shard at most.
    pub shard_bytes: u64,
    /// The weights will be rewritten first, so that floats are not those of the checkpoint; see [`Content::Values`].
    pub is_rewritten: bool,
}

/// Where the bytes of a tensor come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The bytes of a checkpoint tensor.
    Copied {
        /// Index into [`Checkpoint::tensors`].
        source: usize,
    },
    /// The values of a planned tensor: dequantized, or rewritten.
    Values {
        /// Index into [`Plan::tensors`].
        tensor: usize,
        /// Which matrix; `None`: all, as the checkpoint stacks them.
        piece: Option<usize>,
        /// The checkpoint tensor it stands for.
        source: usize,
    },
    /// A part of a quantized linear.
    Packed {
        /// Index into [`PackedPlan::linears`].
        linear: usize,
        /// Which part.
        role: Role,
    },
}

/// A tensor of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedTensor {
    /// Full name.
    pub name: String,
    /// Stored type.
    pub dtype: Dtype,
    /// Shape, slowest first.
    pub shape: Vec<usize>,
    /// Where its bytes come from.
    pub content: Content,
}

impl PackedTensor {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bytes() as u64
    }
}

/// A complete conversion, before a weight is read.
#[derive(Debug)]
pub struct PackedPlan {
    /// The network under GGUF names, in the checkpoint's own float type.
    pub plan: Plan,
    /// All linears, block after block.
    pub linears: Vec<Linear>,
    /// Parallel to them: what each becomes; `None` where it is kept.
    pub schemes: Vec<Option<LinearScheme>>,
    /// Tensors in checkpoint order.
    pub tensors: Vec<PackedTensor>,
    /// Files, and what is where.
    pub shards: Vec<ShardLayout>,
    /// For `config.json`.
    pub quantization_config: Value,
    /// What the user should know.
    pub remarks: Vec<String>,
}

impl PackedPlan {
    /// Plans a folder.
    ///
    /// # Errors
    /// The checkpoint does not match its config, a group size does not divide a row, a reader would break.
    pub fn new(
        checkpoint: &Checkpoint,
        config: NemotronHConfig,
        settings: &PackedSettings,
    ) -> Result<Self> {
        let own = Settings {
            types: TypeSettings::own(),
            widen: false,
            calibrated: false,
            with_mtp: false,
        };
        let plan = Plan::new(checkpoint, config, &own, None)?;
        let linears = linears::linears(checkpoint, &plan);
        let (schemes, mut remarks) = choose::schemes(&linears, settings)?;
        let choices: Vec<_> = linears
            .iter()
            .zip(schemes.iter().map(Option::as_ref))
            .collect();
        remarks.extend(readers::check(&choices, &settings.readers)?);
        let tensors =
            tensors::tensors(checkpoint, &plan, &linears, &schemes, settings.is_rewritten)?;
        remarks.extend(readers::casts(&linears, &tensors, own_float(checkpoint)));
        let quantization_config = config::quantization_config(checkpoint, &linears, &schemes);
        Ok(Self {
            shards: shards::shards(&tensors, settings.shard_bytes),
            plan,
            linears,
            schemes,
            tensors,
            quantization_config,
            remarks,
        })
    }

    /// Grids by planned tensor, for calibration.
    pub fn grids(&self) -> BTreeMap<String, IntegerGrid> {
        let chosen = self.linears.iter().zip(&self.schemes);
        chosen
            .filter_map(|(linear, scheme)| {
                let name = self.plan.tensors[linear.tensor].name.clone();
                Some((name, scheme.as_ref()?.grid))
            })
            .collect()
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(PackedTensor::bytes).sum()
    }

    /// Bytes of all shards, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(ShardLayout::file_bytes).sum()
    }

    /// Bits per weight of the whole folder.
    pub fn bits_per_weight(&self) -> f64 {
        self.tensor_bytes() as f64 * 8.0 / self.plan.weights() as f64
    }
}

/// The float type that the config names, in which readers hold what they load.
fn own_float(checkpoint: &Checkpoint) -> Option<Dtype> {
    let config = checkpoint.read_json("config.json").ok().flatten()?;
    let named = ["dtype", "torch_dtype"].map(|key| config[key].as_str());
    match named.into_iter().flatten().next()? {
        "bfloat16" => Some(Dtype::Bf16),
        "float16" => Some(Dtype::F16),
        "float32" => Some(Dtype::F32),
        _ => None,
    }
}

/// A fault of a linear.
fn fault(linear: &Linear, what: impl Into<String>) -> Fault {
    Fault::new(what).in_tensor(format!("{}.weight", linear.module))
}
