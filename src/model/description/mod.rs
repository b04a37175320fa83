//! Who made a model, what it is called, and how it wants to be sampled.
//!
//! Enters: the model card, generation_config.json, config.json and the model's name. Leaves:
//! [`ModelDescription`]. Knows nothing of GGUF keys.

mod card;
mod model_id;
mod parameter_counts;

use std::path::Path;
use std::sync::LazyLock;

use nemoconv_formats::checkpoint::config_json;
use nemoconv_formats::{Error, Result};
use regex::Regex;
use serde_json::{Map, Value};

use super::text_file::{read_file, read_text};
use card::Node;
use model_id::{ModelId, title};
pub use parameter_counts::ParameterCounts;

/// What is known about a model besides its weights. Empty texts are known to be empty: they stop
/// further guesses, but are not written.
///
/// Source: llama.cpp `gguf-py/gguf/metadata.py` (`Metadata`), whose fields these are.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs, reason = "the names are the keys")]
pub struct ModelDescription {
    pub sampling: Sampling,
    pub name: Option<String>,
    pub author: Option<String>,
    pub version: Option<String>,
    pub organization: Option<String>,
    pub finetune: Option<String>,
    pub basename: Option<String>,
    pub description: Option<String>,
    pub quantized_by: Option<String>,
    pub size_label: Option<String>,
    pub license: Option<String>,
    pub license_name: Option<String>,
    pub license_link: Option<String>,
    pub url: Option<String>,
    pub doi: Option<String>,
    pub uuid: Option<String>,
    pub repo_url: Option<String>,
    pub source_url: Option<String>,
    pub source_doi: Option<String>,
    pub source_uuid: Option<String>,
    pub source_repo_url: Option<String>,
    pub base_models: Option<Vec<Origin>>,
    pub datasets: Option<Vec<Origin>>,
    pub tags: Vec<String>,
    pub languages: Vec<String>,
}

/// Recommended sampler settings.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs, reason = "the names are the keys")]
pub struct Sampling {
    pub sequence: Option<String>,
    pub top_k: Option<i32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub xtc_probability: Option<f32>,
    pub xtc_threshold: Option<f32>,
    pub temp: Option<f32>,
    pub penalty_last_n: Option<i32>,
    pub penalty_repeat: Option<f32>,
    pub mirostat: Option<i32>,
    pub mirostat_tau: Option<f32>,
    pub mirostat_eta: Option<f32>,
}

/// A base model or a data set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the keys")]
pub struct Origin {
    pub name: Option<String>,
    pub author: Option<String>,
    pub version: Option<String>,
    pub organization: Option<String>,
    pub description: Option<String>,
    pub url: Option<String>,
    pub doi: Option<String>,
    pub uuid: Option<String>,
    pub repo_url: Option<String>,
}

/// Where a description is read from.
#[derive(Debug, Clone, Copy)]
pub struct DescriptionSources<'a> {
    /// The checkpoint folder, for README.md and generation_config.json.
    pub folder: &'a Path,
    /// What the model is called if nothing else says: the folder's name, or `org/name` of a hub cache.
    pub model_id: &'a str,
    /// config.json.
    pub config: &'a Value,
    /// The user's `general.*` values, which win over everything but `model_name`.
    pub overrides: Option<&'a Map<String, Value>>,
    /// The user's name for the model.
    pub model_name: Option<&'a str>,
    /// Parameters of the tensors that will be written.
    pub counts: ParameterCounts,
}

/// Longest README.md that is read; the longest cards in the field are near 1 MB.
const MAX_CARD_BYTES: usize = 16 << 20;

impl ModelDescription {
    /// Reads the folder's files.
    ///
    /// # Errors
    /// A file that cannot be read, and everything [`ModelDescription::parse`] refuses.
    pub fn read(sources: &DescriptionSources) -> Result<Self> {
        let readme = read_text(&sources.folder.join("README.md"))?;
        let generation_config = read_file(&sources.folder.join("generation_config.json"))?;
        Self::parse(sources, readme.as_deref(), generation_config.as_deref())
    }

