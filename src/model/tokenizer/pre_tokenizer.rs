//! The runtime's name for a tokenizer's pre-tokenizer: given, or found by digest, or by its regex.
//!
//! Enters: an encoder and the shape of its pre-tokenizer. Leaves: a name the runtime knows.

use std::fmt::Write;

use nemoconv_formats::{Error, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::backend::Backend;
use super::tokenizer_json::TokenizerJson;

/// The text whose ids tell tokenizers apart: llama.cpp b11434, `conversion/base.py` (`chktxt`).
const PROBE: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\u{1f680} (normal) \
    \u{1f636}\u{200d}\u{1f32b}\u{fe0f} (multiple emojis concatenated) \u{2705} \u{1f999}\u{1f999} 3 33 333 \
    3333 33333 333333 3333333 33333333 3.3 3..3 3...3 \u{1780}\u{17b6}\u{1793}\u{17cb}\u{178f}\u{17c2}\
    \u{1796}\u{17b7}\u{179f}\u{17c1}\u{179f}\u{17a2}\u{17b6}\u{1785}\u{1f601} ?\u{6211}\u{60f3}\u{5728}apple\
    \u{5de5}\u{4f5c}1314151\u{5929}\u{ff5e} ------======= \u{43d}\u{435}\u{449}\u{43e} \u{43d}\u{430} \
    \u{411}\u{44a}\u{43b}\u{433}\u{430}\u{440}\u{441}\u{43a}\u{438} \
    ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll \
    make it, 'D you like some tea? We'Ve a'lL";

/// SHA-256 of the probe's ids as Python prints a list, and the name: llama.cpp b11434, same place.
const DIGESTS: &str = include_str!("pre_tokenizer_digests.tsv");

/// Splitting rules the runtime has under a name: llama.cpp b11434, `src/llama-vocab.cpp`.
const SHAPES: [(&str, &[Split], bool); 8] = [
    ("pixtral", &[Split::Regex(LLAMA3)], true),
    ("smaug-bpe", &[Split::Regex(LLAMA3)], false),
    ("tekken", &[Split::Regex(TEKKEN)], true),
    ("qwen2", &[Split::Regex(QWEN2)], false),
    ("qwen35", &[Split::Regex(QWEN35)], false),
    ("gpt-4o", &[Split::Regex(GPT4O)], false),
    ("gpt-2", &[Split::ByteLevel], false),
    ("starcoder", &[Split::Digits, Split::ByteLevel], false),
];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One step that cuts text; steps that only re-encode bytes are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split<'a> {
    /// Every match is a piece, and so is what lies between matches.
    Regex(&'a str),
    /// GPT-2's own pattern.
    ByteLevel,
    /// Every digit is a piece.
    Digits,
}

/// How a tokenizer cuts text, as far as the runtime's names tell apart.
pub(super) struct Shape {
    pre_tokenizer: Value,
    ignore_merges: bool,
}

impl Shape {
    pub(super) fn of(json: &TokenizerJson) -> Self {
        Self {
            pre_tokenizer: json.pre_tokenizer.clone(),
            ignore_merges: json.model.ignore_merges.unwrap_or(false),
        }
    }

    fn name(&self) -> Option<&'static str> {
        let splits = splits(&self.pre_tokenizer)?;
        SHAPES
            .iter()
            .find(|(_, shape, ignore_merges)| {
                *shape == splits && *ignore_merges == self.ignore_merges
            })
            .map(|(name, ..)| *name)
    }
}

/// The name, by authority: `given`, the digest of the probe's ids, the regex.
pub(super) fn name(given: Option<&str>, backend: &Backend, shape: &Shape) -> Result<String> {
    if let Some(name) = given {
        return Ok(name.to_owned());
    }
    let digest = digest(&backend.prompt_ids(PROBE)?);
    by_digest(&digest).or_else(|| shape.name()).map(str::to_owned).ok_or_else(|| {
        Error::unsupported(format!("unknown pre-tokenizer (probe digest {digest})")).hint(
            "name the runtime's equivalent with --pre-tokenizer NAME, for example `pixtral` or `tekken`; \
             a wrong name splits text wrongly without any error",
        )
    })
}

fn by_digest(digest: &str) -> Option<&'static str> {
    DIGESTS
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .find(|(known, _)| *known == digest)
        .map(|(_, name)| name)
}

