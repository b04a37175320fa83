//! Special token ids, and which of them a prompt gets without being asked.
//!
//! Enters: `tokenizer.json`, tokenizer_config.json, config.json. Leaves: [`SpecialTokens`].
//!
//! Source: llama.cpp `gguf-py/gguf/vocab.py` (`SpecialVocab`), whose reading of post-processors is
//! deliberately literal: equal answers matter more here than better ones.

use nemoconv_formats::{Error, Result};
use serde_json::{Map, Value};

use super::chat_template::ChatTemplates;
use super::files::TokenizerFiles;
use super::tokenizer_json::{AddedTokenEntry, TokenizerJson};

/// A role that one token of the vocabulary plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum SpecialToken {
    Bos,
    Eos,
    Unk,
    Sep,
    Pad,
    Cls,
    Mask,
    /// End of turn: the configured end of text when the template ends with another token.
    Eot,
    /// End of message.
    Eom,
}

use SpecialToken::{Bos, Cls, Eom, Eos, Eot, Mask, Pad, Sep, Unk};

impl SpecialToken {
    /// The role's prefix in `X_token`, `X_token_id` and `add_X_token`.
    pub const fn name(self) -> &'static str {
        match self {
            Bos => "bos",
            Eos => "eos",
            Unk => "unk",
            Sep => "sep",
            Pad => "pad",
            Cls => "cls",
            Mask => "mask",
            Eot => "eot",
            Eom => "eom",
        }
    }
}

/// Special ids and defaults, in the order they were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The id of each role that has one.
    pub ids: Vec<(SpecialToken, u32)>,
    /// Whether a prompt gets the role's token.
    pub add: Vec<(SpecialToken, bool)>,
    /// The normalizer lower-cases.
    pub lowercase: Option<bool>,
    /// The normalizer strips accents.
    pub strip_accents: Option<bool>,
}

/// Reads special tokens and chat templates.
pub(super) fn read(
    json: &TokenizerJson,
    files: &TokenizerFiles,
    config: &Value,
) -> Result<(SpecialTokens, ChatTemplates)> {
    let mut reader = Reader {
        config: files.tokenizer_config.clone().unwrap_or_default(),
        roles: vec![Bos, Eos, Unk, Sep, Pad, Cls, Mask],
        found: SpecialTokens::default(),
    };
    reader.normalizer(&json.normalizer);
    reader.post_processor(&json.post_processor);
    let mut templates = ChatTemplates::default();
    if !reader.config.is_empty() {
        templates = ChatTemplates::of(&reader.config, files)?;
        reader.tokenizer_config(&json.added_tokens);
    }
    reader.model_config(config)?;
    Ok((reader.found, templates))
}

struct Reader {
    /// tokenizer_config.json, completed from the post-processor. Empty if there is none: then
    /// nothing is completed either.
    config: Map<String, Value>,
    roles: Vec<SpecialToken>,
    found: SpecialTokens,
}

/// The special tokens a template is compared with; text, an object, or null.
struct Known {
    bos: Value,
    cls: Value,
    eos: Value,
    sep: Value,
}

impl Reader {
    fn normalizer(&mut self, stage: &Value) {
        match stage.get("type").and_then(Value::as_str) {
            Some("Lowercase") => self.found.lowercase = Some(true),
            Some("StripAccents") => self.found.strip_accents = Some(true),
            Some("BertNormalizer") => {
                let flag = |name| stage.get(name).map(Value::as_bool);
                self.found.lowercase = flag("lowercase").unwrap_or(self.found.lowercase);
                self.found.strip_accents =
                    flag("strip_accents").unwrap_or(self.found.strip_accents);
            }
            Some("Sequence") => {
                for part in array(stage, "normalizers") {
                    self.normalizer(part);
                }
            }
            _ => {}
        }
    }

    fn post_processor(&mut self, processor: &Value) {
        let mut known = Known {
            bos: self.text("bos"),
            cls: self.text("cls"),
            eos: self.text("eos"),
            sep: self.text("sep"),
        };
        if !is_set(&known.bos) && is_set(&known.cls) {
            known.bos = known.cls.clone();
            self.complete("bos", &known.bos);
        }
        if !is_set(&known.eos) && is_set(&known.sep) {
            known.eos = known.sep.clone();
            self.complete("eos", &known.eos);
        }
        let parts = match processor.get("processors").and_then(Value::as_array) {
            Some(parts) => parts.as_slice(),
            None => std::slice::from_ref(processor),
        };
        for part in parts {
            match part.get("type").and_then(Value::as_str) {
                Some("ByteLevel") => {
                    for role in [Bos, Eos] {
                        if self.added(role).is_none() {
                            self.add(role, false);
                        }
                    }
                }
                Some("RobertaProcessing") => self.roberta(part, &mut known),
                Some("TemplateProcessing") => self.template(part, &mut known),
                _ => {}
            }
        }
    }

    fn roberta(&mut self, processor: &Value, known: &mut Known) {
        for role in [Bos, Eos, Sep] {
            self.add(role, true);
        }
        let first = |key| processor.get(key).and_then(|pair| pair.get(0)).cloned();
        if !is_set(&known.cls) && !self.config.is_empty() {
            known.cls = first("cls").unwrap_or_else(|| known.bos.clone());
            self.complete("cls", &known.cls);
        }
        if !is_set(&known.sep) && !self.config.is_empty() {
            known.sep = first("sep").unwrap_or_else(|| known.eos.clone());
            self.complete("sep", &known.sep);
        }
    }

