//! What a recipe file says, or the flags that mean the same.
//!
//! Enters: YAML. Leaves: a [`Recipe`] with every default filled in, or an error that names line and key.

use std::path::Path;
use std::str::FromStr;

use regex::Regex;
use serde::{Deserialize, Deserializer, de};

use super::super::file_type::FileType;
use super::super::packed::entries::PackedEntries;
use super::super::phase::Phase;
use super::super::types::{Scheme, TensorTypeRule, WantedType};
use super::{Aim, Recipe, RewriteRecipe, WantedRotation};
use crate::calibrate::samples::SampleSettings;
use crate::convert::calibrated::{Method, Rounding};
use crate::error::{self, Error, Fault};
use crate::formats;
use crate::rewrite::Balance;

/// A recipe may hold a rule for every tensor of the largest model.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// `outtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutType {
    /// The float type of the checkpoint's first matrix.
    Auto,
    /// A named type.
    Named(FileType),
}

impl FromStr for OutType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("auto") {
            Ok(Self::Auto)
        } else {
            text.parse().map(Self::Named)
        }
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse().ok();
        number.and_then(Self::of_number).ok_or_else(|| {
            format!("phase must be 1 (w8a8), 2 (w4a8) or 3 (w4a8-mixed), found `{text}`")
        })
    }
}

/// What a recipe file says, or the flags that mean the same; keys are the flags without their dashes. What is left out
/// has a default.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RecipeEntries {
    /// 1, 2 or 3.
    #[serde(deserialize_with = "parsed")]
    pub phase: Option<Phase>,
    /// A named mix.
    #[serde(deserialize_with = "parsed")]
    pub outtype: Option<OutType>,
    /// Bits per weight over all weights.
    pub target_bpw: Option<f64>,
    /// Bytes over all files, with K, M or G.
    #[serde(deserialize_with = "sized")]
    pub target_size: Option<u64>,
    /// Types by name.
    #[serde(deserialize_with = "ruled")]
    pub rules: Vec<TensorTypeRule>,
    /// Type of `output.weight`.
    #[serde(deserialize_with = "parsed")]
    pub output_tensor_type: Option<WantedType>,
    /// Type of `token_embd.weight`.
    #[serde(deserialize_with = "parsed")]
    pub token_embedding_type: Option<WantedType>,
    /// The base type for every matrix.
    pub pure: Option<bool>,
    /// llama.cpp's substitutes.
    pub allow_fallback: Option<bool>,
    /// Widths as multiples of 256.
    pub widen: Option<bool>,
    /// The multi-token-prediction head.
    pub mtp: Option<bool>,
    /// How weights are rounded.
    pub method: Option<Method>,
    /// Passes of coordinate descent.
    pub passes: Option<u8>,
    /// Sequences through the network and back.
    pub gradient_sequences: Option<u32>,
    /// Share of the correction, 0 to 1.
    pub target_correction: Option<f64>,
    /// Share of the mean diagonal.
    pub damp_percent: Option<f64>,
    /// Biases behind `ssm_in` take back its mean errors.
    pub bias_absorption: Option<bool>,
    /// How much of the text is read.
    pub calibration: CalibrationEntries,
    /// Exact rewrites before rounding.
    pub rewrite: RewriteEntries,
    /// Packed folders.
    pub packed: PackedEntries,
}

/// How a calibrated network is rewritten.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RewriteEntries {
    /// Whether it is.
    pub apply: Option<bool>,
    /// Of the residual stream.
    pub rotation: Option<WantedRotation>,
    /// Scales of every space.
    pub smoothing: Option<bool>,
    /// Quarters of a channel's size that go to its activation.
    pub balance: Option<u8>,
    /// Channels by their mean square.
    pub sort: Option<bool>,
}

impl RewriteEntries {
    fn or(self, file: Self) -> Self {
        Self {
            apply: self.apply.or(file.apply),
            rotation: self.rotation.or(file.rotation),
            smoothing: self.smoothing.or(file.smoothing),
            balance: self.balance.or(file.balance),
            sort: self.sort.or(file.sort),
        }
    }

