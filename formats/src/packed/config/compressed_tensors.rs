//! The configuration of compressed-tensors, as it is written: every key in alphabetical order, nulls included.
//!
//! Source: compressed-tensors 0.19 `QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs`.

use super::{Method, Quantization, SchemeGroup, in_key};
use crate::packed::bits::Width;
use crate::packed::layout::NVFP4_GROUP;
use crate::packed::pattern::Pattern;
use crate::packed::scheme::{Group, Inputs, Layout, Nvfp4Names, Scheme};
use crate::{Error, Result};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};
use std::fmt;

/// The whole object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompressedTensors {
    /// Groups in their order.
    pub config_groups: Groups,
    /// Of all groups, or [`Format::MixedPrecision`].
    pub format: Format,
    /// Never used.
    #[serde(default)]
    pub global_compression_ratio: Option<f64>,
    /// Module names and `re:` patterns that are not quantized.
    #[serde(default)]
    pub ignore: Vec<String>,
    /// Quantization of keys and values.
    #[serde(default)]
    pub kv_cache_scheme: Option<Value>,
    /// `compressed-tensors`.
    pub quant_method: String,
    /// `compressed`.
    #[serde(default)]
    pub quantization_status: Option<String>,
    /// Sparse weights, of which none are read.
    #[serde(default)]
    pub sparsity_config: Option<Map<String, Value>>,
    /// Rotations.
    #[serde(default)]
    pub transform_config: Option<Map<String, Value>>,
    /// Of the library.
    #[serde(default)]
    pub version: Option<String>,
}

/// Groups with their names, in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Groups(pub Vec<(String, ConfigGroup)>);

/// Modules that are quantized in the same way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigGroup {
    /// How the tensors lie; the whole configuration's where it is missing.
    #[serde(default)]
    pub format: Option<Format>,
    /// Inputs.
    #[serde(default)]
    pub input_activations: Option<Args>,
    /// Outputs; no runtime quantizes them.
    #[serde(default)]
    pub output_activations: Option<Args>,
    /// Module names, `re:` patterns and class names.
    pub targets: Vec<String>,
    /// Weights.
    #[serde(default)]
    pub weights: Option<Args>,
}

/// How values become codes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Args {
    /// `weight` or `static` where columns were quantized in another order than they are stored.
    #[serde(default)]
    pub actorder: Option<String>,
    /// `[rows, columns]` of a block.
    #[serde(default)]
    pub block_structure: Option<Vec<usize>>,
    /// Whether scales are found at run time: a flag, or `local`.
    #[serde(default)]
    pub dynamic: Dynamic,
    /// Weights that share a scale.
    #[serde(default)]
    pub group_size: Option<i64>,
    /// Bits of a code.
    #[serde(default = "eight")]
    pub num_bits: u64,
    /// How the writer found scales.
    #[serde(default)]
    pub observer: Option<String>,
    /// Its settings.
    #[serde(default)]
    pub observer_kwargs: Option<Map<String, Value>>,
    /// Type of scales, null for the model's.
    #[serde(default)]
    pub scale_dtype: Option<String>,
    /// What shares a scale.
    #[serde(default)]
    pub strategy: Option<Strategy>,
    /// No zero points.
    #[serde(default = "yes")]
    pub symmetric: bool,
    /// Integers or floats.
    #[serde(default, rename = "type")]
    pub ty: NumberType,
    /// Type of zero points, null where there are none.
    #[serde(default)]
    pub zp_dtype: Option<String>,
}

/// Whether scales are found at run time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dynamic {
    /// All or none.
    Flag(bool),
    /// `local`: those of groups, below a fixed one.
    Named(String),
}

impl Default for Dynamic {
    fn default() -> Self {
        Self::Flag(false)
    }
}

/// How the tensors lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Format {
    Dense,
    PackQuantized,
    IntQuantized,
    FloatQuantized,
    NaiveQuantized,
    Nvfp4PackQuantized,
    MixedPrecision,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Strategy {
    Tensor,
    Channel,
    Group,
    Block,
    Token,
    TensorGroup,
    AttnHead,
}