    fn template(&mut self, processor: &Value, known: &mut Known) {
        let (mut first, mut last) = (None, None);
        if let [head, .., tail] = array(processor, "single") {
            first = special_id(head);
            if let Some(first) = first {
                self.template_starts_with(first, known);
            }
            last = special_id(tail);
            if let Some(last) = last {
                self.template_ends_with(last, known);
            }
        }
        let mut pair = array(processor, "pair");
        if let Some((head, rest)) = pair.split_first()
            && first.is_some()
            && special_id(head) == first
        {
            pair = rest;
        }
        // The whole list's last entry: it may be the one that was just taken off.
        if let Some(tail) = array(processor, "pair").last()
            && last.is_some()
            && special_id(tail) == last
        {
            pair = pair.split_last().map_or(&[][..], |(_, rest)| rest);
        }
        self.pair_separator(pair, last, known);
    }

    fn template_starts_with(&mut self, first: &str, known: &mut Known) {
        let first = Value::from(first);
        if self.config.is_empty() {
            known.bos = first.clone();
        } else if first != known.bos && first != known.cls {
            if !is_set(&known.bos) {
                known.bos = first.clone();
                self.complete("bos", &first);
            }
            if !is_set(&known.cls) {
                known.cls = first.clone();
                self.complete("cls", &first);
            }
        }
        self.add(Bos, first == known.bos || first == known.cls);
    }

    fn template_ends_with(&mut self, last: &str, known: &mut Known) {
        let last = Value::from(last);
        if !self.config.is_empty() && last != known.eos {
            if let Some(role) = [Eot, Eom]
                .into_iter()
                .find(|role| !self.roles.contains(role))
            {
                self.roles.push(role);
                self.complete(role.name(), &known.eos);
            }
            self.complete("eos", &last);
        }
        known.eos = last;
        self.add(Eos, true);
    }

    /// `A [sep] [eos] B`: whether sequences are kept apart by a separator.
    fn pair_separator(&mut self, pair: &[Value], last: Option<&str>, known: &Known) {
        let sequence = |piece: &Value| {
            piece
                .pointer("/Sequence/id")
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let [a, middle @ .., b] = pair else { return };
        if sequence(a).as_deref() != Some("A")
            || sequence(b).as_deref() != Some("B")
            || middle.is_empty()
        {
            return;
        }
        let separates = |piece: &Value| {
            special_id(piece)
                .map(Value::from)
                .is_some_and(|id| id == known.sep || id == known.eos)
        };
        let add = middle.first().is_some_and(separates) && last.is_none()
            || middle.len() == 2 && middle.get(1).is_some_and(separates);
        self.add(Sep, add);
        if add && !is_set(&known.sep) {
            self.complete("sep", &known.eos);
        }
    }

    fn tokenizer_config(&mut self, added_tokens: &[AddedTokenEntry]) {
        for role in self.roles.clone() {
            let add = self
                .config
                .get(&format!("add_{}_token", role.name()))
                .and_then(Value::as_bool);
            if let Some(add) = add
                && self.added(role).is_none()
            {
                self.add(role, add);
            }
            let entry = self.text(role.name());
            let Some(text) = entry.as_str().or_else(|| entry.get("content")?.as_str()) else {
                continue;
            };
            if let Some(entry) = added_tokens
                .iter()
                .find(|entry| entry.token.content == text)
            {
                self.set_id(role, entry.id);
            }
        }
    }

    fn model_config(&mut self, config: &Value) -> Result<()> {
        for role in self.roles.clone() {
            let key = format!("{}_token_id", role.name());
            let value = match config.get(&key) {
                None | Some(Value::Null) => {
                    config.get("text_config").and_then(|text| text.get(&key))
                }
                value => value,
            };
            let Some(value) = value.filter(|value| value.is_i64() || value.is_u64()) else {
                continue;
            };
            let id = value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| {
                    Error::malformed(format!("`{key}` must be a token id, found {value}"))
                        .in_file("config.json")
                })?;
            self.set_id(role, id);
        }
        Ok(())
    }

    fn text(&self, role: &str) -> Value {
        self.config
            .get(&format!("{role}_token"))
            .cloned()
            .unwrap_or_default()
    }

    fn complete(&mut self, role: &str, text: &Value) {
        if !self.config.is_empty() {
            self.config.insert(format!("{role}_token"), text.clone());
        }
    }

    fn added(&self, role: SpecialToken) -> Option<bool> {
        self.found
            .add
            .iter()
            .find(|(known, _)| *known == role)
            .map(|(_, add)| *add)
    }

    fn add(&mut self, role: SpecialToken, add: bool) {
        match self.found.add.iter_mut().find(|(known, _)| *known == role) {
            Some(entry) => entry.1 = add,
            None => self.found.add.push((role, add)),
        }
    }

    /// The first id found for a role stays.
    fn set_id(&mut self, role: SpecialToken, id: u32) {
        if !self.found.ids.iter().any(|(known, _)| *known == role) {
            self.found.ids.push((role, id));
        }
    }
}

fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn special_id(piece: &Value) -> Option<&str> {
    piece
        .pointer("/SpecialToken/id")
        .and_then(Value::as_str)
        .filter(|id| !id.is_empty())
}

/// Python's truth: neither missing nor empty.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}
