//! Phases, recipes and targets: what they make of a model, what is printed, what is refused.

use std::path::{Path, PathBuf};

use nemoconv::formats::GgmlType;
use nemoconv::formats::gguf::{Gguf, Value};
use nemoconv_fixtures::nano;
use tempfile::tempdir;

use crate::support::{nemoconv, stderr, to_gguf, try_to_gguf};

/// Standard output of a run on the small model that must succeed.
fn stdout(verb: &str, flags: &[&str]) -> String {
    let model = nano();
    let output = nemoconv([&[verb, model.to_str().unwrap(), "-q"], flags].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn type_of(gguf: &Gguf, name: &str) -> GgmlType {
    let tensors = &gguf.header().tensors;
    tensors
        .iter()
        .find(|tensor| tensor.name == name)
        .unwrap()
        .ty
}

/// A text that is long enough to calibrate on.
fn text(folder: &Path) -> PathBuf {
    let path = folder.join("text.txt");
    std::fs::write(&path, include_str!("../../src/ARCHITECTURE.md")).unwrap();
    path
}

#[test]
fn phases_name_their_files_and_choose_types_by_role() {
    use GgmlType::{F32, Q4_K, Q6_K, Q8_0};
    let folder = tempdir().unwrap();
    let check = |phase: &str, name: &str, file_type: u32, expected: [GgmlType; 5]| {
        to_gguf(
            &nano(),
            &folder.path().join("{ftype}.gguf"),
            &["--phase", phase],
        );
        let gguf = Gguf::open(&folder.path().join(name)).unwrap();
        let key = gguf.header().metadata.get("general.file_type");
        assert_eq!(key, Some(&Value::U32(file_type)), "{phase}");
        let tensors = [
            "token_embd",
            "output",
            "blk.0.ssm_in",
            "blk.1.ffn_up",
            "blk.0.ssm_conv1d",
        ];
        let types = tensors.map(|name| type_of(&gguf, &format!("{name}.weight")));
        assert_eq!(types, expected, "{phase}");
    };
    check("1", "w8a8.gguf", 7, [Q8_0, Q8_0, Q8_0, Q8_0, F32]);
    check("2", "w4a8.gguf", 15, [Q8_0, Q6_K, Q4_K, Q4_K, F32]);
    check("3", "w4a8-mixed.gguf", 7, [Q8_0, Q8_0, Q4_K, Q8_0, F32]);
}

#[test]
fn head_and_embedding_can_be_kept_in_any_phase() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let flags = [
        "--phase",
        "2",
        "--output-tensor-type",
        "keep",
        "--token-embedding-type",
        "keep",
    ];
    to_gguf(&nano(), &path, &flags);
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(type_of(&gguf, "token_embd.weight"), GgmlType::BF16);
    assert_eq!(type_of(&gguf, "output.weight"), GgmlType::BF16);
}

#[test]
fn a_printed_recipe_gives_the_same_plan() {
    let folder = tempdir().unwrap();
    let recipe = folder.path().join("recipe.yaml");
    let flags = [
        "--phase",
        "3",
        "--tensor-type",
        r"blk\.0\.ssm_out=q6_k",
        "--seed",
        "7",
    ];
    let printed = stdout("to-gguf", &[&flags[..], &["--print-recipe"]].concat());
    insta::assert_snapshot!("print_recipe", printed);
    std::fs::write(&recipe, &printed).unwrap();
    let from_file = ["--recipe", recipe.to_str().unwrap()];
    assert_eq!(stdout("plan", &from_file), stdout("plan", &flags));
    assert_eq!(
        stdout("plan", &[&from_file[..], &["--print-recipe"]].concat()),
        printed
    );
    let overridden = stdout(
        "plan",
        &[&from_file[..], &["--phase", "1", "--print-recipe"]].concat(),
    );
    assert!(overridden.contains("phase: 1\n"), "{overridden}");
}

#[test]
fn a_recipe_printed_without_a_text_is_used_without_one() {
    let folder = tempdir().unwrap();
    let recipe = folder.path().join("recipe.yaml");
    let printed = stdout("to-gguf", &["-t", "q4_0", "--print-recipe"]);
    std::fs::write(&recipe, printed).unwrap();
    let path = folder.path().join("m.gguf");
    to_gguf(&nano(), &path, &["--recipe", recipe.to_str().unwrap()]);
    assert_eq!(
        type_of(&Gguf::open(&path).unwrap(), "blk.0.ssm_in.weight"),
        GgmlType::Q4_0
    );
}

#[test]
fn a_target_is_met_whatever_the_threads() {
    let folder = tempdir().unwrap();
    let text = text(folder.path());
    let calibration = [
        "--calibration",
        text.to_str().unwrap(),
        "--calibration-context",
        "64",
        "--method",
        "rtn",
    ];
    let path = folder.path().join("m.gguf");
    to_gguf(&nano(), &path, &["-t", "q4_k_m"]);
    let size = std::fs::metadata(&path).unwrap().len();
    let wanted = size.to_string();
    let target = [&calibration[..], &["--target-size", &wanted]].concat();
    to_gguf(&nano(), &path, &[&target[..], &["--threads", "2"]].concat());
    let bytes = std::fs::metadata(&path).unwrap().len();
    assert!(
        bytes <= size && size - bytes < size / 100,
        "{bytes} of {size}"
    );

    let receipt = std::fs::read_to_string(folder.path().join("m.receipt.json")).unwrap();
    let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
    let allocation = &receipt["allocation"];
    assert_eq!(
        (
            &allocation["file_bytes"],
            &allocation["target"]["file_bytes"]
        ),
        (&bytes.into(), &size.into())
    );
    assert!(
        allocation["predicted_kl"].as_f64().unwrap() > 0.0,
        "{allocation}"
    );
    for measured in [
        &allocation["measured_kl"],
        &allocation["named_mix"]["measured_kl"],
    ] {
        assert!(measured.as_f64().unwrap() > 0.0, "{allocation}");
    }
    let groups = allocation["groups"].as_array().unwrap();
    let shared = groups
        .iter()
        .find(|group| group["tensors"].as_array().unwrap().len() == 3)
        .unwrap();
    assert!(shared["types"].as_array().unwrap().len() > 5, "{shared}");

    let recipe = folder.path().join("recipe.yaml");
    std::fs::write(
        &recipe,
        stdout(
            "to-gguf",
            &[&target[..], &["--threads", "1", "--print-recipe"]].concat(),
        ),
    )
    .unwrap();
    let again = folder.path().join("again.gguf");
    let from_file = [&calibration[..], &["--recipe", recipe.to_str().unwrap()]].concat();
    to_gguf(&nano(), &again, &from_file);
    assert!(std::fs::read(path).unwrap() == std::fs::read(again).unwrap());
}

#[test]
fn bits_per_weight_are_a_target_too() {
    let folder = tempdir().unwrap();
    let text = text(folder.path());
    let flags = [
        "--calibration",
        text.to_str().unwrap(),
        "--calibration-context",
        "64",
        "--target-bpw",
        "5.25",
        "--json",
    ];
    let plan: serde_json::Value = serde_json::from_str(&stdout("plan", &flags)).unwrap();
    let bits = plan["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 5.25 && bits > 5.2, "{bits}");
}

#[test]
fn what_cannot_be_is_refused_with_a_way_out() {
    let folder = tempdir().unwrap();
    let text = text(folder.path());
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let recipe = folder.path().join("recipe.yaml");
    let check = |flags: &[&str], code: i32, expected: &[&str]| {
        let output = try_to_gguf(&nano(), &out.join("m.gguf"), flags);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(
            expected.iter().all(|part| message.contains(part)),
            "{message}"
        );
        assert_eq!(
            std::fs::read_dir(&out).unwrap().count(),
            0,
            "something was left behind"
        );
    };
    check(&["--phase", "4"], 64, &["phase must be 1", "found `4`"]);
    check(
        &["--phase", "1", "-t", "q8_0"],
        64,
        &["cannot be used with"],
    );
    check(
        &["--target-size", "4M"],
        1,
        &["needs a text", "--calibration FILE"],
    );
    let small = [
        "--target-size",
        "100K",
        "--calibration",
        text.to_str().unwrap(),
    ];
    check(
        &small,
        1,
        &[
            "100000 bytes are not possible: the smallest are",
            "ask for `--target-size",
        ],
    );
    let small = ["--target-bpw", "2", "--calibration", text.to_str().unwrap()];
    check(
        &small,
        1,
        &[
            "2 bits per weight are not possible",
            "ask for `--target-bpw",
        ],
    );
    check(
        &["--passes", "5"],
        64,
        &["`passes`", "hint: give one with `--calibration FILE`"],
    );
    check(
        &["--override-kv", "general.name=int:1"],
        64,
        &["another type"],
    );
    let path = recipe.to_str().unwrap();
    check(&["--recipe", path], 1, &["recipe.yaml"]);
    std::fs::write(&recipe, "method: gptq\n").unwrap();
    check(&["--recipe", path], 64, &["`method`", "no text to read"]);
    let file = |yaml: &str, expected: &[&str]| {
        std::fs::write(&recipe, yaml).unwrap();
        check(
            &["--recipe", path],
            1,
            &[expected, &["recipe.yaml"]].concat(),
        );
    };
    file("phase: 1\noutyp: q8_0\n", &["`outyp`", "line 2"]);
    file("phase: 9\n", &["`phase`", "line 1", "found `9`"]);
    file(
        "phase: 1\nouttype: q8_0\n",
        &["`phase` and `outtype` exclude each other"],
    );
    file("rewrite: {rotation: some}\n", &["`rewrite`", "line 1"]);
}
