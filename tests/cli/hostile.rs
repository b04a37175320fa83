//! Bad input: a message with file, tensor and mend, the documented exit code, nothing under the final name.

use std::path::Path;

use nemoconv_fixtures::{data, nano};
use serde_json::json;
use tempfile::tempdir;

use crate::support::{
    copy_of, edit_config, nemoconv, read_tensors, stderr, try_to_gguf, write_tensors,
};

/// Damages a copy of the model and expects exit code 1, all of `expected` in the message, and no artifact.
fn refuses(flags: &[&str], damage: impl FnOnce(&Path), expected: &[&str]) {
    let folder = tempdir().unwrap();
    let model = copy_of(&nano(), folder.path());
    damage(&model);
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let output = try_to_gguf(&model, &out.join("m.gguf"), flags);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for part in expected {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
    assert_eq!(
        std::fs::read_dir(&out).unwrap().count(),
        0,
        "something was left behind"
    );
}

/// Changes one tensor of the copied model.
fn edit_tensor(model: &Path, name: &str, edit: impl FnOnce(&mut (String, Vec<usize>, Vec<u8>))) {
    let path = model.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(tensors.get_mut(name).unwrap());
    write_tensors(&path, &tensors);
}

const IN_PROJ: &str = "backbone.layers.0.mixer.in_proj.weight";
const OUT_PROJ: &str = "backbone.layers.0.mixer.out_proj.weight";

#[test]
fn a_truncated_shard() {
    let truncate = |model: &Path| {
        let path = model.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
    };
    refuses(&[], truncate, &["truncated", "model.safetensors"]);
}

#[test]
fn an_index_that_names_a_missing_shard() {
    let index = |model: &Path| {
        let index = json!({ "metadata": {}, "weight_map": { IN_PROJ: "model-00009-of-00009.safetensors" } });
        std::fs::remove_file(model.join("model.safetensors")).unwrap();
        std::fs::write(
            model.join("model.safetensors.index.json"),
            index.to_string(),
        )
        .unwrap();
    };
    refuses(&[], index, &["model-00009-of-00009.safetensors"]);
}

#[test]
fn a_missing_or_unknown_tensor() {
    let path = |model: &Path| model.join("model.safetensors");
    let remove = |model: &Path| {
        let mut tensors = read_tensors(&path(model));
        tensors.remove(IN_PROJ);
        write_tensors(&path(model), &tensors);
    };
    refuses(&[], remove, &["layers.0.mixer.in_proj.weight", "hint"]);
    let add = |model: &Path| {
        let mut tensors = read_tensors(&path(model));
        tensors.insert(
            "backbone.layers.0.mixer.in_proj.bias".into(),
            ("F32".into(), vec![1], vec![0; 4]),
        );
        write_tensors(&path(model), &tensors);
    };
    refuses(&[], add, &["in_proj.bias", "accounts for"]);
}

#[test]
fn a_shape_or_type_that_is_not_the_configs() {
    let transpose = |model: &Path| edit_tensor(model, IN_PROJ, |tensor| tensor.1.reverse());
    refuses(
        &[],
        transpose,
        &[
            IN_PROJ,
            "[1288, 256]",
            "[256, 1288]",
            "model.safetensors at 0x",
        ],
    );
    let retype = |model: &Path| edit_tensor(model, IN_PROJ, |tensor| tensor.0 = "I16".into());
    refuses(&[], retype, &[IN_PROJ, "found I16"]);
}

#[test]
fn a_config_that_is_absurd() {
    let set = |field: &'static str, value: serde_json::Value| {
        move |model: &Path| edit_config(model, |config| config[field] = value)
    };
    refuses(
        &[],
        set("hidden_size", json!(-1)),
        &["hidden_size", "config.json"],
    );
    refuses(&[], set("vocab_size", json!(1u64 << 60)), &["vocab_size"]);
    refuses(
        &[],
        set("hybrid_override_pattern", json!("M".repeat(100_000))),
        &["limit is 512"],
    );
    refuses(
        &[],
        set("architectures", json!(["LlamaForCausalLM"])),
        &["LlamaForCausalLM"],
    );
    let break_json = |model: &Path| std::fs::write(model.join("config.json"), "{\"a\": ").unwrap();
    refuses(&[], break_json, &["config.json"]);
}

#[test]
fn nan_and_infinite_weights_are_counted_and_refused() {
    let damage = |model: &Path| {
        edit_tensor(model, IN_PROJ, |tensor| {
            tensor.2[..4].copy_from_slice(&[0xc0, 0x7f, 0x80, 0xff]);
        });
    };
    for file_type in ["bf16", "q8_0", "q4_k_m", "iq4_xs", "q2_k"] {
        refuses(
            &["-t", file_type],
            damage,
            &[
                "blk.0.ssm_in.weight",
                "2 NaN or infinite",
                "--allow-nonfinite",
            ],
        );
    }
    let folder = tempdir().unwrap();
    let model = copy_of(&nano(), folder.path());
    damage(&model);
    let out = folder.path().join("m.gguf");
    assert!(
        try_to_gguf(&model, &out, &["-t", "bf16", "--allow-nonfinite"])
            .status
            .success()
    );
}