    fn resolve(self) -> Option<RewriteRecipe> {
        let rewrite = RewriteRecipe {
            rotation: self.rotation.unwrap_or_default(),
            smoothing: self.smoothing.unwrap_or(true),
            balance: self.balance.and_then(Balance::quarters),
            sort: self.sort.unwrap_or(false),
        };
        self.apply.unwrap_or(true).then_some(rewrite)
    }
}

/// How much of the calibration text is read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct CalibrationEntries {
    /// Tokens per sequence.
    pub context: Option<u32>,
    /// Sequences at most.
    pub sequences: Option<u32>,
    /// Of every choice.
    pub seed: Option<u64>,
}

impl RecipeEntries {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// It cannot be read, is no YAML, has an unknown key, a value that is not of its key's type, or keys that exclude each
    /// other; the error names file, line and key.
    pub fn open(path: &Path) -> error::Result<Self> {
        let input = |error: formats::Error| Error::Input(error.in_file(path));
        let size = std::fs::metadata(path).map_err(|error| input(error.into()))?;
        if size.len() > MAX_FILE_BYTES {
            let what = format!("{} bytes are too many for a recipe", size.len());
            return Err(input(formats::Error::malformed(what)));
        }
        let yaml = std::fs::read_to_string(path).map_err(|error| input(error.into()))?;
        let entries = Self::of_yaml(&yaml).and_then(|entries| entries.check().map(|()| entries));
        entries.map_err(|what| input(formats::Error::malformed(what)))
    }

    pub(super) fn of_yaml(yaml: &str) -> Result<Self, String> {
        let entries: Option<Self> = serde_saphyr::from_str(yaml).map_err(|error| {
            let at = error.location().map(|location| location.line() as usize);
            let text = error.without_snippet().to_string();
            let what = text.lines().next().unwrap_or_default().to_string();
            match at.and_then(|line| key_in(yaml, line)) {
                Some(key) if !what.contains(&format!("`{key}`")) => format!("`{key}`: {what}"),
                _ => what,
            }
        })?;
        // A file of comments alone is null to YAML and an empty recipe to its author.
        Ok(entries.unwrap_or_default())
    }

    /// These, and `file` where these say nothing. Rules of `file` come after these; what decides the types is taken from
    /// one of the two as a whole.
    pub fn or(self, file: Self) -> Self {
        let aims = if self.aims().is_empty() { &file } else { &self };
        Self {
            phase: aims.phase,
            outtype: aims.outtype,
            target_bpw: aims.target_bpw,
            target_size: aims.target_size,
            rules: self.rules.into_iter().chain(file.rules).collect(),
            output_tensor_type: self.output_tensor_type.or(file.output_tensor_type),
            token_embedding_type: self.token_embedding_type.or(file.token_embedding_type),
            pure: self.pure.or(file.pure),
            allow_fallback: self.allow_fallback.or(file.allow_fallback),
            widen: self.widen.or(file.widen),
            mtp: self.mtp.or(file.mtp),
            method: self.method.or(file.method),
            passes: self.passes.or(file.passes),
            gradient_sequences: self.gradient_sequences.or(file.gradient_sequences),
            target_correction: self.target_correction.or(file.target_correction),
            damp_percent: self.damp_percent.or(file.damp_percent),
            bias_absorption: self.bias_absorption.or(file.bias_absorption),
            calibration: CalibrationEntries {
                context: self.calibration.context.or(file.calibration.context),
                sequences: self.calibration.sequences.or(file.calibration.sequences),
                seed: self.calibration.seed.or(file.calibration.seed),
            },
            rewrite: self.rewrite.or(file.rewrite),
            packed: self.packed.or(file.packed),
        }
    }

