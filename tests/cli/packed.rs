//! Packed folders from the outside: inspected, validated, evaluated, converted, and refused where they lie.

use std::path::{Path, PathBuf};

use nemoconv_fixtures::nano;
use nemoconv_fixtures::packed::{Layout, write};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use super::eval::{eval, write_data};
use crate::support::{
    Tensors, edit_config, nemoconv, read_tensors, stderr, try_to_gguf, write_tensors,
};

const W4: Layout = Layout::Packed {
    bits: 4,
    group: 64,
    symmetric: true,
};
const GPTQ: Layout = Layout::Gptq { bits: 4, group: 64 };

/// The nano model as codes, and as what they decode to.
fn folders(layout: Layout) -> (TempDir, PathBuf, PathBuf) {
    let folder = tempdir().unwrap();
    let [packed, plain] = ["packed", "plain"].map(|name| folder.path().join(name));
    write(&nano(), layout, &packed, &plain).unwrap();
    (folder, packed, plain)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn inspect_shows_groups_and_bits_per_weight() {
    let (_folder, packed, _) = folders(W4);
    let shown = nemoconv(["inspect", text(&packed)]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let tables = shown.split_once("\n\n").unwrap().1;
    insta::assert_snapshot!("inspect_packed", tables);
    let json = nemoconv(["inspect", "--json", text(&packed)]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    let group = &json["quantization"]["groups"][0];
    assert_eq!(group["scheme"], "W4A16 g64, pack-quantized");
    assert_eq!(group["linears"], 12);
    // As many as the plain model has.
    let nano = nano();
    let plain = nemoconv(["inspect", "--json", text(&nano)]);
    let plain: Value = serde_json::from_slice(&plain.stdout).unwrap();
    assert_eq!(json["weights"], plain["weights"]);
}

/// The report of a packed folder against what it decodes to.
fn validated(layout: Layout) -> (Value, String) {
    let (folder, packed, plain) = folders(layout);
    let file = folder.path().join("text.txt");
    let words = "The old harbour lay quiet under the morning fog, and the boats came in. ";
    std::fs::write(&file, words.repeat(20)).unwrap();
    let flags = ["--text", text(&file), "--context", "128", "--json"];
    let fixed = ["validate", text(&packed), "--reference", text(&plain)];
    let output = nemoconv([&fixed[..], &flags].concat());
    let report = serde_json::from_slice(&output.stdout);
    let report = report.unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)));
    (report, stderr(&output))
}

#[test]
fn validate_runs_all_levels_with_inputs_as_declared() {
    let mean = |report: &Value| report["logits"]["kl_divergence"]["mean"]["value"].as_f64();
    let activations = |report: &Value| {
        let levels = report["levels"].as_array().unwrap().clone();
        levels.last().unwrap()["scope"].to_string()
    };
    let (report, _) = validated(W4);
    assert_eq!(report["verdict"], "passed", "{report:#}");
    assert_eq!(report["artifact"]["format"], "packed checkpoint");
    assert_eq!(mean(&report), Some(0.0));
    let tensors = report["tensors"].to_string();
    assert!(tensors.contains("\"W4A16 g64\""), "{tensors}");
    let (report, _) = validated(Layout::Int8 {
        fixed_inputs: false,
    });
    let kl = mean(&report).unwrap();
    assert!(kl > 1e-9 && kl < 1e-2, "{kl}");
    let taken = activations(&report);
    assert!(taken.contains("as the artifact declares them"), "{taken}");
    let (report, said) = validated(Layout::Nvfp4);
    let kl = mean(&report).unwrap();
    assert!(kl > 1e-6 && kl < 1.0, "{kl}");
    assert!(!said.contains("not followed"), "{said}");
}

