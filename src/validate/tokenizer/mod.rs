//! The tokenizer level: whether text becomes the same prompt as with the model's own files.
//!
//! Enters: an artifact, and a reference in either container. Leaves: findings. Looks at no weight.

mod chat_template;
mod conversations;
mod vocabulary;

use nemoconv_formats::gguf::{Array, Metadata, Value};

use super::Found;
use crate::artifact::StoredModel;
use crate::error::Result;
use crate::model::tokenizer::runtime_splits::RuntimeSplits;
use crate::model::tokenizer::{TextEncoder, Tokenizer, TokenizerFiles};
use crate::report::{Finding, Rule, Severity};
use crate::write::gguf::tokenizer_keys::tokenizer_keys;

/// Text in many scripts, code, numbers, white space, emoji and texts of special tokens; one case per line.
pub const MULTILINGUAL: &str = include_str!("../multilingual.txt");

const PRE: &str = "tokenizer.ggml.pre";

/// One model's tokenizer: the keys that a GGUF file has or would have, and an encoder.
struct Side {
    file: String,
    keys: Metadata,
    encoder: nemoconv_formats::Result<TextEncoder>,
    /// Rows of the embedding.
    rows: usize,
    /// Nobody named the pre-tokenizer and the files do not tell: it was taken from the other side.
    pre_is_assumed: bool,
}

