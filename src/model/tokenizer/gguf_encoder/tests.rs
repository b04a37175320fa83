use nemoconv_formats::checkpoint::config_json;
use nemoconv_formats::gguf::{Array, Metadata, Value};
use sha2::{Digest, Sha256};

use super::*;
use crate::model::tokenizer::{Tokenizer, TokenizerFiles};
use crate::write::gguf::tokenizer_keys::tokenizer_keys;

/// Keys of the nano model's tokenizer, as the converter writes them, and the encoder of its files.
fn nano(pre_tokenizer: Option<&str>) -> (Metadata, TextEncoder) {
    let folder = nemoconv_fixtures::nano();
    let files = TokenizerFiles::read(&folder).unwrap();
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = config_json::parse(&config).unwrap();
    let tokenizer = Tokenizer::parse(&files, &config, 1024, pre_tokenizer).unwrap();
    let mut metadata = Metadata::new();
    tokenizer_keys(&tokenizer, &mut metadata);
    (metadata, TextEncoder::of_files(&files, 1024).unwrap())
}

const TEXT: &str = include_str!("../../../validate/multilingual.txt");

#[test]
fn ids_are_those_of_the_source() {
    let (metadata, source) = nano(None);
    let ours = TextEncoder::of_gguf(&metadata).unwrap();
    assert_eq!(ours.bos(), source.bos());
    for text in TEXT.split_inclusive('\n').chain([TEXT]) {
        for add_special in [false, true] {
            let ids = |encoder: &TextEncoder| encoder.encode(text, Some(add_special)).unwrap();
            assert_eq!(ids(&ours), ids(&source), "{text:?}");
        }
    }
}

/// What llama.cpp answers, for a vocabulary in which every boundary shows.
#[test]
fn ids_are_those_of_the_runtime() {
    let folder = nemoconv_fixtures::reference().join("runtime_tokenizer");
    let files = TokenizerFiles::read(&folder).unwrap();
    let expected = std::fs::read_to_string(folder.join("ids.tsv")).unwrap();
    let mut wrong = Vec::new();
    for line in expected.lines() {
        let [name, mode, count, digest] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("four fields: {line}");
        };
        let config = serde_json::Value::Null;
        let tokenizer = Tokenizer::parse(&files, &config, 1024, Some(name)).unwrap();
        let mut metadata = Metadata::new();
        tokenizer_keys(&tokenizer, &mut metadata);
        metadata.set("tokenizer.ggml.add_bos_token", false);
        let control_tokens = match mode {
            "tokens" => ControlTokens::AreTokens,
            _ => ControlTokens::AreText,
        };
        let encoder = from_gguf(&metadata, control_tokens).unwrap();
        let ids = encoder.encode(TEXT, false).unwrap().get_ids().to_vec();
        let digest_of = Sha256::digest(format!("{ids:?}"));
        let hex: String = digest_of.iter().map(|byte| format!("{byte:02x}")).collect();
        if (ids.len().to_string().as_str(), hex.as_str()) != (count, digest) {
            wrong.push(format!(
                "{name} {mode}: {} ids, expected {count}",
                ids.len()
            ));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
    assert!(expected.lines().count() >= 60);
}

#[test]
fn control_tokens_are_tokens_or_text() {
    let (metadata, _) = nano(None);
    let ids = |control_tokens| {
        let encoder = from_gguf(&metadata, control_tokens).unwrap();
        encoder.encode("a</s>", false).unwrap().get_ids().to_vec()
    };
    assert_eq!(ids(ControlTokens::AreTokens).last(), Some(&2));
    let text = ids(ControlTokens::AreText);
    assert!(text.len() > 2 && !text.contains(&2), "{text:?}");
}

#[test]
fn user_defined_tokens_are_always_found() {
    let (mut metadata, _) = nano(None);
    let Some(Value::Array(Array::I32(types))) = metadata.get(TOKEN_TYPES) else {
        panic!("types are i32");
    };
    let mut types = types.clone();
    types[2] = 4;
    metadata.set(TOKEN_TYPES, types);
    let encoder = from_gguf(&metadata, ControlTokens::AreText).unwrap();
    let ids = encoder.encode("a</s>", false).unwrap().get_ids().to_vec();
    assert_eq!(ids.last(), Some(&2));
}

#[test]
fn a_prompt_gets_what_the_keys_say() {
    let check = |change: fn(&mut Metadata), around: (bool, bool)| {
        let (mut metadata, _) = nano(None);
        change(&mut metadata);
        let encoder = from_gguf(&metadata, ControlTokens::AreTokens).unwrap();
        let ids = encoder.encode("a", true).unwrap().get_ids().to_vec();
        assert_eq!((ids[0] == 1, ids[ids.len() - 1] == 2), around);
    };
    check(|_| (), (true, false));
    check(
        |m| m.set("tokenizer.ggml.add_bos_token", false),
        (false, false),
    );
    check(
        |m| m.set("tokenizer.ggml.add_eos_token", true),
        (true, true),
    );
    check(
        |m| drop(m.remove("tokenizer.ggml.add_bos_token")),
        (true, false),
    );
    check(
        |m| {
            m.remove("tokenizer.ggml.add_bos_token");
            m.set("tokenizer.ggml.pre", "gpt-2");
        },
        (false, false),
    );
}

#[test]
fn every_known_name_splits_without_loss() {
    let digests = include_str!("../pre_tokenizer_digests.tsv");
    let names = digests.lines().filter_map(|line| line.split_once('\t'));
    let mut known = 0;
    for (_, name) in names.filter(|(_, name)| RuntimeSplits::of(name).is_some()) {
        let (mut metadata, _) = nano(None);
        metadata.set("tokenizer.ggml.pre", name);
        let encoder = from_gguf(&metadata, ControlTokens::AreText).unwrap();
        let ids = encoder.encode(TEXT, false).unwrap().get_ids().to_vec();
        assert_eq!(encoder.decode(&ids, false).unwrap(), TEXT, "{name}");
        known += 1;
    }
    assert!(known > 60, "{known} names");
}

#[test]
fn what_cannot_be_built_names_its_key() {
    let check = |change: &dyn Fn(&mut Metadata), expected: &str| {
        let (mut metadata, _) = nano(None);
        change(&mut metadata);
        let error = from_gguf(&metadata, ControlTokens::AreTokens).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    check(
        &|m| m.set("tokenizer.ggml.model", "llama"),
        "`tokenizer.ggml.model`: expected `gpt2` (byte-level BPE), found `llama`",
    );
    check(
        &|m| m.set("tokenizer.ggml.pre", "nobody"),
        "`tokenizer.ggml.pre`: pre-tokenizer `nobody` is not known",
    );
    check(
        &|m| m.set("tokenizer.ggml.merges", vec!["a".to_string()]),
        "`tokenizer.ggml.merges`: merge 0 (\"a\") is not two tokens",
    );
    check(
        &|m| m.set("tokenizer.ggml.merges", vec!["a \u{4e00}".to_string()]),
        "`tokenizer.ggml.merges`: merge 0 (\"a \u{4e00}\") needs the token \"\u{4e00}\"",
    );
    check(
        &|m| m.set("tokenizer.ggml.bos_token_id", 5000u32),
        "`tokenizer.ggml.bos_token_id`: is 5000, but there are 1024 tokens",
    );
    check(
        &|m| drop(m.remove("tokenizer.ggml.tokens")),
        "`tokenizer.ggml.tokens`: key is missing",
    );
    check(
        &|m| m.set(TOKEN_TYPES, vec![1i32]),
        "`tokenizer.ggml.token_type`: 1 types for 1024 tokens",
    );
}
