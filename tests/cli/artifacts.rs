//! What a conversion leaves behind: the same bytes always, split sets, receipts.

use std::path::Path;

use nemoconv::formats::GgmlType;
use nemoconv::formats::gguf::{Gguf, Value};
use nemoconv_fixtures::checkpoint::{Naming, RandomCheckpoint};
use nemoconv_fixtures::{models, nano};
use tempfile::tempdir;

use crate::support::{nemoconv, stderr, to_gguf};

#[test]
fn the_bytes_do_not_depend_on_threads_or_on_the_run() {
    let folder = tempdir().unwrap();
    for file_type in ["bf16", "q8_0", "q4_k_m", "iq4_xs"] {
        let bytes = |name: &str, threads: &str| {
            let path = folder.path().join(name);
            to_gguf(&nano(), &path, &["-t", file_type, "--threads", threads]);
            std::fs::read(path).unwrap()
        };
        let one = bytes("one.gguf", "1");
        assert!(
            one == bytes("again.gguf", "1"),
            "{file_type}: two runs differ"
        );
        assert!(
            one == bytes("five.gguf", "5"),
            "{file_type}: threads change the bytes"
        );
    }
}

#[test]
fn a_sharded_checkpoint_gives_the_same_tensors() {
    let models = models();
    let find = |name: &str| models.iter().find(|model| model.ends_with(name));
    let (Some(single), Some(sharded)) = (find("nemotron-h-tiny"), find("nemotron-h-tiny-sharded"))
    else {
        println!("skipped: NEMOCONV_SHARED does not hold the larger models");
        return;
    };
    let folder = tempdir().unwrap();
    let tensors = |model: &Path, name: &str| {
        let path = folder.path().join(name);
        to_gguf(model, &path, &["-t", "q4_k_m"]);
        let gguf = Gguf::open(&path).unwrap();
        let bytes = gguf
            .header()
            .tensors
            .iter()
            .map(|t| (t.name.clone(), gguf.tensor_bytes(t).to_vec()));
        bytes.collect::<Vec<_>>()
    };
    assert!(tensors(single, "a.gguf") == tensors(sharded, "b.gguf"));
}

#[test]
fn names_shards_and_stacks_do_not_change_the_tensors() {
    let separate = RandomCheckpoint {
        pattern: "ME*".into(),
        ..RandomCheckpoint::default()
    };
    let stacked = RandomCheckpoint {
        naming: Naming::Transformers,
        stacked_experts: true,
        shard_bytes: 1_000_000,
        ..separate.clone()
    };
    let folder = tempdir().unwrap();
    let tensors = |checkpoint: &RandomCheckpoint, name: &str| {
        let model = checkpoint.write_as(folder.path(), name).unwrap();
        let path = folder.path().join(format!("{name}.gguf"));
        to_gguf(&model, &path, &["-t", "q4_k_m"]);
        let gguf = Gguf::open(&path).unwrap();
        let bytes = gguf
            .header()
            .tensors
            .iter()
            .map(|t| (t.name.clone(), gguf.tensor_bytes(t).to_vec()));
        bytes.collect::<Vec<_>>()
    };
    assert!(tensors(&separate, "separate") == tensors(&stacked, "stacked"));
}

#[test]
fn a_split_set_holds_the_same_tensors() {
    let folder = tempdir().unwrap();
    let whole = folder.path().join("whole.gguf");
    to_gguf(&nano(), &whole, &["-t", "q8_0"]);
    to_gguf(
        &nano(),
        &folder.path().join("split.gguf"),
        &["-t", "q8_0", "--split-max-tensors", "10"],
    );
    let whole = Gguf::open(&whole).unwrap();
    let mut tensors = whole.header().tensors.iter();
    for part in 1..=4 {
        let path = folder.path().join(format!("split-{part:05}-of-00004.gguf"));
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(
            gguf.header().metadata.get("split.no"),
            Some(&Value::U16(part - 1))
        );
        assert_eq!(
            gguf.header().metadata.get("split.count"),
            Some(&Value::U16(4))
        );
        assert_eq!(
            gguf.header().metadata.get("general.name").is_some(),
            part == 1
        );
        for tensor in &gguf.header().tensors {
            let same = tensors.next().unwrap();
            assert_eq!(tensor.name, same.name);
            assert!(
                gguf.tensor_bytes(tensor) == whole.tensor_bytes(same),
                "{}",
                tensor.name
            );
        }
    }
    assert!(tensors.next().is_none());
}

#[test]
fn overrides_and_kept_types_are_obeyed() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let flags = [
        "-t",
        "q4_k_m",
        "--tensor-type",
        "ssm_in=q6_k",
        "--token-embedding-type",
        "q8_0",
    ];
    to_gguf(
        &nano(),
        &path,
        &[&flags[..], &["--leave-output-tensor"]].concat(),
    );
    let gguf = Gguf::open(&path).unwrap();
    let type_of = |name: &str| {
        gguf.header()
            .tensors
            .iter()
            .find(|t| t.name == name)
            .unwrap()
            .ty
    };
    assert_eq!(type_of("blk.0.ssm_in.weight"), GgmlType::Q6_K);
    assert_eq!(type_of("token_embd.weight"), GgmlType::Q8_0);
    assert_eq!(type_of("output.weight"), GgmlType::BF16);
    assert_eq!(type_of("blk.0.ssm_out.weight"), GgmlType::Q4_K);
}

#[test]
fn the_receipt_accounts_for_every_source_tensor() {
    let folder = tempdir().unwrap();
    to_gguf(&nano(), &folder.path().join("m.gguf"), &["-t", "q8_0"]);
    let receipt = std::fs::read_to_string(folder.path().join("m.receipt.json")).unwrap();
    let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
    let tensors = receipt["source"]["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 32);
    assert!(tensors.iter().all(|tensor| tensor["fate"] == "written"));
    let bytes = std::fs::metadata(folder.path().join("m.gguf"))
        .unwrap()
        .len();
    assert_eq!(receipt["file_bytes"], bytes);
}

#[test]
fn a_dry_run_promises_the_exact_size_and_writes_nothing() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let plan = |verb: &str, extra: &[&str]| {
        let model = nano();
        let mut args = vec![
            verb,
            model.to_str().unwrap(),
            "-o",
            path.to_str().unwrap(),
            "-t",
            "q5_k_m",
            "--json",
        ];
        args.extend(extra);
        let output = nemoconv(args);
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let planned = plan("plan", &[]);
    assert_eq!(planned, plan("to-gguf", &["--dry-run"]));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    to_gguf(&nano(), &path, &["-t", "q5_k_m"]);
    assert_eq!(
        planned["file_bytes"],
        std::fs::metadata(&path).unwrap().len()
    );
}