/// Kind of the codes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum NumberType {
    #[default]
    Int,
    Float,
}

const fn eight() -> u64 {
    8
}

const fn yes() -> bool {
    true
}

impl CompressedTensors {
    /// Compiles the patterns and finds each group's layout.
    ///
    /// # Errors
    /// A layout that is not known, sparse weights, rotations at run time, a pattern that is not understood.
    pub fn compile(&self) -> Result<Quantization> {
        self.check_what_is_not_read()
            .map_err(in_key("quantization_config"))?;
        let mut groups = Vec::new();
        let mut targets = Vec::new();
        for (name, group) in &self.config_groups.0 {
            let key = || in_key(format!("quantization_config.config_groups.{name}"));
            let Some(weights) = &group.weights else {
                continue;
            };
            let format = group.format.unwrap_or(self.format);
            let Some(layout) = layout(format, weights).map_err(key())? else {
                continue;
            };
            for target in &group.targets {
                let pattern = Pattern::compressed_tensors(target).map_err(key())?;
                targets.push((pattern, groups.len()));
            }
            groups.push(SchemeGroup {
                name: name.clone(),
                scheme: Scheme {
                    layout,
                    inputs: group
                        .input_activations
                        .as_ref()
                        .map_or(Inputs::AsTheyAre, inputs),
                },
            });
        }
        let ignored: Result<Vec<_>> = self
            .ignore
            .iter()
            .map(|entry| Pattern::compressed_tensors(entry))
            .collect();
        let ignored = ignored.map_err(in_key("quantization_config.ignore"))?;
        Ok(Quantization::new(
            Method::CompressedTensors,
            groups,
            targets,
            ignored,
        ))
    }

    fn check_what_is_not_read(&self) -> Result<()> {
        let text = |map: &Option<Map<String, Value>>, key: &str| {
            map.as_ref()?.get(key)?.as_str().map(str::to_owned)
        };
        if let Some(format) = text(&self.sparsity_config, "format").filter(|f| f != "dense") {
            return Err(Error::unsupported(format!(
                "sparse weights (`{format}`) are not read"
            )));
        }
        let transforms = self
            .transform_config
            .as_ref()
            .and_then(|map| map.get("config_groups"));
        let locations = transforms
            .into_iter()
            .filter_map(Value::as_object)
            .flat_map(Map::values)
            .filter_map(|group| group.get("apply")?.as_array())
            .flatten()
            .filter_map(|apply| apply.get("location")?.as_str());
        match locations
            .into_iter()
            .find(|location| !location.starts_with("weight_"))
        {
            None => Ok(()),
            Some(location) => Err(Error::unsupported(format!(
                "transform_config rotates at run time (`{location}`), which is not known"
            ))),
        }
    }
}

/// How weights of these settings lie; `None` if they are plain.
fn layout(format: Format, weights: &Args) -> Result<Option<Layout>> {
    let unsupported = |what: String| Err(Error::unsupported(what));
    let bits = weights.num_bits;
    let symmetric = weights.symmetric;
    Ok(Some(match (format, weights.ty) {
        (Format::Dense, _) => return Ok(None),
        (Format::MixedPrecision, _) => {
            return Err(Error::malformed(
                "has no format of its own, and `mixed-precision` is none",
            ));
        }
        (Format::PackQuantized, NumberType::Int) => match Width::from_bits(bits) {
            Some(width) => Layout::PackQuantized {
                width,
                group: group(weights)?,
                symmetric,
            },
            None => {
                return unsupported(format!("packed codes must have 4 or 8 bits, found {bits}"));
            }
        },
        (Format::IntQuantized | Format::NaiveQuantized, NumberType::Int) => match bits {
            1..=8 => Layout::IntQuantized {
                bits: usize::try_from(bits).unwrap_or_default(),
                group: group(weights)?,
                symmetric,
            },
            _ => {
                return Err(Error::malformed(format!(
                    "num_bits must be 1 to 8, found {bits}"
                )));
            }
        },
        (Format::FloatQuantized | Format::NaiveQuantized, NumberType::Float) if bits == 8 => {
            Layout::Float8 {
                scale: "weight_scale",
            }
        }
        (Format::Nvfp4PackQuantized, NumberType::Float) if bits == 4 => {
            Layout::Nvfp4(Nvfp4Names::CompressedTensors)
        }
        (_, ty) => {
            let ty = match ty {
                NumberType::Int => "int",
                NumberType::Float => "float",
            };
            let format = name(format);
            return unsupported(format!(
                "weights of {bits}-bit {ty} in `{format}` are not known"
            ));
        }
    }))
}