/// Before the network runs, and by name.
#[test]
fn weights_that_are_not_finite_read_no_samples() {
    let folder = tempdir().unwrap();
    let model = copy_of(&nano(), folder.path());
    edit_tensor(&model, OUT_PROJ, |tensor| {
        tensor.2[..2].copy_from_slice(&[0xc0, 0x7f])
    });
    let text = data().join("calibration.txt");
    let [model, text] = [&model, &text].map(|path| path.to_str().unwrap());
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let short = ["-o", out, "--calibration-context", "64"];
    let convert = [
        "to-gguf",
        model,
        "--calibration",
        text,
        "-t",
        "q4_0",
        "--no-rewrites",
    ];
    for command in [&["calibrate", model, "--text", text][..], &convert] {
        let output = nemoconv([command, &short[..]].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for part in [
            "blk.0.ssm_out.weight",
            "1 weight that is not finite",
            "model.safetensors",
        ] {
            assert!(said.contains(part), "{said}");
        }
    }
}

#[test]
fn what_is_not_there_or_cannot_be_written_is_said_at_once() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let model = nano().to_str().unwrap().to_owned();
    let text = data().join("calibration.txt").to_str().unwrap().to_owned();
    let check = |args: &[&str], expected: &[&str]| {
        let output = nemoconv(args);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(
            expected.iter().all(|part| said.contains(part)),
            "{args:?}: {said}"
        );
        assert!(
            !said.contains("calibrating") && !said.contains("chunk"),
            "{said}"
        );
    };
    let (absent, here) = (path("absent/file"), path(""));
    let convert = ["to-gguf", &model, "--calibration", &text];
    check(
        &[&convert[..], &["-o", &here]].concat(),
        &["`--outfile` must name a file"],
    );
    check(
        &[&convert[..], &["-o", &absent]].concat(),
        &["`--outfile`", "absent"],
    );
    check(
        &["to-gguf", &model, "--calibration", &absent],
        &["`--calibration`", "absent"],
    );
    let pack = [
        "to-safetensors",
        &model,
        "--calibration",
        &text,
        "-o",
        &absent,
    ];
    check(&pack, &["`--outdir`", "absent"]);
    check(
        &["calibrate", &model, "--text", &text, "-o", &here],
        &["`--outfile`"],
    );
    let validate = ["validate", &model, "--reference", &model, "--text"];
    check(
        &[&validate[..], &[&absent]].concat(),
        &["`--text`", "absent"],
    );
    let against = ["validate", &model, "--text", &text, "--reference", &absent];
    check(&against, &["`--reference`", "absent"]);
    check(
        &[&validate[..], &[&text, "--html", &absent]].concat(),
        &["`--html`", "is writable"],
    );
    let eval = [
        "eval",
        &model,
        "--tasks",
        "piqa",
        "--data",
        &here,
        "--baseline",
        &absent,
    ];
    check(&eval, &["`--baseline`", "absent"]);
    check(
        &["eval", "merge", &here, "--output", &here],
        &["holds no results_*.json"],
    );
    check(
        &["eval", "merge", &absent, "--output", &here],
        &["`eval merge`", "absent"],
    );
}

#[test]
fn what_does_not_fit_f16_is_counted_and_refused() {
    // 1e30 as BF16.
    let damage = |model: &Path| {
        edit_tensor(model, IN_PROJ, |tensor| {
            tensor.2[..2].copy_from_slice(&[0x4a, 0x71])
        })
    };
    for file_type in ["f16", "q8_0", "q4_0", "q4_k_m"] {
        refuses(
            &["-t", file_type],
            damage,
            &[
                "blk.0.ssm_in.weight",
                "too large for F16",
                "--allow-f16-overflow",
            ],
        );
    }
}

#[test]
fn sizes_that_contradict_each_other_name_file_and_key() {
    let check = |key: &str, value: serde_json::Value, expected: &str| {
        let damage = |model: &Path| edit_config(model, |config| config[key] = value);
        refuses(&[], damage, &["config.json", key, expected]);
    };
    check("layer_norm_epsilon", json!(-1e-5), "above 0");
    check(
        "num_hidden_layers",
        json!(6),
        "the 5 blocks of the pattern, found 6",
    );
    check("time_step_limit", json!([1, 0]), "[1,0]");
    check("max_position_embeddings", json!(-8192), "found -8192");
    check("model_type", json!("llama"), "found llama");
    check("tie_word_embeddings", json!(true), "lm_head.weight");
}