#[test]
fn eval_asks_packed_folders() {
    let (folder, packed, plain) = folders(GPTQ);
    write_data(folder.path());
    let results = |model: &Path| {
        let output = eval(model, folder.path(), &["--tasks", "piqa", "--json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        document["results"]["results"]["piqa"].clone()
    };
    let ours = results(&packed);
    assert!(ours["acc,none"].is_number(), "{ours}");
    assert_eq!(ours, results(&plain));
}

#[test]
fn a_conversion_says_what_becomes_of_the_codes() {
    let (folder, packed, _) = folders(W4);
    let out = folder.path().join("m.gguf");
    let mut args = vec!["to-gguf", text(&packed), "-o", text(&out), "-t", "q4_0"];
    let said = stderr(&nemoconv(args.clone()));
    let line = "packed source: of 12 tensors 12 keep their codes bit for bit, 0 are";
    assert!(said.contains(line), "{said}");
    args[5] = "q4_k_m";
    let said = stderr(&nemoconv(args.clone()));
    let line = "0 keep their codes bit for bit, 12 are decoded exactly and quantized again";
    assert!(said.contains(line), "{said}");
    // A scale that BF16 holds and F16 does not.
    edit(&packed, |tensors| {
        let scale = tensors.get_mut(&part("weight_scale")).unwrap();
        scale.2[..2].copy_from_slice(&half_bytes(1e-9));
    });
    args[5] = "q4_0";
    let said = stderr(&nemoconv(args));
    let line = "`blk.0.ssm_in.weight`: 1 rows have scales that F16 does not hold";
    assert!(said.contains(line), "{said}");
}

/// The bytes of a BF16.
fn half_bytes(value: f32) -> [u8; 2] {
    let bits = value.to_bits() >> 16;
    [bits as u8, (bits >> 8) as u8]
}

const MODULE: &str = "backbone.layers.0.mixer.in_proj";

fn part(suffix: &str) -> String {
    format!("{MODULE}.{suffix}")
}

fn edit(folder: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = folder.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &tensors);
}

/// Damages a packed copy of the model and expects exit code 1, all of `expected` in the message, and no artifact.
fn refuses(layout: Layout, damage: impl FnOnce(&Path), expected: &[&str]) {
    let (folder, packed, _) = folders(layout);
    damage(&packed);
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let output = try_to_gguf(&packed, &out.join("m.gguf"), &["-t", "q4_0"]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for part in expected {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
    let left = std::fs::read_dir(&out).unwrap().count();
    assert_eq!(left, 0, "something was left behind");
    // What cannot be converted is found by `validate`, without a panic.
    let validated = nemoconv(["-q", "validate", text(&packed)]);
    let code = validated.status.code();
    assert!(matches!(code, Some(1 | 2)), "{}", stderr(&validated));
}

fn refuses_config(layout: Layout, edit: impl FnOnce(&mut Value), expected: &[&str]) {
    let damage = |folder: &Path| {
        edit_config(folder, |config| edit(&mut config["quantization_config"]));
    };
    refuses(layout, damage, expected);
}

#[test]
fn configurations_that_are_not_understood() {
    let check = |edit: &dyn Fn(&mut Value), expected: &[&str]| {
        refuses_config(W4, edit, &[expected, &["config.json"]].concat());
    };
    check(
        &|config| config["quant_method"] = json!("awq"),
        &[
            "quant_method is `awq`",
            "`compressed-tensors`, `gptq`",
            "hint",
        ],
    );
    check(
        &|config| config["config_groups"]["group_0"]["weights"]["num_bits"] = json!(3),
        &["config_groups.group_0", "4 or 8 bits, found 3"],
    );
    check(
        &|config| config["config_groups"]["group_0"]["weights"]["group_size"] = json!(u64::MAX),
        &["quantization_config", "invalid number"],
    );
    check(
        &|config| config["ignore"] = json!(["re:(((a{500}){500}){500}"]),
        &["quantization_config.ignore", "is not understood"],
    );
    check(
        &|config| config["config_groups"] = json!([1, 2]),
        &["expected an object of groups"],
    );
    refuses_config(
        GPTQ,
        |config| config["desc_act"] = json!(true),
        &["desc_act", "hint"],
    );
}

#[test]
fn configurations_that_do_not_fit_the_weights() {
    let group = |size: u64| {
        move |config: &mut Value| {
            config["config_groups"]["group_0"]["weights"]["group_size"] = json!(size);
        }
    };
    refuses_config(
        W4,
        group(96),
        &[MODULE, "groups of 96 do not divide rows of 256"],
    );
    refuses_config(
        W4,
        group(32),
        &[
            "in_proj.weight_scale",
            "[1288, 8], found [1288, 4]",
            "at 0x",
        ],
    );
    refuses_config(
        W4,
        |config| config["ignore"] = json!(["re:.*in_proj$"]),
        &["in_proj.weight_packed", "does not quantize its module"],
    );
    refuses(
        W4,
        |folder| edit_config(folder, |config| config["quantization_config"] = Value::Null),
        &["in_proj.weight_packed", "no `quantization_config`"],
    );
    refuses(
        Layout::Nvfp4,
        |folder| {
            edit_config(folder, |config| {
                config["quantization_config"]["quant_algo"] = json!("FP8")
            })
        },
        &["in_proj.weight", "F8_E4M3, found U8"],
    );
}

#[test]
fn linears_that_are_incomplete_or_lie() {
    let check = |layout, damage: &dyn Fn(&mut Tensors), expected: &[&str]| {
        refuses(layout, |folder| edit(folder, damage), expected);
    };
    let remove =
        |suffix: &'static str| move |tensors: &mut Tensors| drop(tensors.remove(&part(suffix)));
    for suffix in ["weight_packed", "weight_scale", "weight_shape"] {
        let missing = format!("has no `{suffix}`");
        check(W4, &remove(suffix), &[MODULE, &missing, "hint"]);
    }
    for suffix in ["qweight", "qzeros", "scales"] {
        let missing = format!("has no `{suffix}`");
        check(GPTQ, &remove(suffix), &[MODULE, &missing]);
    }
    check(
        W4,
        &|tensors| tensors.get_mut(&part("weight_shape")).unwrap().2[7] = 0xff,
        &[
            "weight_shape",
            "expected [1288, 256]",
            "model.safetensors at 0x",
        ],
    );
    check(
        W4,
        &|tensors| tensors.get_mut(&part("weight_scale")).unwrap().0 = "I16".into(),
        &["weight_scale", "BF16 or F16 or F32, found I16"],
    );
    check(
        W4,
        &|tensors| tensors.get_mut(&part("weight_packed")).unwrap().1.reverse(),
        &["weight_packed", "[1288, 32]", "[32, 1288]"],
    );
    check(
        W4,
        &|tensors| {
            let plain = ("BF16".into(), vec![1288, 256], vec![0; 1288 * 256 * 2]);
            tensors.insert(part("weight"), plain);
        },
        &["weight_packed", "is stored plain as BF16"],
    );
    check(
        W4,
        &|tensors| {
            let order = ("I32".into(), vec![256], vec![0; 1024]);
            tensors.insert(part("weight_g_idx"), order);
        },
        &["weight_g_idx", "order of activations"],
    );
    check(
        GPTQ,
        &|tensors| tensors.get_mut(&part("g_idx")).unwrap().2[0] = 3,
        &["g_idx", "order of activations", "hint"],
    );
    check(
        W4,
        &|tensors| {
            let stray = ("BF16".into(), vec![1], vec![0; 2]);
            tensors.insert(part("weight_bias_correction"), stray);
        },
        &["weight_bias_correction", "accounts for"],
    );
    check(
        W4,
        &|tensors| {
            let scale = tensors.get_mut(&part("weight_scale")).unwrap();
            scale.2[..2].copy_from_slice(&[0xc0, 0x7f]);
        },
        &["blk.0.ssm_in.weight", "64 NaN or infinite"],
    );
}

#[test]
fn a_truncated_packed_shard() {
    let truncate = |folder: &Path| {
        let path = folder.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
    };
    refuses(W4, truncate, &["truncated", "model.safetensors"]);
}
