//! Recipes: everything that decides an artifact's numbers, as one reviewed YAML file.
//!
//! Enters: YAML, or the flags that mean the same. Leaves: [`Recipe`], complete and in range. Texts, names and places of
//! files are no part of it.

use std::fmt::{self, Display};
use std::path::Path;
use std::str::FromStr;

use regex::Regex;
use serde::{Deserialize, Deserializer, de};

use super::Settings;
use super::file_type::FileType;
use super::packed::entries::{PackedEntries, PackedRecipe};
use super::phase::Phase;
use super::types::{Scheme, TensorTypeRule, TypeSettings, WantedType};
use crate::calibrate::samples::SampleSettings;
use crate::convert::calibrated::{Method, Rounding};
use crate::error::{self, Error, Fault};
use crate::formats;
use crate::rewrite::{Balance, Magnitude, RewriteSettings, Rotation};

/// A recipe may hold a rule for every tensor of the largest model.
const MAX_FILE_BYTES: u64 = 1 << 20;

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
    /// How they share.
    pub balance: Balance,
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

    /// How the network is rewritten, without a rotation where that is still to be chosen; `has_mtp`: the model has a
    /// multi-token-prediction head.
    pub fn rewrites(&self, has_mtp: bool) -> Option<RewriteSettings> {
        self.rewrite.map(|rewrite| RewriteSettings {
            rotation: rewrite.rotation.decided().unwrap_or_default(),
            smoothing: rewrite.smoothing,
            balance: rewrite.balance,
            magnitude: Magnitude::RootMeanSquare,
            sort: rewrite.sort,
            seed: self.samples.seed,
            floats: None,
            with_mtp: self.mtp && has_mtp,
        })
    }

    /// The recipe as YAML: read again it gives the same recipe.
    pub fn to_yaml(&self) -> String {
        let mut yaml =
            String::from("# A recipe of nemoconv: `nemoconv to-gguf MODEL --recipe FILE`\n");
        let mut line = |key: &str, value: &dyn Display| yaml.push_str(&format!("{key}: {value}\n"));
        match self.aim {
            Aim::OwnType => line("outtype", &"auto"),
            Aim::Scheme(Scheme::Mix(file_type)) => line("outtype", &file_type),
            Aim::Scheme(Scheme::Phase(phase)) => line("phase", &phase.number()),
            Aim::BitsPerWeight(bits) => line("target-bpw", &bits),
            Aim::FileBytes(bytes) => line("target-size", &bytes),
        }
        for (key, ty) in [
            ("output-tensor-type", self.output),
            ("token-embedding-type", self.token_embedding),
        ] {
            ty.iter().for_each(|ty| line(key, ty));
        }
        line("pure", &self.pure);
        line("allow-fallback", &self.allow_fallback);
        line("widen", &self.widen);
        line("mtp", &self.mtp);
        line("method", &self.rounding.method);
        line("passes", &self.rounding.passes);
        line("gradient-sequences", &self.rounding.gradient_sequences);
        line("target-correction", &self.rounding.target_correction);
        line("damp-percent", &self.rounding.damp_percent);
        line("bias-absorption", &self.rounding.bias_absorption);
        yaml.push_str(&format!(
            "calibration:\n  context: {}\n  sequences: {}\n  seed: {}\n",
            self.samples.context_tokens, self.samples.max_sequences, self.samples.seed
        ));
        push_rewrite(&mut yaml, self.rewrite);
        push_rules(&mut yaml, &self.rules);
        self.packed.push_yaml(&mut yaml);
        yaml
    }
}

fn push_rewrite(yaml: &mut String, rewrite: Option<RewriteRecipe>) {
    let Some(rewrite) = rewrite else {
        yaml.push_str("rewrite:\n  apply: false\n");
        return;
    };
    let rotation = match rewrite.rotation {
        WantedRotation::Auto => "auto",
        WantedRotation::None => "none",
        WantedRotation::Hadamard => "hadamard",
        WantedRotation::Klt => "klt",
    };
    yaml.push_str(&format!(
        "rewrite:\n  rotation: {rotation}\n  smoothing: {}\n  balance: {}\n  sort: {}\n",
        rewrite.smoothing,
        u8::from(rewrite.balance),
        rewrite.sort,
    ));
}

fn push_rules(yaml: &mut String, rules: &[TensorTypeRule]) {
    if !rules.is_empty() {
        yaml.push_str("rules:\n");
    }
    for rule in rules {
        let pattern = rule.pattern.as_str();
        let quoted = match pattern.chars().any(char::is_control) {
            // What JSON quotes, YAML reads.
            true => serde_json::Value::from(pattern).to_string(),
            false => format!("'{}'", pattern.replace('\'', "''")),
        };
        yaml.push_str(&format!("  - {{tensor: {quoted}, type: {}}}\n", rule.ty));
    }
}

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

