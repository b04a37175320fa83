//! Text to token ids, as `AutoTokenizer` of transformers 5 encodes it.
//!
//! Enters: the tokenizer's files, or an encoder built elsewhere. Leaves: ids. Knows no benchmark and no prompt.

use nemoconv_formats::{Error, Result};
use serde_json::{Map, Value};

use super::backend::{Backend, refused};
use super::tokenizer_json::TokenizerJson;
use super::{TokenizerFiles, added_tokens, padded_vocab_size};

/// A special token that a tokenizer names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedToken {
    /// As it is written in text.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// A tokenizer that encodes.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    tokenizer: tokenizers::Tokenizer,
    bos: Option<NamedToken>,
    eos: Option<NamedToken>,
    pad: Option<NamedToken>,
    max_length: Option<usize>,
}

/// Longer lengths mean "no limit": tokenizer libraries write numbers such as 10^30 for it.
const MAX_MEANT_LENGTH: u64 = 1 << 40;

impl TextEncoder {
    /// From the files of a checkpoint folder; `vocab_size` is the rows of the model's embedding.
    ///
    /// The post-processor of `tokenizer.json` alone decides what is added: transformers drops `add_bos_token` and
    /// `add_eos_token` of tokenizer_config.json where there is a `tokenizer.json`.
    ///
    /// # Errors
    /// JSON that is not a byte-level BPE tokenizer, ids outside the vocabulary or given twice.
    ///
    /// Source: transformers 5 `tokenization_utils_base.py` (`_from_pretrained`). Departs from it for added tokens with `rstrip`: the flag is not kept.
    pub fn of_files(files: &TokenizerFiles, vocab_size: usize) -> Result<Self> {
        let in_file = |error: Error| error.in_file("tokenizer.json");
        let token_count = padded_vocab_size(vocab_size)?;
        let json = TokenizerJson::parse(&files.tokenizer_json, token_count).map_err(in_file)?;
        let settings = Settings::of(files);
        let added = added_tokens::in_force(&json.added_tokens, files)?;
        let mut backend = Backend::new(json, &added).map_err(in_file)?;
        backend.split_special_tokens(files.splits_special_tokens());
        let tokenizer = backend.into_encoder();
        let mut encoder = Self::new(tokenizer, settings.bos, settings.eos, settings.pad);
        encoder.max_length = settings.max_length;
        Ok(encoder)
    }

    /// From an encoder built elsewhere; names that its vocabulary lacks are dropped.
    pub fn new(
        tokenizer: tokenizers::Tokenizer,
        bos: Option<String>,
        eos: Option<String>,
        pad: Option<String>,
    ) -> Self {
        let named = |text: Option<String>| {
            let text = text?;
            let id = tokenizer.token_to_id(&text)?;
            Some(NamedToken { text, id })
        };
        Self {
            bos: named(bos),
            eos: named(eos),
            pad: named(pad),
            max_length: None,
            tokenizer,
        }
    }

