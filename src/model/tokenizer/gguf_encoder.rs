//! The encoder that a runtime builds from a GGUF file's keys.
//!
//! Enters: metadata, unchecked. Leaves: an encoder with the ids of llama.cpp. Reads no other file.
//!
//! Departs from the runtime where special tokens overlap in a text: the leftmost wins here, there the longest.

use std::collections::HashMap;

use nemoconv_formats::gguf::{Array, Metadata, Value};
use nemoconv_formats::{Error, Result};
use serde_json::json;
use tokenizers::AddedToken;

use super::backend::Backend;
use super::encoder::TextEncoder;
use super::runtime_splits::RuntimeSplits;
use super::tokenizer_json::{AddedTokenEntry, BpeModel, Merge, TokenizerJson};

/// What control tokens are when a text spells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlTokens {
    /// Tokens, as in a prompt that a chat template laid out.
    AreTokens,
    /// Text like any other, as in a message of a user.
    AreText,
}

/// The encoder of a GGUF file.
///
/// # Errors
/// Keys that are missing or of a wrong type, a tokenizer that is not byte-level BPE, a pre-tokenizer nobody knows,
/// merges of unknown tokens, special ids outside the vocabulary; each names the key.
///
/// Source: llama.cpp b11434, `src/llama-vocab.cpp`.
pub fn from_gguf(
    metadata: &Metadata,
    control_tokens: ControlTokens,
) -> Result<tokenizers::Tokenizer> {
    let keys = Keys { metadata };
    let model = keys.text("tokenizer.ggml.model")?;
    if model != "gpt2" {
        let what = format!("expected `gpt2` (byte-level BPE), found `{model}`");
        return Err(Error::unsupported(what).in_tensor("tokenizer.ggml.model"));
    }
    let splits = keys.splits()?;
    let tokens = keys.texts("tokenizer.ggml.tokens")?;
    let json = TokenizerJson {
        model: bpe_model(&keys, tokens, splits)?,
        added_tokens: keys.added_tokens(tokens)?,
        normalizer: serde_json::Value::Null,
        pre_tokenizer: pre_tokenizer(splits.patterns),
        post_processor: keys.post_processor(tokens, splits)?,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
    };
    let mut backend = Backend::new(json, &[])?;
    backend.split_special_tokens(control_tokens == ControlTokens::AreText);
    Ok(backend.into_encoder())
}

impl TextEncoder {
    /// From the keys of a GGUF file; control tokens in a text are tokens.
    ///
    /// # Errors
    /// As [`from_gguf`].
    pub fn of_gguf(metadata: &Metadata) -> Result<Self> {
        let keys = Keys { metadata };
        let encoder = from_gguf(metadata, ControlTokens::AreTokens)?;
        let tokens = keys.texts("tokenizer.ggml.tokens")?;
        let named = |role: &str| -> Result<Option<String>> {
            let id = keys.token_id(role, tokens)?;
            Ok(id.map(|id| tokens[id].clone()))
        };
        Ok(Self::new(
            encoder,
            named("bos")?,
            named("eos")?,
            named("padding")?,
        ))
    }
}

fn bpe_model(keys: &Keys, tokens: &[String], splits: RuntimeSplits) -> Result<BpeModel> {
    let mut vocab = HashMap::with_capacity(tokens.len());
    for (id, text) in tokens.iter().enumerate() {
        let id = u32::try_from(id)
            .map_err(|_| Error::malformed("more than 2^32 tokens").in_tensor(TOKENS))?;
        vocab.insert(text.clone(), id);
    }
    let mut merges = Vec::new();
    for (rank, text) in keys.texts("tokenizer.ggml.merges")?.iter().enumerate() {
        let merge = merge(text, &vocab).map_err(|what| {
            Error::malformed(format!("merge {rank} ({text:?}) {what}"))
                .in_tensor("tokenizer.ggml.merges")
        })?;
        merges.push(merge);
    }
    Ok(BpeModel {
        vocab,
        merges,
        unk_token: None,
        continuing_subword_prefix: None,
        end_of_word_suffix: None,
        fuse_unk: None,
        byte_fallback: None,
        ignore_merges: Some(splits.ignore_merges),
    })
}

/// `left right`; the parts may not be empty, and a space inside them is another character.
fn merge(text: &str, vocab: &HashMap<String, u32>) -> std::result::Result<Merge, String> {
    let (left, right) = text
        .split_once(' ')
        .filter(|(left, right)| !left.is_empty() && !right.is_empty())
        .ok_or("is not two tokens")?;
    for token in [left, right, &format!("{left}{right}")] {
        if !vocab.contains_key(token) {
            return Err(format!("needs the token {token:?}"));
        }
    }
    Ok(Merge {
        left: left.to_owned(),
        right: right.to_owned(),
    })
}

fn pre_tokenizer(patterns: &[&str]) -> serde_json::Value {
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let parts: Vec<_> = patterns.iter().map(split).chain([bytes]).collect();
    json!({"type": "Sequence", "pretokenizers": parts})
}

const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";