impl Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rtn => "rtn",
            Self::Imatrix => "imatrix",
            Self::Gptq => "gptq",
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

    /// Order helps error feedback and harms rounding without it.
    fn resolve(self, method: Method) -> Option<RewriteRecipe> {
        let rewrite = RewriteRecipe {
            rotation: self.rotation.unwrap_or_default(),
            smoothing: self.smoothing.unwrap_or(true),
            balance: self.balance.and_then(Balance::quarters).unwrap_or_default(),
            sort: self.sort.unwrap_or(method == Method::Gptq),
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

    fn of_yaml(yaml: &str) -> Result<Self, String> {
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

    /// Fills in what was left out.
    ///
    /// # Errors
    /// Keys that exclude each other, or a value out of range.
    pub fn resolve(self) -> error::Result<Recipe> {
        self.check().map_err(|what| Error::Plan(Fault::new(what)))?;
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
            rewrite: self.rewrite.resolve(method),
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

    fn check(&self) -> Result<(), String> {
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

/// A size in bytes with K, M or G: powers of 1000, as in llama.cpp.
///
/// # Errors
/// It is no number, zero, or too large.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1_000),
        Some((at, 'M' | 'm')) => (&text[..at], 1_000_000),
        Some((at, 'G' | 'g')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is not a size such as 500M or 4G"))?;
    number
        .checked_mul(unit)
        .filter(|size| *size > 0)
        .ok_or_else(|| format!("`{text}` is out of range"))
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

#[cfg(test)]
mod tests {
    use super::*;
    use nemoconv_formats::GgmlType;

    fn recipe(yaml: &str) -> Recipe {
        RecipeEntries::of_yaml(yaml).unwrap().resolve().unwrap()
    }

    #[test]
    fn a_recipe_reads_back_as_it_was_written() {
        let yaml = "
phase: 3
rules:
  - {tensor: 'blk\\.[01]\\.''x', type: q6_k}
  - tensor: ssm_out
    type: keep
output-tensor-type: q8_0
token-embedding-type: keep
widen: true
method: imatrix
passes: 1
damp-percent: 0.02
calibration: {context: 256, seed: 7}
rewrite: {rotation: klt}
";
        let first = recipe(yaml);
        assert_eq!(first.aim, Aim::Scheme(Scheme::Phase(Phase::Mixed)));
        assert_eq!(first.rules[0].pattern.as_str(), r"blk\.[01]\.'x");
        assert_eq!(first.rules[1].ty, WantedType::Keep);
        assert_eq!(first.output, Some(GgmlType::Q8_0.into()));
        let sequences = first.samples.max_sequences;
        assert_eq!(
            (first.samples.context_tokens, sequences, first.samples.seed),
            (256, 512, 7)
        );
        assert_eq!(recipe(&first.to_yaml()).to_yaml(), first.to_yaml());
    }

    #[test]
    fn sizes_are_powers_of_1000() {
        let check = |text, expected| assert_eq!(parse_size(text).ok(), expected, "{text}");
        check("500M", Some(500_000_000));
        check("4G", Some(4_000_000_000));
        check("17", Some(17));
        check("0", None);
        check("M", None);
        check("99999999999G", None);
        check("é", None);
    }

    #[test]
    fn every_way_to_aim_is_written() {
        for aim in [
            "phase: 1",
            "outtype: Q4_K_M",
            "outtype: auto",
            "target-bpw: 4.5",
            "target-size: 4000000",
        ] {
            let written = recipe(aim).to_yaml();
            assert!(written.contains(&format!("{aim}\n")), "{written}");
        }
        assert_eq!(recipe("target-size: 4M").aim, Aim::FileBytes(4_000_000));
        assert_eq!(recipe("# nothing").aim, Aim::OwnType);
    }

    #[test]
    fn flags_override_the_file() {
        let entries = |yaml| RecipeEntries::of_yaml(yaml).unwrap();
        let file = "outtype: q8_0\npasses: 1\nrules: [{tensor: a, type: q8_0}]";
        let merged = entries("phase: 2\nrules: [{tensor: b, type: q8_0}]").or(entries(file));
        let recipe = merged.resolve().unwrap();
        assert!(recipe.to_yaml().contains("rotation: auto\n"));
        assert_eq!(recipe.aim, Aim::Scheme(Scheme::Phase(Phase::W4A8)));
        assert_eq!(recipe.rounding.passes, 1);
        let patterns: Vec<_> = recipe
            .rules
            .iter()
            .map(|rule| rule.pattern.as_str())
            .collect();
        assert_eq!(patterns, ["b", "a"]);
    }

    #[test]
    fn errors_name_line_and_key() {
        let check = |yaml: &str, parts: &[&str]| {
            let entries = RecipeEntries::of_yaml(yaml).and_then(|entries| entries.check());
            let error = entries.unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        check("pure: true\noutype: q8_0", &["`outype`", "line 2"]);
        check("phase: 4", &["`phase`", "line 1", "found `4`"]);
        check(
            "\n\nouttype: q9_0",
            &["`outtype`", "line 3", "`q9_0` is not a file type"],
        );
        check(
            "rules:\n  - {tensor: '(', type: q8_0}",
            &["`(` is no regular expression"],
        );
        check(
            "rules:\n  - {tensor: a, type: iq1_s}",
            &["line 2", "IQ1_S cannot be written"],
        );
        check("rules:\n  - {tensor: a}", &["type"]);
        check(
            "phase: 1\nouttype: q8_0",
            &["`phase` and `outtype` exclude each other"],
        );
        check("phase: 1\npure: true", &["`pure` goes with `outtype`"]);
        check(
            "target-correction: 1.5",
            &["`target-correction` is out of range"],
        );
        check("calibration: {context: 2}", &["`context` is out of range"]);
        check("calibration: {text: a}", &["`text`", "line 1"]);
        check("target-size: 4T", &["`target-size`", "not a size"]);
    }
}
