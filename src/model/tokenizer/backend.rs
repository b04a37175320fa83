//! The encoder: Hugging Face's `tokenizers`, built from checked parts.
//!
//! Enters: a checked `tokenizer.json` and further added tokens. Leaves: ids of a text, and the
//! vocabulary as the runtime wants it. Reads no files.

use nemoconv_formats::{Error, Result};
use serde_json::{Value, json};
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;

use super::tokenizer_json::{BpeModel, TokenizerJson};
use super::{Token, TokenType};

/// An encoder and its vocabulary.
pub(super) struct Backend {
    encoder: tokenizers::Tokenizer,
}

/// One of the four steps around the model: its key, the key of its parts in a `Sequence`, and the
/// types a byte-level BPE tokenizer has there. The encoder knows more types, and panics in several
/// when they are malformed; none of them has a name at run time.
struct Stage {
    key: &'static str,
    parts: &'static str,
    types: &'static [&'static str],
}

const NORMALIZER: Stage = Stage {
    key: "normalizer",
    parts: "normalizers",
    types: &[
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "StripAccents",
        "BertNormalizer",
    ],
};
const PRE_TOKENIZER: Stage = Stage {
    key: "pre_tokenizer",
    parts: "pretokenizers",
    types: &[
        "Split",
        "ByteLevel",
        "Digits",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
    ],
};
const POST_PROCESSOR: Stage = Stage {
    key: "post_processor",
    parts: "processors",
    types: &[
        "ByteLevel",
        "TemplateProcessing",
        "RobertaProcessing",
        "BertProcessing",
    ],
};
const DECODER: Stage = Stage {
    key: "decoder",
    parts: "decoders",
    types: &["ByteLevel", "ByteFallback", "Fuse"],
};

impl Stage {
    /// A tokenizer that has this stage and knows no token. Whole ones are what `tokenizers` reads with code of its own; to
    /// read a stage by itself, its whole parser would be compiled here once more.
    fn alone(&self, value: Value) -> Result<tokenizers::Tokenizer> {
        if !value.is_null() {
            self.check(&value)?;
        }
        let model = json!({"type": "BPE", "vocab": {}, "merges": []});
        let tokenizer = json!({"model": model, self.key: value}).to_string();
        tokenizer.parse().map_err(|error: tokenizers::Error| {
            // The place is one in the text above, which nobody has.
            let error = error.to_string();
            let what = error.split(" at line ").next().unwrap_or_default();
            Error::malformed(format!("in `{}`: {what}", self.key))
        })
    }

    fn check(&self, value: &Value) -> Result<()> {
        match value.get("type").and_then(Value::as_str) {
            Some("Sequence") => {
                let parts = value.get(self.parts).and_then(Value::as_array);
                parts
                    .into_iter()
                    .flatten()
                    .try_for_each(|part| self.check(part))
            }
            Some(name) if self.types.contains(&name) => Ok(()),
            name => {
                let (key, types, found) = (self.key, self.types, name.unwrap_or("no type"));
                Err(Error::unsupported(format!(
                    "`{key}` must be one of {types:?}, found {found}"
                )))
            }
        }
    }
}

impl Backend {
    pub(super) fn new(json: TokenizerJson, additions: &[AddedToken]) -> Result<Self> {
        let mut encoder = tokenizers::Tokenizer::new(bpe(json.model)?);
        let normalizer = NORMALIZER.alone(json.normalizer)?;
        encoder
            .with_normalizer(normalizer.get_normalizer().cloned())
            .map_err(refused)?;
        let pre_tokenizer = PRE_TOKENIZER.alone(json.pre_tokenizer)?;
        encoder.with_pre_tokenizer(pre_tokenizer.get_pre_tokenizer().cloned());
        let post_processor = POST_PROCESSOR.alone(json.post_processor)?;
        encoder.with_post_processor(post_processor.get_post_processor().cloned());
        let decoder = DECODER.alone(json.decoder)?;
        encoder.with_decoder(decoder.get_decoder().cloned());
        encoder
            .add_tokens(
                json.added_tokens
                    .into_iter()
                    .map(|entry| bounded(entry.token)),
            )
            .map_err(refused)?;
        encoder
            .add_tokens(additions.iter().cloned().map(bounded))
            .map_err(refused)?;
        Ok(Self { encoder })
    }

