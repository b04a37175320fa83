//! What a recipe says of packed folders, below the key `packed`.
//!
//! Enters: YAML or flags. Leaves: [`PackedRecipe`], complete and in range.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use regex::Regex;
use serde::{Deserialize, Deserializer, de};

use super::readers::Reader;
use super::scheme::NamedScheme;
use super::{ActivationClip, LinearRule, PackedAim, PackedSettings, SHARD_BYTES};
use crate::error::{Error, Fault, Result};
use crate::plan::recipe::Aim;
use crate::plan::types::Scheme;

/// What a recipe file says, or the flags that mean the same; what is left out has a default.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PackedEntries {
    /// Of linears that no rule names.
    #[serde(deserialize_with = "parsed")]
    pub scheme: Option<NamedScheme>,
    /// Columns per group.
    pub group_size: Option<usize>,
    /// Programs that must load the folder.
    #[serde(deserialize_with = "all_parsed")]
    pub readers: Vec<Reader>,
    /// What the largest code of inputs with a fixed scale stands for.
    #[serde(deserialize_with = "parsed")]
    pub activation_clip: Option<ActivationClip>,
    /// Schemes by module.
    pub linears: Vec<LinearRule>,
}

impl PackedEntries {
    /// These, and `file` where these say nothing.
    pub fn or(self, file: Self) -> Self {
        Self {
            scheme: self.scheme.or(file.scheme),
            group_size: self.group_size.or(file.group_size),
            readers: match self.readers.is_empty() {
                true => file.readers,
                false => self.readers,
            },
            activation_clip: self.activation_clip.or(file.activation_clip),
            linears: self.linears.into_iter().chain(file.linears).collect(),
        }
    }

    /// Fills in what was left out.
    pub fn resolve(self) -> PackedRecipe {
        PackedRecipe {
            scheme: self.scheme,
            group_size: self.group_size,
            readers: match self.readers.is_empty() {
                true => Reader::ALL.to_vec(),
                false => self.readers,
            },
            activation_clip: self.activation_clip.unwrap_or_default(),
            linears: self.linears,
        }
    }
}

/// What decides a packed folder beside what decides every artifact.
#[derive(Debug, Clone)]
pub struct PackedRecipe {
    /// Of linears that no rule names; `None`: by the phase.
    pub scheme: Option<NamedScheme>,
    /// Columns per group; `None`: the largest that fits.
    pub group_size: Option<usize>,
    /// Programs that must load the folder.
    pub readers: Vec<Reader>,
    /// What the largest code of inputs with a fixed scale stands for.
    pub activation_clip: ActivationClip,
    /// Schemes by module; the first match wins.
    pub linears: Vec<LinearRule>,
}

impl PackedRecipe {
    /// Settings of a plan; `aim` is what the recipe says of GGUF files, of which a phase means the same here.
    ///
    /// # Errors
    /// The recipe decides GGUF types alone.
    pub fn settings(&self, aim: Aim) -> Result<PackedSettings> {
        let aim = match (self.scheme, aim) {
            (Some(scheme), _) => PackedAim::Scheme(scheme),
            (None, Aim::Scheme(Scheme::Phase(phase))) => PackedAim::Phase(phase),
            (None, Aim::OwnType) => PackedAim::Scheme(NamedScheme::W4A16),
            (None, _) => {
                let what = "the recipe decides the types of a GGUF file, not the scheme of a packed folder";
                return Err(Error::Plan(Fault::new(what).hint(
                    "add `--scheme NAME` or `--phase N`, or `packed: {scheme: NAME}` to the recipe",
                )));
            }
        };
        Ok(PackedSettings {
            aim,
            rules: self.linears.clone(),
            group_size: self.group_size,
            readers: self.readers.clone(),
            shard_bytes: SHARD_BYTES,
            is_rewritten: false,
        })
    }

    /// Its part of a recipe as YAML.
    pub fn push_yaml(&self, yaml: &mut String) {
        yaml.push_str("packed:\n");
        let mut line = |key: &str, value: &dyn fmt::Display| {
            // A string takes whatever is written to it.
            let _ = writeln!(yaml, "  {key}: {value}");
        };
        self.scheme.iter().for_each(|scheme| line("scheme", scheme));
        self.group_size
            .iter()
            .for_each(|size| line("group-size", size));
        let readers: Vec<&str> = self.readers.iter().map(|reader| reader.name()).collect();
        line("readers", &format!("[{}]", readers.join(", ")));
        line("activation-clip", &self.activation_clip.name());
        if !self.linears.is_empty() {
            yaml.push_str("  linears:\n");
        }
        for rule in &self.linears {
            // What JSON quotes, YAML reads.
            let pattern = serde_json::Value::from(rule.pattern.as_str());
            let scheme = rule.scheme.map_or("keep", NamedScheme::name);
            yaml.push_str(&format!("    - {{linear: {pattern}, scheme: {scheme}}}\n"));
        }
    }
}

/// `REGEX=SCHEME` or `REGEX=keep`.
impl FromStr for LinearRule {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (pattern, scheme) = text.rsplit_once('=').ok_or("expected REGEX=SCHEME")?;
        Self::new(pattern, scheme)
    }
}

impl LinearRule {
    fn new(pattern: &str, scheme: &str) -> std::result::Result<Self, String> {
        let pattern = Regex::new(pattern).map_err(|error| error.to_string())?;
        let scheme = match scheme {
            "keep" => None,
            name => Some(name.parse()?),
        };
        Ok(Self { pattern, scheme })
    }
}

impl<'de> Deserialize<'de> for LinearRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Entry {
            linear: String,
            scheme: String,
        }
        let entry = Entry::deserialize(deserializer)?;
        Self::new(&entry.linear, &entry.scheme).map_err(de::Error::custom)
    }
}

fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    deserializer: D,
) -> std::result::Result<Option<T>, D::Error> {
    let text: Option<String> = Deserialize::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(de::Error::custom))
        .transpose()
}

fn all_parsed<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    deserializer: D,
) -> std::result::Result<Vec<T>, D::Error> {
    let texts: Vec<String> = Deserialize::deserialize(deserializer)?;
    texts
        .iter()
        .map(|text| text.parse().map_err(de::Error::custom))
        .collect()
}
