//! The tokenizer of a checkpoint folder: byte-level BPE as `tokenizer.json` and its neighbours state it.
//!
//! Enters: the folder's tokenizer files, unchecked. Leaves: [`Tokenizer`], every list bounded by the
//! model's vocabulary. Knows nothing of GGUF keys.

mod added_tokens;
mod backend;
pub mod chat_render;
mod chat_template;
mod encoder;
mod files;
pub mod gguf_encoder;
mod pre_tokenizer;
pub mod runtime_splits;
mod special;
mod tokenizer_json;

use nemoconv_formats::{Error, Result};
use serde_json::Value;
use std::path::Path;

pub use chat_template::ChatTemplates;
pub use encoder::{NamedToken, TextEncoder};
pub use files::TokenizerFiles;
pub use special::{SpecialToken, SpecialTokens};

use backend::Backend;
use tokenizer_json::TokenizerJson;

/// What a token is to the runtime, numbered as in `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    /// An entry of the BPE vocabulary.
    Normal = 1,
    /// A special token, never produced from text.
    Control = 3,
    /// An added token that text may contain.
    UserDefined = 4,
    /// A filler for an id that no token has.
    Unused = 5,
}

/// One entry of the vocabulary; its index is its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The text: byte-level alphabet for [`TokenType::Normal`], plain text for added tokens.
    pub text: String,
    /// What it is.
    pub token_type: TokenType,
}

/// A byte-level BPE tokenizer, ready to be written down.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokenizer {
    /// Every id from 0 to `vocab_size` rounded up to a multiple of 8.
    pub tokens: Vec<Token>,
    /// `left right`, best first; a space inside a part is U+0120.
    pub merges: Vec<String>,
    /// The runtime's name for the way text is split before merging.
    pub pre_tokenizer: String,
    /// Special ids and which of them are added to a prompt.
    pub special: SpecialTokens,
    /// Chat templates, byte for byte.
    pub chat_templates: ChatTemplates,
}

/// More entries than any vocabulary in the field has (the largest known are near 2^18).
const MAX_VOCAB_SIZE: usize = 1 << 20;
/// The stock converter pads Nemotron-H vocabularies to this multiple.
const VOCAB_SIZE_MULTIPLE: usize = 8;

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint folder.
    ///
    /// `config` is the folder's `config.json`, `vocab_size` the rows of its embedding, and
    /// `pre_tokenizer` a name that overrides the look-up.
    ///
    /// # Errors
    /// A file that cannot be read, and everything [`Tokenizer::parse`] refuses; each names the file.
    pub fn read(
        folder: &Path,
        config: &Value,
        vocab_size: usize,
        pre_tokenizer: Option<&str>,
    ) -> Result<Self> {
        let files = TokenizerFiles::read(folder)?;
        let parsed = Self::parse(&files, config, vocab_size, pre_tokenizer);
        parsed.map_err(|error| error.in_folder(folder))
    }

    /// As [`Tokenizer::read`], from the contents of the files.
    ///
    /// # Errors
    /// JSON that is not a byte-level BPE tokenizer, ids outside the vocabulary or given twice, merges
    /// of unknown tokens, and a pre-tokenizer nobody knows when none is named.
    ///
    /// Source: llama.cpp `conversion/nemotron.py` (`set_vocab`), `gguf-py/gguf/vocab.py`
    /// (`SpecialVocab`).
    pub fn parse(
        files: &TokenizerFiles,
        config: &Value,
        vocab_size: usize,
        pre_tokenizer: Option<&str>,
    ) -> Result<Self> {
        let token_count = padded_vocab_size(vocab_size)?;
        let json = TokenizerJson::parse(&files.tokenizer_json, token_count)
            .map_err(|error| error.in_file("tokenizer.json"))?;
        let merges = match json.model.merges.as_slice() {
            [] => files.merges_txt(),
            merges => merges.iter().map(|merge| merge.gguf_text()).collect(),
        };
        let (special, chat_templates) = special::read(&json, files, config)?;
        let added = added_tokens::in_force(&json.added_tokens, files)?;
        let shape = pre_tokenizer::Shape::of(&json);
        let mut backend =
            Backend::new(json, &added).map_err(|error| error.in_file("tokenizer.json"))?;
        backend.split_special_tokens(files.splits_special_tokens());
        let pre_tokenizer = pre_tokenizer::name(pre_tokenizer, &backend, &shape)
            .map_err(|error| error.in_file("tokenizer.json"))?;
        let tokens = backend
            .tokens(token_count)
            .map_err(|error| error.in_file("tokenizer.json"))?;
        Ok(Self {
            tokens,
            merges,
            pre_tokenizer,
            special,
            chat_templates,
        })
    }
}

