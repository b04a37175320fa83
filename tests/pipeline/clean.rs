//! No false alarms: what the converter writes is found whole, in every type and shape of model.

use std::path::Path;

use nemoconv_fixtures::checkpoint::cases;
use nemoconv_fixtures::{models, nano};
use tempfile::tempdir;

use super::faults;
use crate::support::to_gguf;

const TYPES: [&str; 23] = [
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q2_k_s",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "mxfp4_moe",
    "tq1_0",
    "tq2_0",
];

/// Converts and validates with and without the source.
#[track_caller]
fn check(model: &Path, flags: &[&str]) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    to_gguf(model, &path, flags);
    for reference in [None, Some(model)] {
        let faults = faults(&path, reference);
        assert_eq!(faults, [], "{flags:?} {}", model.display());
    }
}

#[test]
fn every_type() {
    for model in models() {
        for file_type in TYPES {
            check(&model, &["-t", file_type]);
        }
    }
}

#[test]
fn every_shape_of_model() {
    let folder = tempdir().unwrap();
    for case in cases() {
        let model = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        assert_eq!(faults(&model, None), [], "{}", case.name);
        check(&model, &["-t", "auto"]);
        check(&model, &["-t", "q8_0", "--allow-fallback"]);
        check(
            &model,
            &["-t", "q4_k_m", "--widen", "--no-mtp", "--allow-fallback"],
        );
        check(&model, &["-t", "f32", "--widen", "--no-mtp"]);
        check(&model, &["-t", "bf16", "--widen", "--no-mtp"]);
    }
}

#[test]
fn split_sets_and_references_in_gguf() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    to_gguf(&nano(), &path("bf16.gguf"), &["-t", "bf16"]);
    let split = ["-t", "q4_k_m", "--split-max-tensors", "10"];
    to_gguf(&nano(), &path("split.gguf"), &split);
    let first = path("split-00001-of-00004.gguf");
    for reference in [nano(), path("bf16.gguf"), first.clone()] {
        assert_eq!(faults(&first, Some(&reference)), []);
    }
    // Equal widening on both sides has nothing to undo.
    let odd = cases()
        .into_iter()
        .find(|case| case.name == "odd-widths")
        .unwrap();
    let odd = odd.checkpoint.write_as(folder.path(), "odd").unwrap();
    let fallback = "--allow-fallback";
    to_gguf(&odd, &path("wide.gguf"), &["-t", "f32", "--widen"]);
    to_gguf(&odd, &path("narrow.gguf"), &["-t", "f32"]);
    to_gguf(
        &odd,
        &path("q4.gguf"),
        &["-t", "q4_k_m", "--widen", fallback],
    );
    for reference in ["wide.gguf", "narrow.gguf"] {
        assert_eq!(faults(&path("q4.gguf"), Some(&path(reference))), []);
        assert_eq!(faults(&path("wide.gguf"), Some(&path(reference))), []);
        assert_eq!(faults(&path("narrow.gguf"), Some(&path(reference))), []);
    }
}