/// SHA-256, in hexadecimal, of `[1, 2, 3]`.
fn digest(ids: &[u32]) -> String {
    let text = ids
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(format!("[{text}]")) {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// The cutting steps, or `None` when one of them is none the runtime has.
fn splits(stage: &Value) -> Option<Vec<Split<'_>>> {
    let flag = |name| stage.get(name).and_then(Value::as_bool).unwrap_or(false);
    match stage.get("type")?.as_str()? {
        "Sequence" => {
            let parts = stage.get("pretokenizers")?.as_array()?;
            let parts = parts.iter().map(splits).collect::<Option<Vec<_>>>()?;
            Some(parts.concat())
        }
        "Split" => {
            let isolated = stage.get("behavior")?.as_str()? == "Isolated" && !flag("invert");
            let regex = stage.pointer("/pattern/Regex")?.as_str()?;
            isolated.then(|| vec![Split::Regex(regex)])
        }
        "ByteLevel" if flag("add_prefix_space") => None,
        "ByteLevel" if stage.get("use_regex").and_then(Value::as_bool) == Some(false) => {
            Some(Vec::new())
        }
        "ByteLevel" => Some(vec![Split::ByteLevel]),
        "Digits" if flag("individual_digits") => Some(vec![Split::Digits]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use nemoconv_fixtures::metadata::{Expected, cases};
    use serde_json::json;

    use super::*;
    use crate::model::tokenizer::{TokenizerFiles, added_tokens};

    /// The ids of the probe, special tokens included, are those the real converter hashes.
    #[test]
    fn digests_are_the_converters() {
        let parse =
            |bytes: Option<&[u8]>| bytes.and_then(|bytes| serde_json::from_slice(bytes).ok());
        let mut compared = 0;
        for case in cases().iter().filter(|case| case.differs.is_none()) {
            let Expected::Written {
                digest: expected, ..
            } = &case.expected
            else {
                continue;
            };
            let files = TokenizerFiles {
                tokenizer_config: parse(case.file("tokenizer_config.json")),
                special_tokens_map: parse(case.file("special_tokens_map.json")),
                added_tokens: parse(case.file("added_tokens.json")),
                ..TokenizerFiles::default()
            };
            let json = TokenizerJson::parse(case.file("tokenizer.json").unwrap(), 512).unwrap();
            let added = added_tokens::in_force(&json.added_tokens, &files).unwrap();
            let mut backend = Backend::new(json, &added).unwrap();
            backend.split_special_tokens(files.splits_special_tokens());
            assert_eq!(
                digest(&backend.prompt_ids(PROBE).unwrap()),
                *expected,
                "{}",
                case.name
            );
            compared += 1;
        }
        assert!(compared > 50, "{compared} cases");
    }

    #[test]
    fn the_digest_table_is_whole() {
        for line in DIGESTS.lines() {
            let (digest, name) = line.split_once('\t').unwrap();
            assert!(
                digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{line}"
            );
            assert!(!name.is_empty(), "{line}");
        }
        let pixtral = "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3";
        assert_eq!(by_digest(pixtral), Some("pixtral"));
        assert_eq!(by_digest(""), None);
    }

    fn check(pre_tokenizer: Value, ignore_merges: bool, expected: Option<&str>) {
        let shape = Shape {
            pre_tokenizer,
            ignore_merges,
        };
        assert_eq!(shape.name(), expected, "{}", shape.pre_tokenizer);
    }

    #[test]
    fn shapes_have_names() {
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let sequence = |parts: &[&Value]| json!({"type": "Sequence", "pretokenizers": parts});
        for (regex, ignore_merges, expected) in [
            (LLAMA3, true, Some("pixtral")),
            (LLAMA3, false, Some("smaug-bpe")),
            (TEKKEN, true, Some("tekken")),
            (TEKKEN, false, None),
            (QWEN2, false, Some("qwen2")),
            (QWEN2, true, None),
            (QWEN35, false, Some("qwen35")),
            (GPT4O, false, Some("gpt-4o")),
            (r"\S+", true, None),
        ] {
            check(sequence(&[&split(regex), &bytes]), ignore_merges, expected);
        }
        let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let digits = json!({"type": "Digits", "individual_digits": true});
        check(gpt2.clone(), false, Some("gpt-2"));
        check(sequence(&[&digits, &gpt2]), false, Some("starcoder"));
        check(sequence(&[&split(LLAMA3), &gpt2]), true, None);
        check(
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            false,
            None,
        );
        check(
            json!({"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Removed"}),
            true,
            None,
        );
        check(json!({"type": "Metaspace"}), false, None);
        check(Value::Null, false, None);
    }
}