    /// As [`ModelDescription::read`], from the contents of README.md and generation_config.json.
    ///
    /// # Errors
    /// Front matter that is not YAML, values of the wrong type. A generation_config.json that is not
    /// JSON is ignored, as the stock converter does.
    pub fn parse(
        sources: &DescriptionSources,
        readme: Option<&str>,
        generation_config: Option<&[u8]>,
    ) -> Result<Self> {
        let total = sources.counts.total;
        let mut this = Self::default();
        this.read_card(readme.unwrap_or_default(), total)
            .map_err(|error| error.in_file("README.md"))?;
        let name_or_path = sources.config.get("_name_or_path").and_then(Value::as_str);
        // More slashes make it somebody's path.
        if let Some(id) = name_or_path.filter(|id| id.matches('/').count() <= 1) {
            this.guess_from(id, total);
        }
        this.guess_from(sources.model_id, total);
        this.sampling = Sampling::parse(generation_config, sources.overrides)?;
        if let Some(overrides) = sources.overrides {
            this.override_with(overrides)?;
        }
        if let Some(name) = sources.model_name {
            this.name = Some(name.to_owned());
        }
        this.name.get_or_insert_with(|| sources.model_id.to_owned());
        if this.size_label.is_none() && total > 0 {
            this.size_label = Some(sources.counts.size_label());
        }
        Ok(this)
    }

    /// The default file name without its extension: `Base-8B-Instruct-v1-Q4_K_M`.
    ///
    /// Source: llama.cpp `gguf-py/gguf/utility.py` (`naming_convention`).
    pub fn file_stem(&self, output_type: &str) -> String {
        let spaceless = |text: &String| text.trim().replace(' ', "-");
        let name = self.basename.as_ref().or(self.name.as_ref());
        let name = name.map_or_else(
            || "ggml-model".to_owned(),
            |name| spaceless(name).replace('/', "-"),
        );
        let rest = [
            self.size_label.clone(),
            self.finetune.as_ref().map(spaceless),
            self.version.as_ref().map(spaceless),
            Some(output_type.to_uppercase()),
        ];
        rest.into_iter()
            .flatten()
            .fold(name, |name, part| format!("{name}-{part}"))
    }

    fn read_card(&mut self, readme: &str, total: u64) -> Result<()> {
        if readme.len() > MAX_CARD_BYTES {
            return Err(Error::malformed(format!(
                "the model card may have {MAX_CARD_BYTES} bytes, found {}",
                readme.len()
            )));
        }
        let card = Node::front_matter(readme)?;
        for (field, keys) in CARD_KEYS {
            *field(self) = first_text(&card, keys)?;
        }
        self.license = match card.get("license") {
            Some(Node::List(licenses)) => Some(texts(licenses, "license")?.join(",")),
            _ => first_text(&card, &["license"])?,
        };
        self.base_models = origins(
            &card,
            &["base_model", "base_models", "base_model_sources"],
            total,
        )?;
        self.datasets = origins(&card, &["datasets", "dataset", "dataset_sources"], total)?;
        for (list, keys) in [
            (&mut self.tags, ["tags", "pipeline_tag"]),
            (&mut self.languages, ["languages", "language"]),
        ] {
            for key in keys {
                list.extend(texts(card.get(key).map_or(&[], Node::items), key)?);
            }
        }
        Ok(())
    }

    /// Fills what is still unknown from a model's name.
    fn guess_from(&mut self, id: &str, total: u64) {
        let id = ModelId::parse(id, total);
        let fill = |field: &mut Option<String>, guess: Option<String>| {
            if field.is_none() {
                *field = guess;
            }
        };
        fill(&mut self.name, Some(title(&id.name)));
        fill(
            &mut self.organization,
            id.organization.as_deref().map(title),
        );
        fill(&mut self.basename, id.basename);
        fill(&mut self.finetune, id.finetune);
        fill(&mut self.version, id.version);
        fill(&mut self.size_label, id.size_label);
    }

    fn override_with(&mut self, overrides: &Map<String, Value>) -> Result<()> {
        let overrides = Node::of_json(&Value::Object(overrides.clone()));
        for (key, field) in OVERRIDES {
            if overrides.get(key).is_some() {
                *field(self) = first_text(&overrides, &[key])?;
            }
        }
        if overrides.get("general.base_models").is_some() {
            self.base_models = origins(&overrides, &["general.base_models"], 0)?;
        }
        if overrides.get("general.datasets").is_some() {
            self.datasets = origins(&overrides, &["general.datasets"], 0)?;
        }
        for (key, list) in [
            ("general.tags", &mut self.tags),
            ("general.languages", &mut self.languages),
        ] {
            if let Some(node) = overrides.get(key) {
                *list = texts(node.items(), key)?;
            }
        }
        Ok(())
    }
}

