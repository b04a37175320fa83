//! Tokens, their types, merges and special ids: equal to the reference's, and consistent with the embedding.
//!
//! Enters: the keys of both sides. Leaves: findings. Encodes nothing.

use nemoconv_formats::gguf::{Array, Value};

use super::{Found, Side};
use crate::report::{Rule, Severity};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Keys of special ids and of what a prompt gets around it.
const SPECIAL: [&str; 12] = [
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.model",
];

pub fn inspect(artifact: &Side, reference: Option<&Side>, found: &mut Found) {
    let tokens = artifact.texts(TOKENS);
    if tokens.len() != artifact.rows && artifact.rows > 0 {
        let message = format!(
            "there are {} tokens, and the embedding has {} rows",
            tokens.len(),
            artifact.rows
        );
        found.push(artifact.finding(Rule::VocabularyDiffers, TOKENS, message));
    }
    for key in SPECIAL.iter().filter(|key| key.ends_with("_id")) {
        if let Some(Value::U32(id)) = artifact.keys.get(key)
            && *id as usize >= tokens.len()
        {
            let message = format!("is {id}, but there are {} tokens", tokens.len());
            found.push(artifact.finding(Rule::SpecialIdDiffers, key, message));
        }
    }
    let Some(reference) = reference else { return };
    texts(artifact, reference, TOKENS, "token", found);
    texts(artifact, reference, MERGES, "merge", found);
    types(artifact, reference, found);
    special(artifact, reference, found);
}

fn texts(artifact: &Side, reference: &Side, key: &str, what: &str, found: &mut Found) {
    let (ours, theirs) = (artifact.texts(key), reference.texts(key));
    let pairs = ours.iter().zip(theirs).enumerate();
    let mut differing = pairs.filter(|(_, (a, b))| a != b);
    let message = match differing.next() {
        Some((index, (a, b))) => format!(
            "{} {what}s differ, first {what} {index}: {a:?}, the reference has {b:?}",
            1 + differing.count()
        ),
        None if ours.len() != theirs.len() => format!(
            "there are {} {what}s, the reference has {}",
            ours.len(),
            theirs.len()
        ),
        None => return,
    };
    found.push(artifact.finding(Rule::VocabularyDiffers, key, message));
}

fn types(artifact: &Side, reference: &Side, found: &mut Found) {
    let types = |side: &Side| match side.keys.get(TYPES) {
        Some(Value::Array(Array::I32(types))) => types.clone(),
        _ => Vec::new(),
    };
    let (ours, theirs) = (types(artifact), types(reference));
    let pairs = ours.iter().zip(&theirs).enumerate();
    let mut differing = pairs.filter(|(_, (a, b))| a != b);
    if let Some((id, (a, b))) = differing.next() {
        let message = format!(
            "{} tokens have another type, first token {id}: {a}, the reference has {b}",
            1 + differing.count()
        );
        found.push(artifact.finding(Rule::VocabularyDiffers, TYPES, message));
    }
}

fn special(artifact: &Side, reference: &Side, found: &mut Found) {
    for key in SPECIAL {
        let (ours, theirs) = (artifact.keys.get(key), reference.keys.get(key));
        let message = match (ours, theirs) {
            (ours, theirs) if ours == theirs => continue,
            (Some(ours), Some(theirs)) => {
                format!("is {}, the reference has {}", shown(ours), shown(theirs))
            }
            (None, Some(theirs)) => format!("is missing, the reference has {}", shown(theirs)),
            (_, None) => {
                let message = "the reference has no such key";
                let finding = artifact.finding(Rule::SpecialIdDiffers, key, message);
                found.push(finding.severity(Severity::Note));
                continue;
            }
        };
        found.push(artifact.finding(Rule::SpecialIdDiffers, key, message));
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::U32(id) => id.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::String(text) => format!("`{text}`"),
        other => format!("{other:?}"),
    }
}