impl Side {
    /// `assumed_pre` stands in where the files of a checkpoint imply no name.
    fn of(model: &StoredModel, assumed_pre: Option<&str>) -> nemoconv_formats::Result<Self> {
        let rows = model.tensor("token_embd.weight").map_or(0, |t| t.rows);
        let file = model.path().display().to_string();
        if let Some(metadata) = model.metadata() {
            return Ok(Self {
                file,
                keys: metadata.clone(),
                encoder: TextEncoder::of_gguf(metadata),
                rows,
                pre_is_assumed: false,
            });
        }
        let folder = model.checkpoint().map_or(model.path(), |c| c.folder());
        let files = TokenizerFiles::read(folder)?;
        let config = model.checkpoint().map(|c| c.read_json("config.json"));
        let config = config.transpose()?.flatten().unwrap_or_default();
        let parse = |pre| Tokenizer::parse(&files, &config, rows, pre);
        let (tokenizer, pre_is_assumed) = match parse(None) {
            Ok(tokenizer) => (tokenizer, false),
            Err(error) if assumed_pre.is_none() => return Err(error),
            Err(_) => (parse(assumed_pre)?, true),
        };
        let mut keys = Metadata::new();
        tokenizer_keys(&tokenizer, &mut keys);
        Ok(Self {
            file,
            keys,
            encoder: TextEncoder::of_files(&files, rows),
            rows,
            pre_is_assumed,
        })
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.keys.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    fn texts(&self, key: &str) -> &[String] {
        match self.keys.get(key) {
            Some(Value::Array(Array::String(texts))) => texts,
            _ => &[],
        }
    }

    fn finding(&self, rule: Rule, key: &str, message: impl Into<String>) -> Finding {
        Finding::new(rule, message)
            .in_file(&self.file)
            .in_tensor(key)
    }
}

/// Compares the tokenizers, or looks at the artifact's alone.
///
/// # Errors
/// None at present; what cannot be read is a finding.
pub fn inspect(artifact: &StoredModel, reference: Option<&StoredModel>) -> Result<Found> {
    let mut found = Found::default();
    let artifact = match Side::of(artifact, None) {
        Ok(side) => side,
        Err(error) => {
            let message = format!("the tokenizer cannot be read: {error}");
            let finding = Finding::new(Rule::VocabularyDiffers, message);
            found.push(finding.in_file(artifact.path().display().to_string()));
            return Ok(found);
        }
    };
    let reference = reference.and_then(|model| {
        let side = Side::of(model, artifact.text(PRE));
        side.map_err(|error| {
            let message = format!("the reference has no tokenizer to compare with: {error}");
            let finding = Finding::new(Rule::VocabularyDiffers, message);
            found.push(finding.severity(Severity::Note));
        })
        .ok()
    });
    pre_tokenizer(&artifact, reference.as_ref(), &mut found);
    vocabulary::inspect(&artifact, reference.as_ref(), &mut found);
    ids(&artifact, reference.as_ref(), &mut found);
    chat_template::inspect(&artifact, reference.as_ref(), &mut found);
    found.looked_at("tokens", artifact.texts("tokenizer.ggml.tokens").len());
    found.looked_at("lines of text", MULTILINGUAL.lines().count());
    Ok(found)
}

fn pre_tokenizer(artifact: &Side, reference: Option<&Side>, found: &mut Found) {
    let name = artifact.text(PRE).unwrap_or("default");
    let rules = RuntimeSplits::of(name);
    if rules.is_none() {
        let message = format!("no byte-level splitting rule is known under the name `{name}`");
        found.push(artifact.finding(Rule::WrongPreTokenizer, PRE, message));
        return;
    }
    let Some(reference) = reference else { return };
    let expected = reference.text(PRE).unwrap_or("default");
    if reference.pre_is_assumed {
        let message =
            format!("the files of the reference imply no name; `{name}` was taken as it is");
        let finding = artifact.finding(Rule::WrongPreTokenizer, PRE, message);
        found.push(finding.severity(Severity::Note));
    } else if RuntimeSplits::of(expected) != rules {
        let message = format!("is `{name}`, the reference implies `{expected}`");
        found.push(artifact.finding(Rule::WrongPreTokenizer, PRE, message));
    }
}

/// The ids of the fixed text, line by line and as a whole.
fn ids(artifact: &Side, reference: Option<&Side>, found: &mut Found) {
    let encoder = match &artifact.encoder {
        Ok(encoder) => encoder,
        Err(error) => {
            // A pre-tokenizer without rules has been named already.
            if !found.has(Rule::WrongPreTokenizer) {
                let key = error.place.tensor.as_deref();
                let key = key.unwrap_or("tokenizer.ggml.tokens");
                let message = format!("no encoder can be built: {}", error.kind);
                found.push(artifact.finding(Rule::VocabularyDiffers, key, message));
            }
            return;
        }
    };
    let reference = match reference.map(|reference| &reference.encoder) {
        Some(Ok(reference)) => Some(reference),
        Some(Err(error)) => {
            let message = format!("the reference's text cannot be encoded: {error}");
            let finding = Finding::new(Rule::TokenIdsDiffer, message);
            found.push(finding.severity(Severity::Note));
            None
        }
        None => None,
    };
    let mut differing = 0;
    let mut first = None;
    let lines = MULTILINGUAL.split_inclusive('\n').enumerate();
    for (index, text) in lines.chain([(0, MULTILINGUAL)]) {
        let ours = encoder.encode(text, Some(false)).unwrap_or_default();
        let theirs = match reference {
            Some(reference) => reference.encode(text, Some(false)).unwrap_or_default(),
            None => continue,
        };
        if ours != theirs {
            differing += 1;
            first.get_or_insert((index, text, ours, theirs));
        }
    }
    if let Some((index, text, ours, theirs)) = first {
        let message = format!(
            "{differing} of {} texts have other ids, the first line {} ({:?}): {}",
            MULTILINGUAL.lines().count() + 1,
            index + 1,
            text.chars().take(24).collect::<String>(),
            first_difference(&ours, &theirs)
        );
        found.push(artifact.finding(Rule::TokenIdsDiffer, PRE, message));
    }
}

fn first_difference(ours: &[u32], theirs: &[u32]) -> String {
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    let rest = |ids: &[u32]| ids[same..].iter().take(4).copied().collect::<Vec<_>>();
    format!(
        "from token {same} on {:?} ({} in all), the reference has {:?} ({} in all)",
        rest(ours),
        ours.len(),
        rest(theirs),
        theirs.len()
    )
}
