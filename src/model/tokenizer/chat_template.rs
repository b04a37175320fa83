//! Chat templates: one default, any number of named ones.
//!
//! Enters: `tokenizer_config.json` and the template files beside it. Leaves: [`ChatTemplates`]. Never
//! looks inside a template.

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

impl ChatTemplates {
    /// `chat_template` of tokenizer_config.json if it has the key (even `null`), else the files.
    pub(super) fn of(config: &Map<String, Value>, files: &TokenizerFiles) -> Self {
        match config.get("chat_template") {
            Some(Value::String(template)) => Self::single(template),
            Some(Value::Array(choices)) => Self::list(choices),
            Some(_) => Self::default(),
            None => Self::of_files(files),
        }
    }

    fn of_files(files: &TokenizerFiles) -> Self {
        let Some(default) = &files.chat_template_jinja else {
            return match files
                .chat_template_json
                .as_ref()
                .and_then(|json| json.get("chat_template"))
            {
                Some(Value::String(template)) => Self::single(template),
                Some(Value::Array(choices)) => Self::list(choices),
                _ => Self::default(),
            };
        };
        let mut templates = Self::single(default);
        for (name, template) in &files.additional_chat_templates {
            templates.add(name, template);
        }
        templates
    }

    fn single(template: &str) -> Self {
        Self {
            default: Some(template.to_owned()),
            named: Vec::new(),
        }
    }

    fn list(choices: &[Value]) -> Self {
        let mut templates = Self::default();
        for choice in choices {
            let text = |key| choice.get(key).and_then(Value::as_str);
            if let (Some(name), Some(template)) = (text("name"), text("template")) {
                templates.add(name, template);
            }
        }
        templates
    }

    /// The last of equal names wins and keeps the first one's place.
    fn add(&mut self, name: &str, template: &str) {
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        if name.is_empty() {
            return;
        }
        if name == "default" {
            self.default = Some(template.to_owned());
            return;
        }
        match self.named.iter_mut().find(|(known, _)| *known == name) {
            Some(entry) => entry.1 = template.to_owned(),
            None => self.named.push((name, template.to_owned())),
        }
    }
}