type Field = fn(&mut ModelDescription) -> &mut Option<String>;

/// Fields and the keys of a model card that may hold them, first wins.
const CARD_KEYS: [(Field, &[&str]); 14] = [
    (|d| &mut d.name, &["name", "model_name"]),
    (
        |d| &mut d.author,
        &["author", "model_author", "model_creator"],
    ),
    (|d| &mut d.version, &["version", "model_version"]),
    (
        |d| &mut d.organization,
        &["organization", "model_organization"],
    ),
    (
        |d| &mut d.description,
        &["description", "model_description"],
    ),
    (|d| &mut d.finetune, &["finetune", "model_finetune"]),
    (
        |d| &mut d.basename,
        &["basename", "model_basename", "model_type"],
    ),
    (|d| &mut d.size_label, &["size_label", "model_size_label"]),
    (|d| &mut d.source_url, &["url", "model_url"]),
    (|d| &mut d.source_doi, &["doi", "model_doi"]),
    (|d| &mut d.source_uuid, &["uuid", "model_uuid"]),
    (|d| &mut d.source_repo_url, &["repo_url", "model_repo_url"]),
    (|d| &mut d.license_name, &["license_name"]),
    (|d| &mut d.license_link, &["license_link"]),
];

/// Keys a user may override with a text.
const OVERRIDES: [(&str, Field); 19] = [
    ("general.name", |d| &mut d.name),
    ("general.author", |d| &mut d.author),
    ("general.version", |d| &mut d.version),
    ("general.organization", |d| &mut d.organization),
    ("general.finetune", |d| &mut d.finetune),
    ("general.basename", |d| &mut d.basename),
    ("general.description", |d| &mut d.description),
    ("general.quantized_by", |d| &mut d.quantized_by),
    ("general.size_label", |d| &mut d.size_label),
    ("general.license.name", |d| &mut d.license_name),
    ("general.license.link", |d| &mut d.license_link),
    ("general.url", |d| &mut d.url),
    ("general.doi", |d| &mut d.doi),
    ("general.uuid", |d| &mut d.uuid),
    ("general.repo_url", |d| &mut d.repo_url),
    ("general.source.url", |d| &mut d.source_url),
    ("general.source.doi", |d| &mut d.source_doi),
    ("general.source.uuid", |d| &mut d.source_uuid),
    ("general.source.repo_url", |d| &mut d.source_repo_url),
];

impl Sampling {
    fn parse(
        generation_config: Option<&[u8]>,
        overrides: Option<&Map<String, Value>>,
    ) -> Result<Self> {
        let config = generation_config
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .and_then(|text| config_json::parse(text).ok());
        let fields = SamplerFields {
            config: config.unwrap_or_default(),
            overrides,
        };
        Ok(Self {
            sequence: fields.text("sequence", &["sequence"])?,
            top_k: fields.int("top_k", &["top_k"])?,
            top_p: fields.float("top_p", &["top_p"])?,
            min_p: fields.float("min_p", &["min_p"])?,
            xtc_probability: fields.float("xtc_probability", &["xtc_probability"])?,
            xtc_threshold: fields.float("xtc_threshold", &["xtc_threshold"])?,
            temp: fields.float("temp", &["temperature"])?,
            penalty_last_n: fields.int("penalty_last_n", &["penalty_last_n"])?,
            penalty_repeat: fields
                .float("penalty_repeat", &["penalty_repeat", "repetition_penalty"])?,
            mirostat: fields.int("mirostat", &["mirostat"])?,
            mirostat_tau: fields.float("mirostat_tau", &["mirostat_tau"])?,
            mirostat_eta: fields.float("mirostat_eta", &["mirostat_eta"])?,
        })
    }
}

/// Typed look-ups: the user's value, else generation_config.json's. Null is the same as missing.
struct SamplerFields<'a> {
    config: Value,
    overrides: Option<&'a Map<String, Value>>,
}

