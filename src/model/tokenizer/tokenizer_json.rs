//! `tokenizer.json`, read into types and checked: ids in range and unique, merges of known tokens.
//!
//! Enters: the file's bytes. Leaves: [`TokenizerJson`]. Knows no other file.

use std::collections::HashMap;
use std::fmt;

use nemoconv_formats::{Error, Result};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// The parts of `tokenizer.json` that matter; pipeline stages stay JSON for the encoder to read.
pub(super) struct TokenizerJson {
    pub(super) model: BpeModel,
    pub(super) added_tokens: Vec<AddedTokenEntry>,
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) post_processor: Value,
    pub(super) decoder: Value,
}

/// The `model` object of a BPE tokenizer.
#[derive(Deserialize)]
pub(super) struct BpeModel {
    pub(super) vocab: HashMap<String, u32>,
    pub(super) merges: Vec<Merge>,
    pub(super) unk_token: Option<String>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    pub(super) fuse_unk: Option<bool>,
    pub(super) byte_fallback: Option<bool>,
    pub(super) ignore_merges: Option<bool>,
}

/// One entry of `added_tokens`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AddedTokenEntry {
    pub(super) id: u32,
    #[serde(flatten)]
    pub(super) token: tokenizers::AddedToken,
}

/// Two neighbouring tokens that become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Merge {
    pub(super) left: String,
    pub(super) right: String,
}

#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(default)]
    added_tokens: Vec<AddedTokenEntry>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct ModelType {
    #[serde(rename = "type")]
    name: Option<String>,
}

impl TokenizerJson {
    /// Reads and checks `bytes`; ids must be below `token_count`.
    pub(super) fn parse(bytes: &[u8], token_count: usize) -> Result<Self> {
        let file: File = serde_json::from_slice(bytes).map_err(malformed)?;
        let kind: ModelType = serde_json::from_str(file.model.get()).map_err(in_model)?;
        if let Some(name) = kind.name.filter(|name| name != "BPE") {
            return Err(Error::unsupported(format!(
                "expected a `BPE` tokenizer model, found `{name}`"
            ))
            .hint(
                "Nemotron-H uses byte-level BPE; check that the tokenizer belongs to the model",
            ));
        }
        let model: BpeModel = serde_json::from_str(file.model.get()).map_err(in_model)?;
        check_affixes(&model)?;
        check_vocab(&model.vocab, token_count)?;
        check_merges(&model)?;
        check_added_tokens(&file.added_tokens, &model.vocab, token_count)?;
        check_template_count(&file.post_processor)?;
        check_templates(&file.post_processor)?;
        Ok(Self {
            model,
            added_tokens: file.added_tokens,
            normalizer: file.normalizer,
            pre_tokenizer: file.pre_tokenizer,
            post_processor: file.post_processor,
            decoder: file.decoder,
        })
    }
}

impl Merge {
    /// The line GGUF holds: parts joined by a space, spaces inside them as the byte-level U+0120.
    pub(super) fn gguf_text(&self) -> String {
        let part = |text: &str| text.replace(' ', "\u{120}");
        format!("{} {}", part(&self.left), part(&self.right))
    }
}

fn malformed(error: serde_json::Error) -> Error {
    Error::malformed(error.to_string())
}

fn in_model(error: serde_json::Error) -> Error {
    // The line is counted from the start of `model`: say so.
    Error::malformed(format!("in `model`: {error}"))
}

/// The runtime's BPE has neither; and a prefix would cut merged tokens at arbitrary bytes.
fn check_affixes(model: &BpeModel) -> Result<()> {
    let affixes = [
        (
            "continuing_subword_prefix",
            &model.continuing_subword_prefix,
        ),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ];
    for (name, affix) in affixes {
        if affix.as_deref().is_some_and(|affix| !affix.is_empty()) {
            return Err(Error::unsupported(format!(
                "`model.{name}` must be null, found {affix:?}"
            )));
        }
    }
    Ok(())
}

fn check_vocab(vocab: &HashMap<String, u32>, token_count: usize) -> Result<()> {
    let mut owners: Vec<Option<&str>> = vec![None; token_count];
    for (text, &id) in vocab {
        let owner = owners
            .get_mut(id as usize)
            .ok_or_else(|| id_too_large(text, id, token_count))?;
        if let Some(other) = owner.replace(text) {
            let (first, second) = if other < text.as_str() {
                (other, text.as_str())
            } else {
                (text.as_str(), other)
            };
            return Err(Error::malformed(format!(
                "id {id} belongs to two tokens, {first:?} and {second:?}"
            )));
        }
    }
    Ok(())
}

