//! `tokenizer.*` keys, in the stock converter's order and types.
//!
//! Enters: a [`Tokenizer`]. Leaves: entries of [`Metadata`]. Reads no files.

use nemoconv_formats::gguf::Metadata;

use crate::model::tokenizer::{SpecialToken, Tokenizer};

/// Appends the keys of `tokenizer`. Empty strings and lists are left out, as the converter does.
///
/// Source: llama.cpp `conversion/nemotron.py` (`set_vocab`), `gguf-py/gguf/vocab.py` (`add_to_gguf`).
pub fn tokenizer_keys(tokenizer: &Tokenizer, metadata: &mut Metadata) {
    let tokens: Vec<String> = tokenizer
        .tokens
        .iter()
        .map(|token| token.text.clone())
        .collect();
    let types: Vec<i32> = tokenizer
        .tokens
        .iter()
        .map(|token| token.token_type as i32)
        .collect();
    metadata.set("tokenizer.ggml.model", "gpt2");
    metadata.set("tokenizer.ggml.pre", tokenizer.pre_tokenizer.as_str());
    metadata.set("tokenizer.ggml.tokens", tokens);
    metadata.set("tokenizer.ggml.token_type", types);
    if !tokenizer.merges.is_empty() {
        metadata.set("tokenizer.ggml.merges", tokenizer.merges.clone());
    }
    for &(role, id) in &tokenizer.special.ids {
        if let Some(key) = id_key(role) {
            metadata.set(key, id);
        }
    }
    for &(role, add) in &tokenizer.special.add {
        if matches!(
            role,
            SpecialToken::Bos | SpecialToken::Eos | SpecialToken::Sep
        ) {
            metadata.set(format!("tokenizer.ggml.add_{}_token", role.name()), add);
        }
    }
    chat_template_keys(tokenizer, metadata);
    if let Some(lowercase) = tokenizer.special.lowercase {
        metadata.set("tokenizer.ggml.normalizer.lowercase", lowercase);
    }
    if let Some(strip_accents) = tokenizer.special.strip_accents {
        metadata.set("tokenizer.ggml.normalizer.strip_accents", strip_accents);
    }
}

/// The runtime's key of a role, its spelling included; it has none for `cls`.
const fn id_key(role: SpecialToken) -> Option<&'static str> {
    match role {
        SpecialToken::Bos => Some("tokenizer.ggml.bos_token_id"),
        SpecialToken::Eos => Some("tokenizer.ggml.eos_token_id"),
        SpecialToken::Unk => Some("tokenizer.ggml.unknown_token_id"),
        SpecialToken::Sep => Some("tokenizer.ggml.seperator_token_id"),
        SpecialToken::Pad => Some("tokenizer.ggml.padding_token_id"),
        SpecialToken::Cls => None,
        SpecialToken::Mask => Some("tokenizer.ggml.mask_token_id"),
        SpecialToken::Eot => Some("tokenizer.ggml.eot_token_id"),
        SpecialToken::Eom => Some("tokenizer.ggml.eom_token_id"),
    }
}

fn chat_template_keys(tokenizer: &Tokenizer, metadata: &mut Metadata) {
    let templates = &tokenizer.chat_templates;
    for (name, template) in templates
        .named
        .iter()
        .filter(|(_, template)| !template.is_empty())
    {
        metadata.set(format!("tokenizer.chat_template.{name}"), template.as_str());
    }
    let names: Vec<String> = templates
        .named
        .iter()
        .map(|(name, _)| name.clone())
        .collect();
    if !names.is_empty() {
        metadata.set("tokenizer.chat_templates", names);
    }
    if let Some(default) = templates
        .default
        .as_deref()
        .filter(|default| !default.is_empty())
    {
        metadata.set("tokenizer.chat_template", default);
    }
}