impl SamplerFields<'_> {
    fn field<T>(
        &self,
        name: &str,
        keys: &[&str],
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let key = format!("general.sampling.{name}");
        let given = self.overrides.and_then(|overrides| overrides.get(&key));
        let Some(value) = given.or_else(|| keys.iter().find_map(|key| self.config.get(*key)))
        else {
            return Ok(None);
        };
        if value.is_null() {
            return Ok(None);
        }
        read(value).map(Some).ok_or_else(|| {
            let place = if given.is_some() {
                "the metadata overrides"
            } else {
                "generation_config.json"
            };
            Error::malformed(format!("`{name}` must be {expected}, found {value}")).in_file(place)
        })
    }

    fn text(&self, name: &str, keys: &[&str]) -> Result<Option<String>> {
        self.field(name, keys, "a text", |value| {
            value.as_str().map(str::to_owned)
        })
    }

    fn int(&self, name: &str, keys: &[&str]) -> Result<Option<i32>> {
        self.field(name, keys, "a 32-bit integer", |value| {
            value.as_i64()?.try_into().ok()
        })
    }

    fn float(&self, name: &str, keys: &[&str]) -> Result<Option<f32>> {
        self.field(name, keys, "a number", |value| {
            Some(value.as_f64()? as f32).filter(|value| value.is_finite())
        })
    }
}

/// The first of `keys` that is there and not null.
fn first_text(node: &Node, keys: &[&str]) -> Result<Option<String>> {
    for key in keys {
        let Some(value) = node.get(key) else { continue };
        match value.written() {
            Ok(None) => {}
            Ok(text) => return Ok(text),
            Err(found) => {
                return Err(Error::malformed(format!(
                    "`{key}` must be a text, found {found}"
                )));
            }
        }
    }
    Ok(None)
}

fn texts(items: &[Node], key: &str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for item in items {
        match item {
            Node::Null => {}
            Node::Scalar { text, .. } => texts.push(text.clone()),
            _ => return Err(Error::malformed(format!("`{key}` must be a list of texts"))),
        }
    }
    Ok(texts)
}

/// Base models or data sets: the first of `keys` that is there, whatever it holds.
fn origins(node: &Node, keys: &[&str], total: u64) -> Result<Option<Vec<Origin>>> {
    let Some(value) = keys.iter().find_map(|key| node.get(key)) else {
        return Ok(None);
    };
    value
        .items()
        .iter()
        .map(|item| Origin::of(item, total))
        .collect::<Result<_>>()
        .map(Some)
}

static HUB_URL: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^https?://huggingface.co/([^/]+/[^/]+)$").expect("a constant pattern")
});

impl Origin {
    fn of(item: &Node, total: u64) -> Result<Self> {
        if let Some(text) = item.as_text() {
            return Ok(Self::of_id(text, total));
        }
        let field = |key| first_text(item, &[key]);
        Ok(Self {
            name: field("name")?,
            author: field("author")?,
            version: field("version")?,
            organization: field("organization")?,
            description: field("description")?,
            url: field("url")?,
            doi: field("doi")?,
            uuid: field("uuid")?,
            repo_url: field("repo_url")?,
        })
    }

    /// A hub id, or a URL that may contain one.
    fn of_id(text: &str, total: u64) -> Self {
        let is_url = ["http://", "https://", "ssh://"]
            .iter()
            .any(|scheme| text.starts_with(scheme));
        if !is_url {
            let id = ModelId::parse(text, total);
            let organization = id.organization.as_ref();
            let repo_url =
                organization.map(|org| format!("https://huggingface.co/{org}/{}", id.name));
            return Self {
                repo_url,
                ..Self::named(id)
            };
        }
        let id = HUB_URL.captures(text).and_then(|found| found.get(1));
        let named = id.map_or_else(Self::default, |id| {
            Self::named(ModelId::parse(id.as_str(), total))
        });
        Self {
            repo_url: Some(text.to_owned()),
            ..named
        }
    }

    fn named(id: ModelId) -> Self {
        Self {
            name: Some(title(&id.name)),
            organization: id.organization.as_deref().map(title),
            version: id.version,
            ..Self::default()
        }
    }
}
