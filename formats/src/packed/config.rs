//! `quantization_config`: which modules are packed, and how.
//!
//! Enters: the JSON of config.json or of the file beside it. Leaves: [`Quantization`], which knows the scheme of every
//! module. Opens no tensor.

pub mod compressed_tensors;
mod gptq;
mod modelopt;

use super::pattern::{Pattern, other_spelling};
use super::scheme::Scheme;
use crate::checkpoint::Checkpoint;
use crate::{Error, Result};
use compressed_tensors::CompressedTensors;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::HashMap;

/// The key in config.json, and the one that early releases of compressed-tensors wrote.
const KEYS: [&str; 2] = ["quantization_config", "compression_config"];

/// Where GPTQ keeps its configuration beside config.json.
const GPTQ_FILE: &str = "quantize_config.json";

/// Where ModelOpt keeps it.
const MODELOPT_FILE: &str = "hf_quant_config.json";

/// Who wrote a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `compressed-tensors`.
    CompressedTensors,
    /// `gptq`, both versions.
    Gptq,
    /// `modelopt`.
    ModelOpt,
    /// `fp8`: weights of F8_E4M3 say by themselves that they are.
    Fp8,
}

impl Method {
    /// As `quant_method` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq => "gptq",
            Self::ModelOpt => "modelopt",
            Self::Fp8 => "fp8",
        }
    }
}

/// Modules that share a scheme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemeGroup {
    /// The group's name in the configuration, or the pattern that makes it one.
    pub name: String,
    /// How its modules are stored.
    pub scheme: Scheme,
}

/// A configuration, its patterns compiled.
#[derive(Debug, Clone)]
pub struct Quantization {
    method: Method,
    groups: Vec<SchemeGroup>,
    rules: Rules,
    ignored: Vec<Pattern>,
}

impl Quantization {
    /// The configuration of a checkpoint; `None` if it has none.
    ///
    /// # Errors
    /// A method that is not known, a value that contradicts its format; with the file.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let in_file = |name: &str, result: Result<Self>| {
            result.map_err(|e| e.in_file(checkpoint.folder().join(name)))
        };
        let config = checkpoint.read_json("config.json")?;
        let of_config = config
            .as_ref()
            .and_then(|config| KEYS.iter().find_map(|key| config.get(key)))
            .filter(|value| !value.is_null());
        // ModelOpt's own file says which layer has which algorithm; config.json may leave that out.
        let has_modelopt_file =
            |value: &Value| is_modelopt(value) || value.get("quant_method").is_none();
        if of_config.is_none_or(has_modelopt_file)
            && let Some(value) = checkpoint.read_json(MODELOPT_FILE)?
        {
            return in_file(MODELOPT_FILE, modelopt::parse(&value)).map(Some);
        }
        if let Some(value) = of_config {
            return in_file("config.json", Self::parse(value)).map(Some);
        }
        let value = checkpoint.read_json(GPTQ_FILE)?;
        value
            .map(|value| in_file(GPTQ_FILE, gptq::parse(&value)))
            .transpose()
    }

    /// Reads a `quantization_config`.
    ///
    /// # Errors
    /// A method that is not known, a value that contradicts its format.
    pub fn parse(value: &Value) -> Result<Self> {
        let method = value.get("quant_method").and_then(Value::as_str);
        match method {
            Some("compressed-tensors") => typed::<CompressedTensors>(value)?.compile(),
            Some("gptq") => gptq::parse(value),
            Some("fp8") => Ok(Self::new(Method::Fp8, Vec::new(), Vec::new(), Vec::new())),
            _ if is_modelopt(value) => modelopt::parse(value),
            Some(other) => Err(Error::unsupported(format!(
                "quant_method is `{other}`; known are `compressed-tensors`, `gptq`, `modelopt` and `fp8`"
            ))
            .in_tensor("quantization_config")
            .hint("convert the checkpoint that this one was made from")),
            None => Err(Error::malformed("has no `quant_method`").in_tensor("quantization_config")),
        }
    }

    /// `targets`: of each group, in the order in which they are asked. `ignored` comes first.
    fn new(
        method: Method,
        groups: Vec<SchemeGroup>,
        targets: Vec<(Pattern, usize)>,
        ignored: Vec<Pattern>,
    ) -> Self {
        Self {
            method,
            groups,
            rules: Rules::new(&ignored, targets),
            ignored,
        }
    }

    /// Who wrote it.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Every scheme, in the configuration's order.
    pub fn groups(&self) -> &[SchemeGroup] {
        &self.groups
    }

    /// Whether the configuration lists what is not quantized; GPTQ leaves that to the tensors that are there.
    pub fn lists_ignored(&self) -> bool {
        matches!(self.method, Method::CompressedTensors | Method::ModelOpt)
    }

    /// Whether the configuration says that `module` is not quantized.
    pub fn ignores(&self, module: &str) -> bool {
        self.ignored.iter().any(|pattern| pattern.matches(module))
    }

    /// The group that `module` is in, a linear spelled as in the checkpoint; `None` if it is not quantized.
    ///
    /// The rules are those of the runtimes: what is ignored first, then names and regexes in the order of the groups, then
    /// the class name.
    pub fn group_of(&self, module: &str) -> Option<&SchemeGroup> {
        self.groups.get(self.rules.first(module)?)
    }

    /// The scheme of `module`; see [`Self::group_of`].
    pub fn scheme_of(&self, module: &str) -> Option<&Scheme> {
        self.group_of(module).map(|group| &group.scheme)
    }
}