    /// The first key that counts only where the model reads a text, if one is there that asks for something.
    pub fn calibration_key(&self) -> Option<&'static str> {
        // What is done without a text.
        if self.method == Some(Method::Rtn) {
            return None;
        }
        let rotates = |rotation| rotation != WantedRotation::None;
        let given = [
            (self.method.is_some(), "method"),
            (self.passes.is_some(), "passes"),
            (self.gradient_sequences.is_some(), "gradient-sequences"),
            (self.target_correction.is_some(), "target-correction"),
            (self.damp_percent.is_some(), "damp-percent"),
            (self.bias_absorption == Some(true), "bias-absorption"),
            (self.calibration.context.is_some(), "calibration context"),
            (
                self.calibration.sequences.is_some(),
                "calibration sequences",
            ),
            (self.calibration.seed.is_some(), "seed"),
            (self.rewrite.rotation.is_some_and(rotates), "rotation"),
            (self.rewrite.smoothing == Some(true), "smoothing"),
            (self.rewrite.balance.is_some(), "balance"),
            (self.rewrite.sort == Some(true), "sort"),
        ];
        given.iter().find(|(given, _)| *given).map(|(_, key)| *key)
    }

    /// Fills in what was left out.
    ///
    /// # Errors
    /// Keys that exclude each other, or a value out of range.
    pub fn resolve(self) -> error::Result<Recipe> {
        self.check()
            .map_err(|what| Error::Usage(Fault::new(what)))?;
        let rounding = Rounding::default();
        let samples = SampleSettings::default();
        let method = self.method.unwrap_or(rounding.method);
        let count = |given: Option<u32>, default: usize| given.map_or(default, |n| n as usize);
        Ok(Recipe {
            aim: self.aim(),
            rules: self.rules,
            output: self.output_tensor_type,
            token_embedding: self.token_embedding_type,
            pure: self.pure.unwrap_or(false),
            allow_fallback: self.allow_fallback.unwrap_or(false),
            widen: self.widen.unwrap_or(false),
            mtp: self.mtp.unwrap_or(true),
            rounding: Rounding {
                method,
                passes: self.passes.map_or(rounding.passes, usize::from),
                gradient_sequences: count(self.gradient_sequences, rounding.gradient_sequences),
                target_correction: self.target_correction.unwrap_or(rounding.target_correction),
                damp_percent: self.damp_percent.unwrap_or(rounding.damp_percent),
                bias_absorption: self.bias_absorption.unwrap_or(rounding.bias_absorption),
            },
            samples: SampleSettings {
                context_tokens: count(self.calibration.context, samples.context_tokens),
                max_sequences: count(self.calibration.sequences, samples.max_sequences),
                seed: self.calibration.seed.unwrap_or(samples.seed),
            },
            rewrite: self.rewrite.resolve(),
            packed: self.packed.resolve(),
        })
    }

    /// Keys that decide the types.
    fn aims(&self) -> Vec<&'static str> {
        let given = [
            (self.phase.is_some(), "phase"),
            (self.outtype.is_some(), "outtype"),
            (self.target_bpw.is_some(), "target-bpw"),
            (self.target_size.is_some(), "target-size"),
        ];
        given
            .into_iter()
            .filter(|(given, _)| *given)
            .map(|(_, key)| key)
            .collect()
    }

    fn aim(&self) -> Aim {
        match (self.phase, self.outtype, self.target_bpw, self.target_size) {
            (Some(phase), ..) => Aim::Scheme(Scheme::Phase(phase)),
            (_, Some(OutType::Named(file_type)), ..) => Aim::Scheme(Scheme::Mix(file_type)),
            (_, _, Some(bits), _) => Aim::BitsPerWeight(bits),
            (_, _, _, Some(bytes)) => Aim::FileBytes(bytes),
            _ => Aim::OwnType,
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let aims = self.aims();
        if let [one, other, ..] = aims[..] {
            return Err(format!(
                "`{one}` and `{other}` exclude each other: each decides the types"
            ));
        }
        if let (Some(true), Some(aim)) = (self.pure, aims.iter().find(|aim| **aim != "outtype")) {
            return Err(format!("`pure` goes with `outtype`, not with `{aim}`"));
        }
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let ranges = [
            (
                "target-bpw",
                self.target_bpw
                    .is_none_or(|bits| bits > 0.0 && bits <= 32.0),
                "above 0, at most 32",
            ),
            (
                "target-correction",
                self.target_correction.is_none_or(share),
                "0 to 1",
            ),
            (
                "damp-percent",
                self.damp_percent.is_none_or(share),
                "0 to 1",
            ),
            (
                "context",
                self.calibration
                    .context
                    .is_none_or(|n| (8..=1 << 20).contains(&n)),
                "8 to 1048576",
            ),
            (
                "balance",
                self.rewrite.balance.is_none_or(|quarters| quarters <= 4),
                "0 to 4",
            ),
            (
                "sequences",
                self.calibration.sequences.is_none_or(|n| n > 0),
                "at least 1",
            ),
        ];
        match ranges.iter().find(|(_, holds, _)| !holds) {
            Some((key, _, range)) => Err(format!("`{key}` is out of range: {range}")),
            None => Ok(()),
        }
    }
}