    /// The ids of `text`, with what the post-processor puts around it unless `add_special` is false. A text that
    /// begins with the prefix token's text gets nothing around it.
    ///
    /// # Errors
    /// The encoder refuses the text.
    pub fn encode(&self, text: &str, add_special: Option<bool>) -> Result<Vec<u32>> {
        let prefix = self.prefix_token();
        let has_prefix = prefix.is_some_and(|prefix| text.starts_with(&prefix.text));
        let add_special = add_special.unwrap_or(true) && !has_prefix;
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// What stands before a text that nothing precedes: BOS, else EOS.
    pub fn prefix_token(&self) -> Option<&NamedToken> {
        self.bos.as_ref().or(self.eos.as_ref())
    }

    /// Beginning of text.
    pub fn bos(&self) -> Option<&NamedToken> {
        self.bos.as_ref()
    }

    /// End of text.
    pub fn eos(&self) -> Option<&NamedToken> {
        self.eos.as_ref()
    }

    /// Padding.
    pub fn pad(&self) -> Option<&NamedToken> {
        self.pad.as_ref()
    }

    /// `model_max_length`, where it is meant.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }
}

/// What tokenizer_config.json and its companion say.
struct Settings {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    max_length: Option<usize>,
}

impl Settings {
    fn of(files: &TokenizerFiles) -> Self {
        let mut config = files.tokenizer_config.clone().unwrap_or_default();
        if !config.contains_key("added_tokens_decoder") {
            config.extend(files.special_tokens_map.clone().unwrap_or_default());
        }
        let max_length = config.get("model_max_length").and_then(Value::as_u64);
        Self {
            bos: token_text(&config, "bos_token"),
            eos: token_text(&config, "eos_token"),
            pad: token_text(&config, "pad_token"),
            max_length: max_length
                .filter(|length| *length < MAX_MEANT_LENGTH)
                .and_then(|length| usize::try_from(length).ok()),
        }
    }
}

/// A token given as text, or as an object with `content`.
fn token_text(config: &Map<String, Value>, key: &str) -> Option<String> {
    let value = config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    Some(text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The nano model's tokenizer with another tokenizer_config.json, and with or without post-processor.
    fn encoder(config: &Value, with_post_processor: bool) -> TextEncoder {
        let mut files = TokenizerFiles::read(&nemoconv_fixtures::nano()).unwrap();
        let mut json: Value = serde_json::from_slice(&files.tokenizer_json).unwrap();
        if !with_post_processor {
            json["post_processor"] = Value::Null;
        }
        files.tokenizer_json = json.to_string().into_bytes();
        files.tokenizer_config = config.as_object().cloned();
        files.special_tokens_map = None;
        let vocab_size = json["model"]["vocab"].as_object().unwrap().len();
        TextEncoder::of_files(&files, vocab_size).unwrap()
    }

    fn config(flags: Value) -> Value {
        let mut config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let map = config.as_object_mut().unwrap();
        map.extend(flags.as_object().unwrap().clone());
        config
    }

    /// Each expectation is what transformers 5.23 answers.
    #[test]
    fn only_the_post_processor_adds_tokens() {
        let check = |flags: Value, with_post_processor, first: &[u32]| {
            let encoder = encoder(&config(flags), with_post_processor);
            let plain = [96, 301];
            assert_eq!(encoder.encode("a b", Some(false)).unwrap(), plain);
            let expected = [first, &plain].concat();
            assert_eq!(encoder.encode("a b", None).unwrap(), expected);
            assert_eq!(encoder.encode("a b", Some(true)).unwrap(), expected);
        };
        check(json!({}), true, &[1]);
        check(json!({}), false, &[]);
        check(json!({"add_bos_token": false}), true, &[1]);
        check(json!({"add_bos_token": true}), false, &[]);
        check(json!({"add_eos_token": true}), true, &[1]);
    }

    #[test]
    fn a_text_that_begins_with_the_prefix_token_gets_no_second_one() {
        let check = |config: Value, text, count: usize| {
            let ids = encoder(&config, true).encode(text, None).unwrap();
            assert_eq!(ids.iter().filter(|id| **id == 1).count(), count, "{text}");
        };
        check(config(json!({})), "a", 1);
        check(config(json!({})), "<s>a", 1);
        check(config(json!({})), "a<s>", 2);
        check(json!({"eos_token": "</s>"}), "<s>a", 2);
        check(json!({"eos_token": "</s>"}), "</s>a", 0);
    }

    #[test]
    fn named_tokens_have_ids() {
        let encoder = encoder(&json!({"bos_token": "<s>"}), true);
        assert_eq!(encoder.bos().unwrap().id, 1);
        assert_eq!(encoder.prefix_token(), encoder.bos());
        assert_eq!(encoder.eos(), None);
        assert_eq!(encoder.pad(), None);
    }
}