/// Patterns in the order in which they are asked, the many exact names by hash.
#[derive(Debug, Clone)]
struct Rules {
    /// Place in the order and group by name.
    exact: HashMap<String, (usize, Option<usize>)>,
    /// Place, pattern and group.
    others: Vec<(usize, Pattern, Option<usize>)>,
}

impl Rules {
    fn new(ignored: &[Pattern], targets: Vec<(Pattern, usize)>) -> Self {
        let ignored = ignored.iter().map(|pattern| (pattern.clone(), None));
        let (named, classes): (Vec<_>, Vec<_>) = targets
            .into_iter()
            .map(|(pattern, group)| (pattern, Some(group)))
            .partition(|(pattern, _)| !matches!(pattern, Pattern::Every));
        let mut rules = Self {
            exact: HashMap::new(),
            others: Vec::new(),
        };
        for (place, (pattern, group)) in ignored.chain(named).chain(classes).enumerate() {
            match pattern {
                Pattern::Exact(name) => {
                    rules.exact.entry(name).or_insert((place, group));
                }
                pattern => rules.others.push((place, pattern, group)),
            }
        }
        rules
    }

    /// The group of the first rule that means `module`.
    fn first(&self, module: &str) -> Option<usize> {
        let other = other_spelling(module);
        let exact = [Some(module), other.as_deref()]
            .into_iter()
            .flatten()
            .filter_map(|name| self.exact.get(name).copied())
            .min();
        let pattern = self
            .others
            .iter()
            .find(|(_, pattern, _)| pattern.matches(module));
        let pattern = pattern.map(|(place, _, group)| (*place, *group));
        [exact, pattern].into_iter().flatten().min()?.1
    }
}

fn is_modelopt(value: &Value) -> bool {
    let method = value.get("quant_method").and_then(Value::as_str);
    method.is_some_and(|method| method.starts_with("modelopt"))
        || (method.is_none() && value.get("quantization").is_some())
}

/// A typed configuration; what does not fit is said with the key where serde_json names one.
fn typed<T: DeserializeOwned>(value: &Value) -> Result<T> {
    T::deserialize(value)
        .map_err(|error| Error::malformed(error.to_string()).in_tensor("quantization_config"))
}

/// An error about one entry of the configuration.
fn in_key(key: impl Into<String>) -> impl FnOnce(Error) -> Error {
    let key = key.into();
    move |error| error.in_tensor(key)
}