fn name(format: Format) -> String {
    let value = serde_json::to_value(format).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

fn group(weights: &Args) -> Result<Group> {
    let size = weights.group_size;
    let strategy = weights.strategy.unwrap_or(match size {
        Some(1..) => Strategy::Group,
        Some(_) => Strategy::Channel,
        None => Strategy::Tensor,
    });
    match (strategy, size) {
        (Strategy::Tensor, _) => Ok(Group::Tensor),
        (Strategy::Channel, _) => Ok(Group::Row),
        (Strategy::Group, Some(size @ 1..)) => usize::try_from(size)
            .map(Group::Columns)
            .map_err(|_| Error::malformed(format!("group_size {size} is too large"))),
        (Strategy::Group, _) => Err(Error::malformed("strategy is `group` without a group_size")),
        _ => Err(Error::unsupported(
            "integer weights must have strategy `tensor`, `channel` or `group`",
        )),
    }
}

fn inputs(args: &Args) -> Inputs {
    let is_dynamic = args.dynamic == Dynamic::Flag(true);
    let is_static = args.dynamic == Dynamic::Flag(false);
    let is_local = args.dynamic == Dynamic::Named("local".to_owned());
    let group = args
        .group_size
        .and_then(|group| usize::try_from(group).ok());
    match (args.ty, args.num_bits, args.strategy, args.symmetric) {
        (NumberType::Int, 8, Some(Strategy::Token), true) => Inputs::Int8PerToken,
        (NumberType::Float, 8, Some(Strategy::Token), true) if is_dynamic => Inputs::Float8PerToken,
        (NumberType::Float, 8, Some(Strategy::Tensor) | None, true) if is_static => {
            Inputs::Float8PerTensor
        }
        (NumberType::Float, 8, Some(Strategy::Group), true) if is_dynamic => match group {
            Some(group @ 1..) => Inputs::Float8PerGroup(group),
            _ => Inputs::Other("8-bit float inputs in groups of unknown size".to_owned()),
        },
        (NumberType::Float, 4, Some(Strategy::TensorGroup), true)
            if is_local && group == Some(NVFP4_GROUP) =>
        {
            Inputs::Nvfp4
        }
        (NumberType::Int, 8, Some(Strategy::Tensor) | None, true) if is_static => {
            Inputs::Int8PerTensor
        }
        (ty, bits, ..) => {
            let ty = match ty {
                NumberType::Int => "integer",
                NumberType::Float => "float",
            };
            let scale = match is_dynamic {
                true => "found at run time",
                false => "fixed",
            };
            Inputs::Other(format!("{bits}-bit {ty} inputs, scales {scale}"))
        }
    }
}

impl Serialize for Groups {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, group)| (name, group)))
    }
}

impl<'de> Deserialize<'de> for Groups {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(GroupsVisitor)
    }
}

struct GroupsVisitor;

impl<'de> Visitor<'de> for GroupsVisitor {
    type Value = Groups;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of groups")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Groups, A::Error> {
        let mut groups = Vec::new();
        while let Some(entry) = map.next_entry()? {
            groups.push(entry);
        }
        Ok(Groups(groups))
    }
}