struct Keys<'a> {
    metadata: &'a Metadata,
}

impl<'a> Keys<'a> {
    fn text(&self, key: &str) -> Result<&'a str> {
        match self.metadata.get(key) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(Error::malformed("must be a string").in_tensor(key)),
            None => Err(Error::missing("key is missing").in_tensor(key)),
        }
    }

    fn texts(&self, key: &str) -> Result<&'a [String]> {
        match self.metadata.get(key) {
            Some(Value::Array(Array::String(texts))) => Ok(texts),
            Some(_) => Err(Error::malformed("must be an array of strings").in_tensor(key)),
            None => Err(Error::missing("key is missing").in_tensor(key)),
        }
    }

    /// The rules of `tokenizer.ggml.pre`, whose absence means `default`.
    fn splits(&self) -> Result<RuntimeSplits> {
        const KEY: &str = "tokenizer.ggml.pre";
        let name = match self.metadata.get(KEY) {
            None => "default",
            Some(_) => self.text(KEY)?,
        };
        RuntimeSplits::of(name).ok_or_else(|| {
            Error::unsupported(format!("pre-tokenizer `{name}` is not known"))
                .in_tensor(KEY)
                .hint("Nemotron-H files carry `pixtral`, `llama-bpe` or `tekken`")
        })
    }

    /// Control and user-defined tokens, which text is searched for before it is split.
    fn added_tokens(&self, tokens: &[String]) -> Result<Vec<AddedTokenEntry>> {
        let types = match self.metadata.get(TOKEN_TYPES) {
            None => return Ok(Vec::new()),
            Some(Value::Array(Array::I32(types))) if types.len() == tokens.len() => types,
            Some(Value::Array(Array::I32(types))) => {
                let what = format!("{} types for {} tokens", types.len(), tokens.len());
                return Err(Error::malformed(what).in_tensor(TOKEN_TYPES));
            }
            Some(_) => {
                return Err(Error::malformed("must be an array of i32").in_tensor(TOKEN_TYPES));
            }
        };
        const UNKNOWN: i32 = 2;
        const CONTROL: i32 = 3;
        const USER_DEFINED: i32 = 4;
        let typed = (0u32..).zip(tokens.iter().zip(types));
        Ok(typed
            .filter(|(_, (text, ty))| {
                matches!(**ty, UNKNOWN | CONTROL | USER_DEFINED) && !text.is_empty()
            })
            .map(|(id, (text, ty))| AddedTokenEntry {
                id,
                token: AddedToken::from(text.clone(), *ty != USER_DEFINED).normalized(false),
            })
            .collect())
    }

    /// The index of a special token.
    fn token_id(&self, role: &str, tokens: &[String]) -> Result<Option<usize>> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        let id = match self.metadata.get(&key) {
            None => return Ok(None),
            Some(Value::U32(id)) => *id as usize,
            Some(_) => return Err(Error::malformed("must be a u32").in_tensor(key)),
        };
        match id < tokens.len() {
            true => Ok(Some(id)),
            false => {
                let what = format!("is {id}, but there are {} tokens", tokens.len());
                Err(Error::malformed(what).in_tensor(key))
            }
        }
    }

    /// What a prompt gets around it.
    fn post_processor(
        &self,
        tokens: &[String],
        splits: RuntimeSplits,
    ) -> Result<serde_json::Value> {
        let bos = self.added_id("bos", splits.adds_bos, tokens)?;
        let eos = self.added_id("eos", false, tokens)?;
        if bos.is_none() && eos.is_none() {
            return Ok(serde_json::Value::Null);
        }
        let special = |id: usize| json!({"SpecialToken": {"id": tokens[id], "type_id": 0}});
        let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let around = |names: &[&str]| -> Vec<_> {
            let texts = names.iter().map(|name| text(name));
            let begin = bos.map(special).into_iter();
            begin.chain(texts).chain(eos.map(special)).collect()
        };
        let declared: serde_json::Map<_, _> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|id| {
                let text = &tokens[id];
                let entry = json!({"id": text, "ids": [id], "tokens": [text]});
                (text.clone(), entry)
            })
            .collect();
        Ok(json!({
            "type": "TemplateProcessing", "single": around(&["A"]), "pair": around(&["A", "B"]),
            "special_tokens": declared
        }))
    }

    fn added_id(&self, role: &str, default: bool, tokens: &[String]) -> Result<Option<usize>> {
        let key = format!("tokenizer.ggml.add_{role}_token");
        let add = match self.metadata.get(&key) {
            None => default,
            Some(Value::Bool(add)) => *add,
            Some(_) => return Err(Error::malformed("must be a boolean").in_tensor(key)),
        };
        if !add {
            return Ok(None);
        }
        let id = self.token_id(role, tokens)?;
        let missing = || {
            let what = format!("prompts begin or end with the {role} token, which has no id");
            Error::missing(what).in_tensor(format!("tokenizer.ggml.{role}_token_id"))
        };
        id.map(Some).ok_or_else(missing)
    }
}

#[cfg(test)]
mod tests;
