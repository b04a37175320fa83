//! Added tokens beyond `tokenizer.json`: what tokenizer_config.json and its companions add or change.
//!
//! Enters: the entries of `tokenizer.json` and the other files. Leaves: the tokens to add after them,
//! in order. Assigns no ids: the encoder does.
//!
//! Source: transformers 5 (`tokenization_utils_base.py`, `_from_pretrained`;
//! `tokenization_utils_tokenizers.py`, `TokenizersBackend.__init__`), which the stock converter asks.

use std::collections::{BTreeMap, HashMap, HashSet};

use nemoconv_formats::{Error, Result};
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::files::TokenizerFiles;
use super::tokenizer_json::AddedTokenEntry;

/// Roles whose tokens are added when the vocabulary lacks them.
const NAMED_ROLES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Tokens to add after those of `tokenizer.json`; most repeat one of them, some with other flags.
pub(super) fn in_force(
    entries: &[AddedTokenEntry],
    files: &TokenizerFiles,
) -> Result<Vec<AddedToken>> {
    let declared = Declared::of(entries, files)?;
    let mut additions: Vec<AddedToken> = declared.tokens.into_values().collect();
    let mut known: HashSet<String> = entries
        .iter()
        .map(|entry| &entry.token)
        .chain(&additions)
        .map(|token| token.content.clone())
        .collect();
    for token in declared.special {
        if known.insert(token.content.clone()) {
            additions.push(token);
        }
    }
    for token in &mut additions {
        token.special |= declared.named.contains(&token.content);
    }
    Ok(additions)
}

/// What the files beside `tokenizer.json` declare.
struct Declared {
    /// By id.
    tokens: BTreeMap<u32, AddedToken>,
    /// Named roles first, then the extra special tokens.
    special: Vec<AddedToken>,
    /// Texts of the named roles.
    named: HashSet<String>,
}

impl Declared {
    fn of(entries: &[AddedTokenEntry], files: &TokenizerFiles) -> Result<Self> {
        let mut config = files.tokenizer_config.clone().unwrap_or_default();
        if !config.get("extra_special_tokens").is_some_and(is_filled)
            && let Some(extra) = config.shift_remove("additional_special_tokens")
        {
            config.insert("extra_special_tokens".into(), extra);
        }
        let tokens = match config
            .get("added_tokens_decoder")
            .and_then(Value::as_object)
        {
            Some(decoder) => by_id(decoder)?,
            None => {
                config.extend(files.special_tokens_map.clone().unwrap_or_default());
                legacy_tokens(entries, files, &config)?
            }
        };
        let known: HashMap<&str, &AddedToken> = tokens
            .values()
            .map(|token| (token.content.as_str(), token))
            .collect();
        let named: Vec<AddedToken> = named_values(&config)
            .filter_map(added_token)
            .map(|token| {
                known
                    .get(token.content.as_str())
                    .map_or(token, |known| (*known).clone())
            })
            .collect();
        let texts = named.iter().map(|token| token.content.clone()).collect();
        let extra = ["extra_special_tokens", "additional_special_tokens"]
            .into_iter()
            .find_map(|key| config.get(key)?.as_array())
            .into_iter()
            .flatten();
        let special = named
            .into_iter()
            .chain(extra.filter_map(added_token))
            .collect();
        Ok(Self {
            tokens,
            special,
            named: texts,
        })
    }
}

/// Roles of every model, then roles of this one: other `*_token` keys and a table of extra tokens.
fn named_values(config: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    let roles = NAMED_ROLES.iter().filter_map(|role| config.get(*role));
    let own = config
        .iter()
        .filter(|(key, _)| key.ends_with("_token") && !NAMED_ROLES.contains(&key.as_str()))
        .map(|(_, value)| value);
    let table = config
        .get("extra_special_tokens")
        .and_then(Value::as_object);
    roles
        .chain(own)
        .chain(table.into_iter().flat_map(Map::values))
}

fn by_id(decoder: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>> {
    let parse =
        |(id, value): (&String, &Value)| Some((id.trim().parse().ok()?, added_token(value)?));
    decoder
        .iter()
        .map(|entry| {
            parse(entry).ok_or_else(|| {
                Error::malformed(format!(
                    "`added_tokens_decoder` must map ids to token objects, found `{}`: {}",
                    entry.0, entry.1
                ))
                .in_file("tokenizer_config.json")
            })
        })
        .collect()
}

/// Without `added_tokens_decoder`: added_tokens.json, overruled by tokenizer.json.
fn legacy_tokens(
    entries: &[AddedTokenEntry],
    files: &TokenizerFiles,
    config: &Map<String, Value>,
) -> Result<BTreeMap<u32, AddedToken>> {
    let special: Vec<String> = NAMED_ROLES
        .iter()
        .filter_map(|role| Some(added_token(config.get(*role)?)?.content))
        .collect();
    let mut tokens = BTreeMap::new();
    for (text, id) in files.added_tokens.iter().flatten() {
        let id = id
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| {
                Error::malformed(format!("token {text:?} must have an id, found {id}"))
                    .in_file("added_tokens.json")
            })?;
        tokens.insert(id, AddedToken::from(text.clone(), special.contains(text)));
    }
    tokens.extend(entries.iter().map(|entry| (entry.id, entry.token.clone())));
    Ok(tokens)
}

/// A token given as text (then special) or as an object with its flags.
fn added_token(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(text) => Some(AddedToken::from(text.clone(), true)),
        Value::Object(fields) => {
            let flag = |name| fields.get(name).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            Some(
                AddedToken::from(fields.get("content")?.as_str()?, special)
                    .single_word(flag("single_word").unwrap_or(false))
                    .lstrip(flag("lstrip").unwrap_or(false))
                    .rstrip(flag("rstrip").unwrap_or(false))
                    .normalized(flag("normalized").unwrap_or(!special)),
            )
        }
        _ => None,
    }
}

fn is_filled(value: &Value) -> bool {
    match value {
        Value::Array(values) => !values.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        value => value.is_string(),
    }
}