fn padded_vocab_size(vocab_size: usize) -> Result<usize> {
    if !(1..=MAX_VOCAB_SIZE).contains(&vocab_size) {
        let what = format!("`vocab_size` must be 1 to {MAX_VOCAB_SIZE}, found {vocab_size}");
        return Err(Error::malformed(what).in_file("config.json"));
    }
    Ok(vocab_size.next_multiple_of(VOCAB_SIZE_MULTIPLE))
}

#[cfg(test)]
mod tests {
    use nemoconv_fixtures::metadata::cases;
    use serde_json::json;

    use super::*;

    /// The base case's tokenizer with one change by JSON pointer.
    fn changed(pointer: &str, value: Value) -> Vec<u8> {
        let mut json: Value =
            serde_json::from_slice(cases()[0].file("tokenizer.json").unwrap()).unwrap();
        match json.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => {
                let (parent, key) = pointer.rsplit_once('/').unwrap();
                json.pointer_mut(parent).unwrap()[key] = value;
            }
        }
        json.to_string().into_bytes()
    }

    fn check(tokenizer_json: Vec<u8>, vocab_size: usize, expected: &str) {
        let files = TokenizerFiles {
            tokenizer_json,
            ..TokenizerFiles::default()
        };
        let error = Tokenizer::parse(&files, &Value::Null, vocab_size, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}\nexpected {expected}");
    }

    #[test]
    fn hostile_tokenizers_are_refused() {
        let template =
            json!({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}});
        for (pointer, value, expected) in [
            (
                "/model/vocab/x",
                json!(296),
                "token \"x\" has id 296, but the model has 296 tokens",
            ),
            (
                "/model/vocab/x",
                json!(4_000_000_000_u32),
                "token \"x\" has id 4000000000",
            ),
            (
                "/model/vocab/x",
                json!(-1),
                "in `model`: invalid value: integer `-1`, expected u32",
            ),
            (
                "/model/vocab/x",
                json!(1e3),
                "in `model`: invalid type: floating point",
            ),
            (
                "/model/vocab/x",
                json!(3),
                "id 3 belongs to two tokens, \"[INST]\" and \"x\"",
            ),
            (
                "/model/vocab",
                json!([]),
                "in `model`: invalid type: sequence, expected a map",
            ),
            (
                "/model/merges",
                json!(["a b c"]),
                "expected a merge: two tokens",
            ),
            (
                "/model/merges",
                json!([["a"]]),
                "invalid length 1, expected a merge: two tokens",
            ),
            (
                "/model/merges",
                json!([["a", "b", "c"]]),
                "invalid length 3, expected a merge: two tokens",
            ),
            (
                "/model/merges",
                json!([["a", "b"]]),
                "merge 0 (\"a\" \"b\") needs the token \"ab\"",
            ),
            (
                "/model/merges",
                json!({}),
                "in `model`: invalid type: map, expected a sequence",
            ),
            (
                "/model/type",
                json!("Unigram"),
                "expected a `BPE` tokenizer model, found `Unigram`",
            ),
            (
                "/model/continuing_subword_prefix",
                json!("##"),
                "`model.continuing_subword_prefix` must be null",
            ),
            ("/model", json!(5), "in `model`: invalid type: integer `5`"),
            (
                "/added_tokens/0/id",
                json!(1_u64 << 40),
                "invalid value: integer `1099511627776`, expected u32",
            ),
            (
                "/added_tokens/0/id",
                json!(400),
                "token \"<unk>\" has id 400, but the model has 296 tokens",
            ),
            (
                "/added_tokens/0/id",
                json!(1),
                "added token \"<unk>\" must have id 0, found 1",
            ),
            (
                "/added_tokens/0/content",
                json!("new"),
                "added token \"new\" must have id 288, found 0",
            ),
            (
                "/added_tokens",
                json!({"a": 1}),
                "invalid type: map, expected a sequence",
            ),
            (
                "/post_processor/special_tokens",
                json!({}),
                "`post_processor.single` must consist of [\"A\"] and declared special tokens, found {\"SpecialToken\"",
            ),
            (
                "/post_processor/single/1/Sequence/id",
                json!("B"),
                "`post_processor.single` must consist of [\"A\"] and declared special tokens, found {\"Sequence\"",
            ),
            (
                "/post_processor",
                json!({"type": "Sequence", "processors": [template, template]}),
                "`post_processor` must have at most one TemplateProcessing, found 2",
            ),
            (
                "/post_processor",
                json!({"type": "Nothing"}),
                "`post_processor` must be one of ",
            ),
            (
                "/pre_tokenizer",
                json!({"type": "Nothing"}),
                "`pre_tokenizer` must be one of ",
            ),
            (
                "/pre_tokenizer/pretokenizers/0/pattern/Regex",
                json!("("),
                "in `pre_tokenizer`: Parsing error at position 1: ",
            ),
            (
                "/pre_tokenizer/pretokenizers/0/pattern",
                json!(5),
                "in `pre_tokenizer`: invalid type: number, expected string or map (tokenizer.json)",
            ),
            (
                "/pre_tokenizer/pretokenizers/0/pattern/Regex",
                json!("."),
                "unknown pre-tokenizer (probe digest ",
            ),
        ] {
            check(changed(pointer, value), 290, expected);
        }
        check(
            b"{}".to_vec(),
            290,
            "missing field `model` at line 1 column 2 (tokenizer.json)",
        );
        check(
            vec![0xff],
            290,
            "expected value at line 1 column 1 (tokenizer.json)",
        );
        check(
            changed("/version", json!("1.0")),
            0,
            "`vocab_size` must be 1 to 1048576, found 0 (config.json)",
        );
        check(
            changed("/version", json!("1.0")),
            usize::MAX,
            "`vocab_size` must be 1 to 1048576",
        );
    }

    #[test]
    fn tokens_of_white_space_may_follow_tokens_that_take_it() {
        let token = |id: u32, content: &str, rstrip: bool, lstrip: bool| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": lstrip,
                   "rstrip": rstrip, "normalized": false, "special": true})
        };
        // The probe has both, one after the other.
        let added = json!([
            token(288, "\n\n", true, false),
            token(289, "\n", false, true)
        ]);
        let files = TokenizerFiles {
            tokenizer_json: changed("/added_tokens", added),
            ..TokenizerFiles::default()
        };
        let tokenizer = Tokenizer::parse(&files, &Value::Null, 290, None).unwrap();
        assert_eq!(tokenizer.pre_tokenizer, "pixtral");
        assert_eq!(tokenizer.tokens[288].text, "\n\n");
    }

    #[test]
    fn a_given_name_wins_and_an_unknown_one_is_explained() {
        let tokenizer_json = changed("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("."));
        let files = TokenizerFiles {
            tokenizer_json,
            ..TokenizerFiles::default()
        };
        let named = Tokenizer::parse(&files, &Value::Null, 290, Some("tekken")).unwrap();
        assert_eq!(named.pre_tokenizer, "tekken");
        let error = Tokenizer::parse(&files, &Value::Null, 290, None).unwrap_err();
        assert!(error.hint.unwrap().contains("--pre-tokenizer NAME"));
    }
}
