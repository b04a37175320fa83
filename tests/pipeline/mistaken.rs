//! The wrong file, the wrong reference, the wrong tokenizer: a finding or an error, never a panic.

use std::path::Path;

use nemoconv::formats::gguf::{Array, Value};
use nemoconv::report::Severity;
use nemoconv::validate::static_levels;
use nemoconv_fixtures::checkpoint::RandomCheckpoint;
use nemoconv_fixtures::nano;
use tempfile::tempdir;

use super::damage::Editable;
use super::{expect, faults};
use crate::support::to_gguf;

#[test]
fn another_model_as_reference() {
    let folder = tempdir().unwrap();
    let write = |name: &str, checkpoint: &RandomCheckpoint| {
        checkpoint.write_as(folder.path(), name).unwrap()
    };
    let model = write("a", &RandomCheckpoint::default());
    let seed = RandomCheckpoint {
        seed: 1,
        ..RandomCheckpoint::default()
    };
    let blocks = RandomCheckpoint {
        pattern: "M-M".into(),
        ..RandomCheckpoint::default()
    };
    let width = RandomCheckpoint {
        intermediate_size: 768,
        ..RandomCheckpoint::default()
    };
    for file_type in ["bf16", "q4_k_m", "q2_k"] {
        let path = folder.path().join("m.gguf");
        to_gguf(&model, &path, &["-t", file_type]);
        for (name, other, words) in [
            ("seed", &seed, "hold other weights than the reference"),
            ("blocks", &blocks, "of other kinds or of another number"),
            ("width", &width, "has shape"),
        ] {
            let faults = faults(&path, Some(&write(name, other)));
            let different = faults
                .iter()
                .find(|f| f.rule.id() == "weights/different-models");
            let different = different.unwrap_or_else(|| panic!("{name} {file_type}: {faults:#?}"));
            assert!(different.message.contains(words), "{different:?}");
        }
    }
}

const TOKENS: &str = "tokenizer.ggml.tokens";

fn change_tokens(gguf: &mut Editable, change: impl FnOnce(&mut Vec<String>)) {
    let Some(Value::Array(Array::String(tokens))) = gguf.metadata.get(TOKENS) else {
        panic!("tokens are strings");
    };
    let mut tokens = tokens.clone();
    change(&mut tokens);
    gguf.metadata.set(TOKENS, tokens);
}

#[test]
fn a_vocabulary_of_another_model() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let check = |change: fn(&mut Editable), id: &str, key: &str, words: &str| {
        to_gguf(&nano(), &path, &["-t", "q8_0"]);
        let mut gguf = Editable::read(&path);
        change(&mut gguf);
        gguf.write(&path);
        expect(&faults(&path, Some(&nano())), id, key, &[words]);
    };
    let differs = "tokenizer/vocabulary-differs";
    let swap = |gguf: &mut Editable| change_tokens(gguf, |tokens| tokens.swap(700, 701));
    let cut = |gguf: &mut Editable| change_tokens(gguf, |tokens| tokens.truncate(1000));
    check(swap, differs, TOKENS, "2 tokens differ, first token 700");
    check(
        cut,
        differs,
        TOKENS,
        "there are 1000 tokens, and the embedding has 1024 rows",
    );
    const BOS: &str = "tokenizer.ggml.bos_token_id";
    let special = "tokenizer/special-id-differs";
    check(
        |gguf| gguf.metadata.set(BOS, 2u32),
        special,
        BOS,
        "is 2, the reference has 1",
    );
    check(
        |gguf| gguf.metadata.set(BOS, 2000u32),
        special,
        BOS,
        "there are 1024 tokens",
    );
}

#[test]
fn files_that_are_cut_or_no_models() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    to_gguf(&nano(), &path, &["-t", "q4_k_m"]);
    let whole = std::fs::read(&path).unwrap();
    for bytes in [0, 3, 20, 5000, 40_000, whole.len() / 2, whole.len() - 1000] {
        std::fs::write(&path, &whole[..bytes]).unwrap();
        let faults = faults(&path, Some(&nano()));
        let first = &faults[0];
        assert_eq!(first.severity, Severity::Error, "{bytes}: {faults:#?}");
        assert!(first.rule.id().starts_with("container/"), "{first:?}");
        assert!(first.place.file.is_some(), "{first:?}");
    }
    std::fs::write(&path, [&whole[..], &[0; 100]].concat()).unwrap();
    let trailing = faults(&path, None);
    assert_eq!(trailing[0].rule.id(), "container/trailing-bytes");
}

/// Header bytes turned over one by one: findings or none, but an answer.
#[test]
fn no_byte_of_the_header_makes_it_panic() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    to_gguf(&nano(), &path, &["-t", "q4_0"]);
    let whole = std::fs::read(&path).unwrap();
    let header = whole
        .windows(5)
        .rposition(|bytes| bytes == b"blk.4")
        .unwrap()
        + 64;
    let step = header / 150;
    for at in (0..header).step_by(step) {
        let mut file = whole.clone();
        file[at] = !file[at];
        std::fs::write(&path, file).unwrap();
        let answer = static_levels::inspect(path.to_str().unwrap(), None, None);
        assert!(answer.is_ok(), "byte {at:#x}: {}", answer.unwrap_err());
    }
}

#[test]
fn parts_that_are_missing_or_of_another_set() {
    let folder = tempdir().unwrap();
    let part = |index: usize| folder.path().join(format!("m-{index:05}-of-00004.gguf"));
    let convert = || {
        let flags = ["-t", "q8_0", "--split-max-tensors", "10"];
        to_gguf(&nano(), &folder.path().join("m.gguf"), &flags);
    };
    convert();
    let id = |path: &Path| faults(path, None)[0].rule.id();
    assert_eq!(id(&part(2)), "container/split-part-missing");
    std::fs::copy(part(3), part(2)).unwrap();
    assert_eq!(id(&part(1)), "container/contradicting-key");
    std::fs::remove_file(part(2)).unwrap();
    assert_eq!(id(&part(1)), "container/split-part-missing");
}

#[test]
fn what_is_not_there_is_an_error() {
    for (artifact, reference) in [
        ("/nonexistent.gguf".into(), None),
        (nano(), Some("/nonexistent")),
    ] {
        assert!(static_levels::inspect(artifact.to_str().unwrap(), reference, None).is_err());
    }
}
