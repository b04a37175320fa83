//! Any tokenizer.json and tokenizer_config.json: what is accepted fills the vocabulary and no more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nemoconv::formats::gguf::Metadata;
use nemoconv::model::tokenizer::{Tokenizer, TokenizerFiles};
use nemoconv::write::gguf::tokenizer_keys::tokenizer_keys;
use serde_json::{Value, json};

const VOCAB_SIZE: usize = 60;
const TOKEN_COUNT: usize = 64;

// The two files, one NUL between them; JSON has none.
fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let tokenizer_json = parts.next().unwrap_or_default().to_vec();
    let config = parts
        .next()
        .and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
    let files = TokenizerFiles {
        tokenizer_json,
        tokenizer_config: config.and_then(|config| config.as_object().cloned()),
        ..TokenizerFiles::default()
    };
    let config = json!({"pad_token_id": 0});
    // Unnamed first: the probe runs, and mostly ends in an unknown digest.
    let _ = Tokenizer::parse(&files, &config, VOCAB_SIZE, None);
    match Tokenizer::parse(&files, &config, VOCAB_SIZE, Some("pixtral")) {
        Ok(tokenizer) => {
            assert_eq!(tokenizer.tokens.len(), TOKEN_COUNT);
            tokenizer_keys(&tokenizer, &mut Metadata::new());
        }
        Err(error) => assert!(error.place.path.is_some(), "{error}"),
    }
});