#[test]
fn a_pattern_that_matches_nothing() {
    refuses(
        &["--tensor-type", "no_such_tensor=q8_0", "-t", "q4_k_m"],
        |_| (),
        &["matches no tensor", "hint"],
    );
}

/// An importance matrix in the older form.
fn write_imatrix(path: &Path, entries: &[(&str, usize)]) {
    let number = |number: usize| (number as i32).to_le_bytes();
    let mut bytes = number(entries.len()).to_vec();
    for (name, columns) in entries {
        bytes.extend(number(name.len()));
        bytes.extend(name.as_bytes());
        bytes.extend(number(1));
        bytes.extend(number(*columns));
        bytes.extend(1f32.to_le_bytes().repeat(*columns));
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn an_importance_matrix_of_another_model() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("other.dat");
    let flags = ["-t", "q4_k_m", "--imatrix", path.to_str().unwrap()];
    for other in ["no importance matrix at all", "GGUF"] {
        std::fs::write(&path, other).unwrap();
        let expected = [
            "no importance matrix can be read",
            "other.dat",
            "hint: name a file of",
        ];
        refuses(&flags, |_| (), &expected);
    }
    write_imatrix(&path, &[("other", 1)]);
    refuses(&flags, |_| (), &["no tensor of this model"]);
    // Whatever the type of the tensor.
    write_imatrix(&path, &[("blk.0.ssm_in.weight", 128)]);
    for file_type in ["q4_k_m", "f16"] {
        let flags = [&flags[..1], &[file_type], &flags[2..]].concat();
        let expected = [
            "blk.0.ssm_in.weight",
            "128 columns, expected 256",
            "another model",
        ];
        refuses(&flags, |_| (), &expected);
    }
}

#[test]
fn an_importance_matrix_that_covers_some_tensors() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("some.dat");
    write_imatrix(
        &path,
        &[("blk.0.ssm_in.weight", 256), ("blk.77.ssm_in.weight", 256)],
    );
    let (model, imatrix) = (nano(), path.to_str().unwrap());
    let says = |file_type: &str, words: &str| {
        let flags = [
            "plan",
            model.to_str().unwrap(),
            "-t",
            file_type,
            "--imatrix",
            imatrix,
        ];
        let output = nemoconv(flags);
        let said = stderr(&output);
        assert!(output.status.success() && said.contains(words), "{said}");
    };
    says(
        "q4_k_m",
        "covers 1 of the 12 tensors that it could steer, and 1 of its entries name no",
    );
    says("f16", "steers nothing");
}

#[test]
fn an_output_folder_that_does_not_exist() {
    let output = try_to_gguf(&nano(), Path::new("/nonexistent-folder/m.gguf"), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("/nonexistent-folder"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_model_that_is_not_there() {
    let output = nemoconv(["to-gguf", "/nonexistent-model"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("/nonexistent-model"));
}

#[test]
fn wrong_usage_is_64() {
    for args in [
        &["to-gguf"][..],
        &["to-gguf", "m", "-t", "q9"],
        &["no-such-verb"],
        &[],
    ] {
        assert_eq!(nemoconv(args).status.code(), Some(64), "{args:?}");
    }
    assert_eq!(nemoconv(["--help"]).status.code(), Some(0));
}

/// Llama.cpp would refuse to load the artifact.
#[test]
fn a_pre_tokenizer_that_no_runtime_has_is_wrong_usage() {
    let to_gguf = |name| nemoconv(["to-gguf", "/nonexistent-model", "--pre-tokenizer", name]);
    let refused = to_gguf("nosuch");
    assert_eq!(refused.status.code(), Some(64));
    for word in ["nosuch", "pixtral", "llama-vocab.cpp"] {
        assert!(stderr(&refused).contains(word), "{}", stderr(&refused));
    }
    for name in ["tekken", "llama-bpe", "kimi-k2"] {
        let output = to_gguf(name);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    }
}

/// `SIGTERM` in the middle: exit code 130 and an empty folder.
#[cfg(unix)]
#[test]
fn a_signal_leaves_nothing_behind() {
    use std::process::{Command, Stdio};
    let folder = tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .arg("to-gguf")
        .arg(nano())
        .arg("-o")
        .arg(folder.path().join("m.gguf"))
        .args(["-t", "iq4_xs", "--threads", "1"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Until its temporary file is there.
    let begun = std::time::Instant::now();
    while std::fs::read_dir(folder.path()).unwrap().next().is_none()
        && begun.elapsed().as_secs() < 20
    {
        std::thread::yield_now();
    }
    let killed = Command::new("kill")
        .arg(child.id().to_string())
        .status()
        .unwrap()
        .success();
    let code = child.wait().unwrap().code();
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    match code {
        Some(130) => assert!(left.is_empty(), "left behind: {left:?}"),
        // It was faster than the signal: then the whole artifact is there.
        Some(0) => assert_eq!(left.len(), 2, "killed: {killed}, {left:?}"),
        other => panic!("exit code {other:?}"),
    }
}