    /// Whether special tokens in a text are taken apart like any other text.
    pub(super) fn split_special_tokens(&mut self, split: bool) {
        self.encoder.set_encode_special_tokens(split);
    }

    /// The encoder itself.
    pub(super) fn into_encoder(self) -> tokenizers::Tokenizer {
        self.encoder
    }

    /// The ids of `text`, with whatever the post-processor puts around it.
    pub(super) fn prompt_ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .encoder
            .encode(text, true)
            .map_err(refused)?
            .get_ids()
            .to_vec())
    }

    /// Every id below `token_count`; ids no token has become `[PADi]`.
    pub(super) fn tokens(&self, token_count: usize) -> Result<Vec<Token>> {
        let mut texts: Vec<Option<String>> = vec![None; token_count];
        for (text, id) in self.encoder.get_vocab(true) {
            let Some(place) = texts.get_mut(id as usize) else {
                return Err(Error::malformed(format!(
                    "special token {text:?} is not in the vocabulary and there is no id left for it \
                     (the model has {token_count} tokens)"
                )));
            };
            if let Some(other) = place.replace(text) {
                return Err(Error::malformed(format!(
                    "id {id} belongs to {other:?} and another token"
                )));
            }
        }
        let added = self.encoder.get_added_tokens_decoder();
        let token = |(id, text): (usize, Option<String>)| {
            let Some(text) = text else {
                return Ok(Token {
                    text: format!("[PAD{id}]"),
                    token_type: TokenType::Unused,
                });
            };
            match u32::try_from(id).ok().and_then(|id| added.get(&id)) {
                Some(added) => self.added_token(added, text),
                None => Ok(Token {
                    text,
                    token_type: TokenType::Normal,
                }),
            }
        };
        texts.into_iter().enumerate().map(token).collect()
    }

    /// The runtime expects added tokens as the text they stand for.
    fn added_token(&self, added: &AddedToken, mut text: String) -> Result<Token> {
        if !added.normalized {
            let encoding = self.encoder.encode(text, false).map_err(refused)?;
            text = self
                .encoder
                .decode(encoding.get_ids(), false)
                .map_err(refused)?;
        }
        if added.special || looks_special(&text) {
            return Ok(Token {
                text,
                token_type: TokenType::Control,
            });
        }
        Ok(Token {
            text: text.replace('\u{2581}', " "),
            token_type: TokenType::UserDefined,
        })
    }
}

/// Without `rstrip`: the encoder panics where a token that takes the white space after it is followed
/// by a token of white space. The flag is not stored, and changes nothing where a text is one token.
fn bounded(token: AddedToken) -> AddedToken {
    token.rstrip(false)
}

/// Tokens that some publishers forgot to mark as special; the stock converter's list.
fn looks_special(text: &str) -> bool {
    let framed = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || framed("<|", "|>")
        || framed("<\u{ff5c}", "\u{ff5c}>")
        || framed("<unused", ">")
}

fn bpe(model: BpeModel) -> Result<BPE> {
    let merges = model
        .merges
        .into_iter()
        .map(|merge| (merge.left, merge.right))
        .collect();
    let mut builder = BPE::builder()
        .vocab_and_merges(
            model
                .vocab
                .into_iter()
                .collect::<tokenizers::models::bpe::Vocab>(),
            merges,
        )
        // Two texts are encoded in all, and a cache would outlive the encoder.
        .cache_capacity(0)
        .fuse_unk(model.fuse_unk.unwrap_or(false))
        .byte_fallback(model.byte_fallback.unwrap_or(false))
        .ignore_merges(model.ignore_merges.unwrap_or(false));
    if let Some(unk_token) = model.unk_token {
        builder = builder.unk_token(unk_token);
    }
    builder.build().map_err(refused)
}

pub(super) fn refused(error: tokenizers::Error) -> Error {
    Error::malformed(format!("the tokenizer does not work: {error}"))
}
