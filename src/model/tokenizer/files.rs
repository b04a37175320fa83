//! The tokenizer's files in a checkpoint folder, as bytes and JSON.
//!
//! Enters: a folder. Leaves: [`TokenizerFiles`]. Interprets nothing.

use std::io;
use std::path::Path;

use nemoconv_formats::checkpoint::config_json;
use nemoconv_formats::{Error, Result};
use serde_json::{Map, Value};

use crate::model::text_file::{read_file, read_text};

/// Contents of the files that describe a tokenizer; what a folder lacks is `None` or empty.
#[derive(Debug, Clone, Default)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Map<String, Value>>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Map<String, Value>>,
    /// `added_tokens.json`.
    pub added_tokens: Option<Map<String, Value>>,
    /// `merges.txt`, read only when `tokenizer.json` has no merges.
    pub merges_txt: Option<String>,
    /// `chat_template.jinja`.
    pub chat_template_jinja: Option<String>,
    /// `additional_chat_templates/NAME.jinja`, as (NAME, text), by name.
    pub additional_chat_templates: Vec<(String, String)>,
    /// `chat_template.json`.
    pub chat_template_json: Option<Map<String, Value>>,
}

impl TokenizerFiles {
    /// Reads whatever of these files `folder` has.
    ///
    /// # Errors
    /// No `tokenizer.json`, a file that cannot be read or is too large, text that is not UTF-8, JSON
    /// that is not an object.
    pub fn read(folder: &Path) -> Result<Self> {
        let tokenizer_json =
            read_file(&folder.join("tokenizer.json"))?.ok_or_else(|| missing_tokenizer(folder))?;
        Ok(Self {
            tokenizer_json,
            tokenizer_config: read_object(&folder.join("tokenizer_config.json"))?,
            special_tokens_map: read_object(&folder.join("special_tokens_map.json"))?,
            added_tokens: read_object(&folder.join("added_tokens.json"))?,
            merges_txt: read_text(&folder.join("merges.txt"))?,
            chat_template_jinja: read_text(&folder.join("chat_template.jinja"))?,
            additional_chat_templates: read_templates(&folder.join("additional_chat_templates"))?,
            chat_template_json: read_object(&folder.join("chat_template.json"))?,
        })
    }

    /// tokenizer_config.json asks that special tokens in a text be taken apart.
    pub(super) fn splits_special_tokens(&self) -> bool {
        let config = self.tokenizer_config.as_ref();
        config
            .and_then(|config| config.get("split_special_tokens")?.as_bool())
            .unwrap_or(false)
    }

    /// The merges of `merges.txt`: lines of two words after an optional `#` header.
    pub(super) fn merges_txt(&self) -> Vec<String> {
        let text = self.merges_txt.as_deref().unwrap_or_default();
        let header = usize::from(
            text.lines()
                .next()
                .is_some_and(|line| line.trim().starts_with('#')),
        );
        text.lines()
            .skip(header)
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                match (words.next(), words.next(), words.next()) {
                    (Some(left), Some(right), None) => Some(format!("{left} {right}")),
                    _ => None,
                }
            })
            .collect()
    }
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(text) = read_text(path)? else {
        return Ok(None);
    };
    match config_json::parse(&text) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(Error::malformed("expected a JSON object").in_file(path)),
        Err(error) => Err(error.in_file(path)),
    }
}

fn read_templates(folder: &Path) -> Result<Vec<(String, String)>> {
    let Ok(entries) = folder.read_dir() else {
        return Ok(Vec::new());
    };
    let mut templates = Vec::new();
    for entry in entries.filter_map(io::Result::ok) {
        let path = entry.path();
        if path
            .extension()
            .is_none_or(|extension| extension != "jinja")
        {
            continue;
        }
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if let Some(text) = read_text(&path)? {
            templates.push((name, text));
        }
    }
    templates.sort();
    Ok(templates)
}

fn missing_tokenizer(folder: &Path) -> Error {
    let other = ["tokenizer.model", "vocab.json"]
        .into_iter()
        .find(|name| folder.join(name).is_file());
    let what = match other {
        Some(other) => format!("there is no tokenizer.json, only `{other}`"),
        None => "there is no tokenizer.json".to_owned(),
    };
    Error::missing(what).in_file(folder).hint(
        "save the tokenizer with transformers (`AutoTokenizer.from_pretrained(...).save_pretrained(...)`), \
         which writes tokenizer.json",
    )
}