fn id_too_large(text: &str, id: u32, token_count: usize) -> Error {
    Error::malformed(format!(
        "token {text:?} has id {id}, but the model has {token_count} tokens (`vocab_size` rounded up to 8)"
    ))
    .hint("check that tokenizer.json and config.json belong to the same model")
}

fn check_merges(model: &BpeModel) -> Result<()> {
    let mut merged = String::new();
    for (rank, merge) in model.merges.iter().enumerate() {
        merged.clear();
        merged.push_str(&merge.left);
        merged.push_str(&merge.right);
        for part in [&merge.left, &merge.right, &merged] {
            if !model.vocab.contains_key(part) {
                return Err(Error::malformed(format!(
                    "merge {rank} ({:?} {:?}) needs the token {part:?}, which the vocabulary lacks",
                    merge.left, merge.right
                )));
            }
        }
    }
    Ok(())
}

/// Ids the encoder will give: the vocabulary's own, else the next free one in order of the list.
fn check_added_tokens(
    added: &[AddedTokenEntry],
    vocab: &HashMap<String, u32>,
    token_count: usize,
) -> Result<()> {
    let mut given: HashMap<&str, u32> = HashMap::new();
    let mut next = u32::try_from(vocab.len()).unwrap_or(u32::MAX);
    for AddedTokenEntry { id, token } in
        added.iter().filter(|entry| !entry.token.content.is_empty())
    {
        let text = token.content.as_str();
        if *id as usize >= token_count {
            return Err(id_too_large(text, *id, token_count));
        }
        let known = vocab.get(text).or_else(|| given.get(text)).copied();
        let expected = known.unwrap_or_else(|| {
            next = next.saturating_add(1);
            next - 1
        });
        if *id != expected {
            return Err(Error::malformed(format!(
                "added token {text:?} must have id {expected}, found {id}"
            ))
            .hint("added tokens follow the vocabulary without gaps; fill the gap with placeholder tokens"));
        }
        given.insert(text, *id);
    }
    Ok(())
}

/// The encoder panics where a template meets the several pieces another one left.
fn check_template_count(processor: &Value) -> Result<()> {
    match template_count(processor) {
        0 | 1 => Ok(()),
        count => Err(Error::unsupported(format!(
            "`post_processor` must have at most one TemplateProcessing, found {count}"
        ))),
    }
}

fn template_count(processor: &Value) -> usize {
    let parts = processor.get("processors").and_then(Value::as_array);
    let own = processor.get("type").and_then(Value::as_str) == Some("TemplateProcessing");
    parts
        .into_iter()
        .flatten()
        .map(template_count)
        .fold(usize::from(own), usize::saturating_add)
}

/// Templates must declare their special tokens, and have a second text only in pairs: the encoder
/// takes both for granted.
fn check_templates(processor: &Value) -> Result<()> {
    let array = |key| {
        processor
            .get(key)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
    };
    array("processors").try_for_each(check_templates)?;
    if processor.get("type").and_then(Value::as_str) != Some("TemplateProcessing") {
        return Ok(());
    }
    let declared = |id: &str| {
        processor
            .get("special_tokens")
            .is_some_and(|tokens| tokens.get(id).is_some())
    };
    for (key, sequences) in [("single", &["A"][..]), ("pair", &["A", "B"])] {
        for piece in array(key) {
            let id = |kind| piece.pointer(kind).and_then(Value::as_str);
            match (id("/SpecialToken/id"), id("/Sequence/id")) {
                (Some(id), _) if declared(id) => {}
                (None, Some(id)) if sequences.contains(&id) => {}
                _ => {
                    return Err(Error::malformed(format!(
                        "`post_processor.{key}` must consist of {sequences:?} and declared special \
                         tokens, found {piece}"
                    )));
                }
            }
        }
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a merge: two tokens, as a list or joined by one space")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Merge, E> {
        match text.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok(Merge {
                left: left.to_owned(),
                right: right.to_owned(),
            }),
            _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Merge, A::Error> {
        let left = seq
            .next_element()?
            .ok_or_else(|| de::Error::invalid_length(0, &self))?;
        let right = seq
            .next_element()?
            .ok_or_else(|| de::Error::invalid_length(1, &self))?;
        match seq.next_element::<de::IgnoredAny>()? {
            None => Ok(Merge { left, right }),
            Some(_) => Err(de::Error::invalid_length(3, &self)),
        }
    }
}
