//! What is saved is read back, and what is no sidecar is refused by name.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::rewrite::orthogonal;
use crate::rewrite::{RewriteSettings, Rewrites, Rotation, Space, SquareMatrix, sidecar_of};
use crate::write::whole_file::sha256_of;

fn some() -> Rewrites {
    let heads = Arc::new(orthogonal::hadamard(2, 0));
    let values = |block: usize| {
        let space = Space {
            scale: Some(vec![1.0, 0.25, 3.0, 1e-3]),
            rotation: Some(Arc::clone(&heads)),
            ..Space::unchanged(1, 4)
        };
        (format!("blk.{block}.attn_v"), space)
    };
    let experts = Space {
        scale: Some(vec![0.5; 6]),
        order: Some(vec![2, 0, 1, 0, 1, 2]),
        ..Space::unchanged(2, 3)
    };
    let others = [
        ("blk.1.ffn_up_exps".to_owned(), experts),
        ("output_norm".to_owned(), Space::unchanged(1, 12)),
    ];
    Rewrites {
        settings: RewriteSettings {
            rotation: Rotation::Hadamard,
            smoothing: true,
            seed: u64::MAX,
            ..RewriteSettings::default()
        },
        rotation: Some(orthogonal::hadamard(12, 3)),
        spaces: [values(0), values(3)].into_iter().chain(others).collect(),
    }
}

struct Saved {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn save(rewrites: &Rewrites) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.rewrites.safetensors");
    let sha256 = rewrites.save(&path).unwrap();
    assert_eq!(sha256, sha256_of(&path).unwrap());
    Saved {
        _folder: folder,
        path,
    }
}

#[test]
fn what_is_saved_is_read_back() {
    for rewrites in [some(), Rewrites::none()] {
        let saved = save(&rewrites);
        let found = Rewrites::open(&saved.path).unwrap();
        assert_eq!(found, rewrites);
        let again = save(&found);
        assert_eq!(
            sha256_of(&again.path).unwrap(),
            sha256_of(&saved.path).unwrap()
        );
    }
}

/// Opening what `change` makes of the file, or of the rewrites before they are saved, is an error with these words.
#[track_caller]
fn refuses(rewrites: &Rewrites, change: impl FnOnce(&mut Vec<u8>), words: &str) {
    let saved = save(rewrites);
    let mut bytes = std::fs::read(&saved.path).unwrap();
    change(&mut bytes);
    std::fs::write(&saved.path, bytes).unwrap();
    let error = Rewrites::open(&saved.path).unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(
        error.place().unwrap().path.as_deref(),
        Some(saved.path.as_path())
    );
}

fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes
        .windows(from.len())
        .position(|part| part == from.as_bytes())
        .unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn files_that_lie_are_refused() {
    let edit =
        |from: &'static str, to: &'static str| move |bytes: &mut Vec<u8>| replace(bytes, from, to);
    refuses(
        &some(),
        edit("\"version\":1", "\"version\":7"),
        "is of version 7, 1 is known",
    );
    refuses(
        &some(),
        edit("\"version\"", "\"versiom\""),
        "does not say what is rewritten",
    );
    refuses(
        &some(),
        edit("\"width\":4", "\"width\":5"),
        "shape must be [1, 5], found [1, 4]",
    );
    refuses(
        &some(),
        edit("\"width\":3", "\"width\":6"),
        "shape must be [2, 6], found [2, 3]",
    );
    refuses(
        &some(),
        edit("blk.0.attn_v.scale", "blk.0.attn_v.scalf"),
        "belongs to no rewrite",
    );
    refuses(
        &some(),
        edit("\"rewrites\":", "\"rewrjtes\":"),
        "`rewrites`: is missing",
    );
    refuses(
        &some(),
        edit("\"rotation\":{", "\"rotatiom\":{"),
        "belongs to no rewrite",
    );
    refuses(
        &some(),
        edit("\"blk.0.attn_v.rotation\":{", "\"blk.0.attn_v.rotatiom\":{"),
        "`blk.0.attn_v.rotation`",
    );
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    refuses(&some(), cut, "truncated");
    refuses(&some(), |bytes| bytes.clear(), "truncated");
}

#[test]
fn what_is_no_rewrite_is_refused() {
    let spoil = |name: &str, change: &dyn Fn(&mut Space)| {
        let mut rewrites = some();
        change(rewrites.spaces.get_mut(name).unwrap());
        rewrites
    };
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let spoiled = spoil("blk.0.attn_v", &|space| {
            space.scale = Some(vec![1.0, 1.0, wrong, 1.0])
        });
        refuses(
            &spoiled,
            |_| (),
            "`blk.0.attn_v.scale`: a factor is not positive",
        );
    }
    for wrong in [
        vec![2, 0, 1, 0, 1, 1],
        vec![2, 0, 3, 0, 1, 2],
        vec![5, 0, 1, 0, 1, 2],
    ] {
        let spoiled = spoil("blk.1.ffn_up_exps", &|space| {
            space.order = Some(wrong.clone())
        });
        refuses(&spoiled, |_| (), "is no permutation");
    }
    for wrong in [
        vec![1.0, 0.0, 0.0, 1.1],
        vec![1.0, 0.0, 1.0, 0.0],
        vec![f64::NAN; 4],
    ] {
        let mut spoiled = some();
        spoiled.rotation = Some(SquareMatrix::new(2, wrong));
        refuses(&spoiled, |_| (), "`rotation`: is not orthogonal");
    }
}

#[test]
fn rewrites_of_another_network_are_refused() {
    let nano = nemoconv_fixtures::nano();
    let model = crate::artifact::StoredModel::open(nano.to_str().unwrap()).unwrap();
    let error = some().check(model.config()).unwrap_err();
    assert!(error.hint().unwrap().contains("another model"), "{error}");
    // The model is not read with what does not fit it.
    let rewritten = crate::rewrite::RewrittenModel::new(Arc::new(model), Arc::new(some()));
    assert!(rewritten.matrix("token_embd.weight", 0).is_err());
    assert!(rewritten.matrix("output_norm.weight", 0).is_err());
}

#[test]
fn sidecars_are_named_after_artifacts() {
    let check = |artifact: &str, expected: &str| {
        assert_eq!(sidecar_of(Path::new(artifact)), Path::new(expected))
    };
    check("a/m.Q8_0.gguf", "a/m.Q8_0.rewrites.safetensors");
    check("m-00001-of-00003.gguf", "m.rewrites.safetensors");
    check("m-1-of-3.gguf", "m-1-of-3.rewrites.safetensors");
}