/// The key on a line of YAML, counted from 1; of a line like `- {tensor: a, type: b}` there is none.
fn key_in(yaml: &str, line: usize) -> Option<&str> {
    let (key, _) = yaml.lines().nth(line.checked_sub(1)?)?.split_once(':')?;
    let key = key.trim();
    key.chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        .then_some(key)
}

/// A size in bytes with K, M or G: powers of 1000, as in llama.cpp. Before a unit there may be a point, as in `1.5G`.
///
/// # Errors
/// It is no number, zero, too large, or no whole number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1_000),
        Some((at, 'M' | 'm')) => (&text[..at], 1_000_000),
        Some((at, 'G' | 'g')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, "0"));
    let number: u64 = whole.parse().map_err(|_| no_size(text))?;
    let part = part_of(unit, part).ok_or_else(|| no_size(text))?;
    let size = number
        .checked_mul(unit)
        .and_then(|size| size.checked_add(part));
    size.filter(|size| *size > 0)
        .ok_or_else(|| format!("`{text}` is out of range"))
}

fn no_size(text: &str) -> String {
    format!("`{text}` is not a size such as 500M or 1.5G")
}

/// The digits behind a point as a part of `unit`, which is a power of ten; `None` if they are none, or too many.
fn part_of(unit: u64, digits: &str) -> Option<u64> {
    let digits_hold = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let significant = digits.trim_end_matches('0');
    let tenths = 10_u64.checked_pow(u32::try_from(significant.len()).ok()?)?;
    if !digits_hold || !unit.is_multiple_of(tenths) {
        return None;
    }
    match significant {
        "" => Some(0),
        digits => Some(digits.parse::<u64>().ok()? * (unit / tenths)),
    }
}

fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    value: D,
) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(value)?;
    text.parse().map(Some).map_err(de::Error::custom)
}

fn sized<'de, D: Deserializer<'de>>(value: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(value)?;
    parse_size(&text).map(Some).map_err(de::Error::custom)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    tensor: String,
    #[serde(rename = "type", deserialize_with = "parsed")]
    ty: Option<WantedType>,
}

fn ruled<'de, D: Deserializer<'de>>(value: D) -> Result<Vec<TensorTypeRule>, D::Error> {
    let entries = Vec::<RuleEntry>::deserialize(value)?.into_iter();
    let rules = entries.map(|RuleEntry { tensor, ty }| {
        let pattern = Regex::new(&tensor).map_err(|error| {
            let reason = error.to_string();
            let reason = reason.lines().last().unwrap_or_default();
            de::Error::custom(format!("`{tensor}` is no regular expression: {reason}"))
        })?;
        let ty = ty.ok_or_else(|| de::Error::missing_field("type"))?;
        Ok(TensorTypeRule { pattern, ty })
    });
    rules.collect()
}
