//! Chat templates: one default, any number of named ones.
//!
//! Enters: `tokenizer_config.json` and the template files beside it. Leaves: [`ChatTemplates`]. Never
//! looks inside a template.

use nemoconv_formats::gguf::{Metadata, Value as GgufValue};
use nemoconv_formats::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

use super::files::TokenizerFiles;

/// Jinja templates, byte for byte as the checkpoint has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTemplates {
    /// The template used when none is named.
    pub default: Option<String>,
    /// (name, template) in the checkpoint's order; names are ASCII letters, digits and `_`.
    pub named: Vec<(String, String)>,
}

/// Named templates; checkpoints in the field have at most three.
const MAX_NAMED: usize = 256;

impl ChatTemplates {
    /// The templates of a checkpoint folder; none without tokenizer_config.json.
    ///
    /// # Errors
    /// More named templates than any checkpoint has.
    pub fn of_folder(files: &TokenizerFiles) -> Result<Self> {
        match &files.tokenizer_config {
            Some(config) => Self::of(config, files),
            None => Ok(Self::default()),
        }
    }

    /// The template of a GGUF file that is used when none is named.
    pub fn of_gguf(metadata: &Metadata) -> Self {
        match metadata.get("tokenizer.chat_template") {
            Some(GgufValue::String(template)) => Self::single(template),
            _ => Self::default(),
        }
    }

    /// `chat_template` of tokenizer_config.json if it has the key (even `null`), else the files.
    pub(super) fn of(config: &Map<String, Value>, files: &TokenizerFiles) -> Result<Self> {
        match config.get("chat_template") {
            Some(value) => {
                Self::of_json(value).map_err(|error| error.in_file("tokenizer_config.json"))
            }
            None => Self::of_files(files),
        }
    }

    fn of_files(files: &TokenizerFiles) -> Result<Self> {
        if let Some(default) = &files.chat_template_jinja {
            let mut templates = Self::single(default);
            for (name, template) in &files.additional_chat_templates {
                templates.add(name, template)?;
            }
            return Ok(templates);
        }
        let json = files
            .chat_template_json
            .as_ref()
            .and_then(|json| json.get("chat_template"));
        Self::of_json(json.unwrap_or(&Value::Null))
            .map_err(|error| error.in_file("chat_template.json"))
    }

    fn of_json(value: &Value) -> Result<Self> {
        match value {
            Value::String(template) => Ok(Self::single(template)),
            Value::Array(choices) => Self::list(choices),
            _ => Ok(Self::default()),
        }
    }

    fn single(template: &str) -> Self {
        Self {
            default: Some(template.to_owned()),
            named: Vec::new(),
        }
    }

    fn list(choices: &[Value]) -> Result<Self> {
        let mut templates = Self::default();
        for choice in choices {
            let text = |key| choice.get(key).and_then(Value::as_str);
            if let (Some(name), Some(template)) = (text("name"), text("template")) {
                templates.add(name, template)?;
            }
        }
        Ok(templates)
    }

    /// The last of equal names wins and keeps the first one's place.
    fn add(&mut self, name: &str, template: &str) -> Result<()> {
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        if name.is_empty() {
            return Ok(());
        }
        if name == "default" {
            self.default = Some(template.to_owned());
            return Ok(());
        }
        if let Some(entry) = self.named.iter_mut().find(|(known, _)| *known == name) {
            entry.1 = template.to_owned();
            return Ok(());
        }
        if self.named.len() == MAX_NAMED {
            let (what, limit) = ("number of named chat templates", MAX_NAMED as u64);
            return Err(Error::new(ErrorKind::Limit {
                what,
                limit,
                found: limit + 1,
            }));
        }
        self.named.push((name, template.to_owned()));
        Ok(())
    }
}
