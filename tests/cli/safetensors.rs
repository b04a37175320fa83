//! `to-safetensors`: whole folders or none, the same bytes whoever computes them, errors that name the reader.

mod refusals;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use nemoconv_fixtures::{data, nano};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::support::{copy_of, edit_config, nemoconv, read_tensors, stderr, write_tensors};

/// Where a test writes.
pub struct Place(pub TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn try_pack(&self, model: &Path, name: &str, flags: &[&str]) -> Output {
        let out = self.path(name);
        let fixed = [
            "to-safetensors",
            model.to_str().unwrap(),
            "-q",
            "-o",
            out.to_str().unwrap(),
        ];
        nemoconv(fixed.iter().chain(flags))
    }

    pub fn pack(&self, name: &str, flags: &[&str]) -> PathBuf {
        let output = self.try_pack(&nano(), name, flags);
        assert!(output.status.success(), "{}", stderr(&output));
        self.path(name)
    }

    /// Expects exit code 1, all of `expected` in the message, and nothing left.
    #[track_caller]
    fn refuses(&self, model: &Path, flags: &[&str], expected: &[&str]) {
        let before = names(self.0.path());
        let output = self.try_pack(model, "refused", flags);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        for part in expected {
            assert!(message.contains(part), "`{part}` is missing in: {message}");
        }
        assert_eq!(names(self.0.path()), before, "something was left behind");
    }
}

pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Every file of a folder.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = names(folder).into_iter();
    names
        .filter(|name| folder.join(name).is_file())
        .map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap()))
        .collect()
}

fn json_of(path: PathBuf) -> Value {
    let text = fs::read_to_string(path).unwrap();
    serde_json::from_str(&text.replace("Infinity", "1e30")).unwrap()
}

const CALIBRATION: [&str; 4] = [
    "--calibration-context",
    "64",
    "--calibration-sequences",
    "8",
];

pub fn calibrated<'a>(text: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["--calibration", text];
    all.extend(CALIBRATION);
    all.extend(flags);
    all
}

pub fn text() -> String {
    data().join("calibration.txt").to_str().unwrap().to_string()
}

/// A model of one MoE layer between Mamba-2 layers, its weights some pattern.
fn moe(place: &Place) -> PathBuf {
    let folder = copy_of(&nano(), &place.path("moe-source"));
    edit_config(&folder, |config| {
        config["hybrid_override_pattern"] = "ME".into();
        config["num_hidden_layers"] = 2.into();
        config["n_routed_experts"] = 2.into();
        config["num_experts_per_tok"] = 1.into();
        config["moe_intermediate_size"] = 64.into();
        config["n_shared_experts"] = 1.into();
        config["moe_shared_expert_intermediate_size"] = 128.into();
        config["n_group"] = 1.into();
        config["topk_group"] = 1.into();
        config["norm_topk_prob"] = true.into();
        config["routed_scaling_factor"] = 2.5.into();
    });
    let path = folder.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    tensors.retain(|name, _| !name.contains("layers.") || name.contains("layers.0."));
    let mut add = |name: &str, shape: &[usize]| {
        let count = shape.iter().product::<usize>();
        let value = |i: usize| half::bf16::from_f32(((i * 31 % 97) as f32 - 48.0) * 1e-3);
        let bytes = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
        let name = format!("backbone.layers.1.{name}");
        tensors.insert(name, ("BF16".into(), shape.to_vec(), bytes));
    };
    add("norm.weight", &[256]);
    add("mixer.gate.weight", &[2, 256]);
    add("mixer.gate.e_score_correction_bias", &[2]);
    for expert in 0..2 {
        add(
            &format!("mixer.experts.{expert}.up_proj.weight"),
            &[64, 256],
        );
        add(
            &format!("mixer.experts.{expert}.down_proj.weight"),
            &[256, 64],
        );
    }
    add("mixer.shared_experts.up_proj.weight", &[128, 256]);
    add("mixer.shared_experts.down_proj.weight", &[256, 128]);
    write_tensors(&path, &tensors);
    folder
}

#[test]
fn a_folder_is_whole_and_all_that_is_not_packed_is_as_it_was() {
    let place = Place::new();
    let folder = place.pack("packed", &[]);
    assert_eq!(names(place.0.path()), ["packed"]);
    let (source, packed) = (files(&nano()), files(&folder));
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        assert!(packed[name] == source[name], "{name}");
    }
    let config = |files: &BTreeMap<String, Vec<u8>>| {
        String::from_utf8(files["config.json"].clone()).unwrap()
    };
    let before = config(&source);
    let unchanged = before.trim_end().trim_end_matches('}').trim_end();
    assert!(
        config(&packed).starts_with(unchanged),
        "config.json was written anew"
    );
    let (before, after) = (
        read_tensors(&nano().join("model.safetensors")),
        read_tensors(&folder.join("model.safetensors")),
    );
    let mut packed_linears = 0;
    for (name, tensor) in &before {
        match after.get(name) {
            Some(kept) => assert!(kept == tensor, "{name}"),
            None => {
                let module = name.strip_suffix(".weight").unwrap();
                for part in ["weight_packed", "weight_scale", "weight_shape"] {
                    assert!(after.contains_key(&format!("{module}.{part}")), "{name}");
                }
                packed_linears += 1;
            }
        }
    }
    assert_eq!(packed_linears, 12);
    assert_eq!(
        json_of(folder.join("config.json"))["quantization_config"]["ignore"],
        json!(["lm_head"])
    );
}

#[test]
fn shards_hold_what_the_index_says() {
    let place = Place::new();
    let folder = place.pack("packed", &["--max-shard-size", "600K"]);
    let index = json_of(folder.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let shards: Vec<String> = names(&folder)
        .into_iter()
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    assert!(shards.len() > 2, "{shards:?}");
    let (mut tensors, mut bytes) = (0, 0);
    for shard in &shards {
        for (name, (_, _, data)) in read_tensors(&folder.join(shard)) {
            assert_eq!(map[&name], json!(shard), "{name}");
            tensors += 1;
            bytes += data.len();
        }
    }
    assert_eq!(
        (tensors, json!(bytes)),
        (map.len(), index["metadata"]["total_size"].clone())
    );
    let one = place.pack("one", &[]);
    let together = read_tensors(&one.join("model.safetensors"));
    let apart = shards
        .iter()
        .flat_map(|shard| read_tensors(&folder.join(shard)));
    assert!(apart.collect::<BTreeMap<_, _>>() == together);
}

#[test]
fn threads_change_nothing() {
    let place = Place::new();
    for scheme in ["w4a16-asym", "w8a8", "gptq-4"] {
        let pack = |threads: &str| {
            let flags = ["--scheme", scheme, "--linear", "in_proj=keep"];
            let flags = [&flags[..], &["--threads", threads]].concat();
            place.pack(&format!("{scheme}-{threads}"), &flags)
        };
        let (one, three) = (pack("1"), pack("3"));
        assert!(files(&one) == files(&three), "{scheme}");
    }
}

#[test]
fn a_phase_and_the_same_in_a_recipe_give_the_same_folder() {
    let place = Place::new();
    let by_flag = place.pack("flag", &["--phase", "3", "--linear", "layers\\.3\\.=keep"]);
    let recipe = place.path("recipe.yaml");
    fs::write(
        &recipe,
        "phase: 3\npacked:\n  linears:\n    - {linear: 'layers\\.3\\.', scheme: keep}\n",
    )
    .unwrap();
    let by_recipe = place.pack("recipe", &["--recipe", recipe.to_str().unwrap()]);
    assert!(files(&by_flag) == files(&by_recipe));
    let config = json_of(by_flag.join("config.json"))["quantization_config"].clone();
    assert_eq!(config["format"], "int-quantized");
    let groups = &config["config_groups"];
    assert_eq!(
        groups["group_0"]["targets"],
        json!(["re:.*mixer\\.(in_proj|out_proj)$"])
    );
    assert_eq!(groups["group_0"]["weights"]["num_bits"], 4);
    assert_eq!(
        groups["group_1"]["targets"],
        json!(["re:.*mixer\\.(up_proj|down_proj)$"])
    );
    assert_eq!(groups["group_1"]["weights"]["num_bits"], 8);
    assert_eq!(config["ignore"].as_array().unwrap().len(), 5);
}

#[test]
fn calibration_loses_less_and_floats_stay_exact() {
    let place = Place::new();
    let text = text();
    let folder = place.pack("packed", &calibrated(&text, &["--scheme", "w4a16"]));
    assert_eq!(names(place.0.path()), ["packed"]);
    let receipt = json_of(folder.join("receipt.json"));
    let rounded = receipt["rounding"].as_array().unwrap();
    let with_feedback: Vec<_> = rounded
        .iter()
        .filter(|line| line["treatment"] == "gptq")
        .collect();
    assert_eq!(with_feedback.len(), 12);
    for line in with_feedback {
        let loss = |key: &str| line[key].as_f64().unwrap();
        assert!(loss("loss") < 0.8 * loss("rtn_loss"), "{line}");
    }
    let (before, after) = (
        read_tensors(&nano().join("model.safetensors")),
        read_tensors(&folder.join("model.safetensors")),
    );
    for name in [
        "lm_head.weight",
        "backbone.embeddings.weight",
        "backbone.layers.0.mixer.A_log",
    ] {
        assert!(before[name] == after[name], "{name}");
    }
    // Norms are those of the rewritten network, to the last bit.
    let reference = nano();
    let validate = [
        "validate",
        folder.to_str().unwrap(),
        "--reference",
        reference.to_str().unwrap(),
    ];
    let said = String::from_utf8(nemoconv(validate).stdout).unwrap();
    assert!(!said.contains("norm.weight"), "{said}");
}

#[test]
fn a_missing_or_broken_tokenizer_is_said() {
    let place = Place::new();
    let model = copy_of(&nano(), &place.path("source"));
    let tokenizer = model.join("tokenizer.json");
    fs::write(&tokenizer, "{").unwrap();
    let calibrate = ["calibrate", model.to_str().unwrap(), "--text", &text()];
    let said = stderr(&nemoconv(calibrate));
    assert!(said.contains(tokenizer.to_str().unwrap()), "{said}");
    fs::remove_file(tokenizer).unwrap();
    let out = place.path("packed");
    let flags = [
        "to-safetensors",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ];
    let output = nemoconv(flags);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("holds no tokenizer.json"), "{said}");
}

#[test]
fn validate_undoes_the_rewrites_and_knows_how_it_was_rounded() {
    let place = Place::new();
    let text = text();
    for (name, flags) in [
        ("rtn", vec!["--scheme", "w8a8"]),
        ("w4a16", calibrated(&text, &["--scheme", "w4a16"])),
        (
            "gptq-4",
            calibrated(&text, &["--scheme", "gptq-4", "--linear", "in_proj=keep"]),
        ),
    ] {
        let folder = place.pack(name, &flags);
        let reference = nano();
        let validate = |folder: &Path| {
            nemoconv([
                "validate",
                folder.to_str().unwrap(),
                "--reference",
                reference.to_str().unwrap(),
                "-q",
            ])
        };
        let output = validate(&folder);
        let report = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{name}: {report}{}",
            stderr(&output)
        );
        assert!(!report.contains("warning"), "{name}: {report}");
        if name == "w4a16" {
            let says = |words: &str| {
                let output = validate(&folder);
                let report = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(report.contains("weights/rewrites-missing"), "{report}");
                assert!(report.contains(words), "{report}");
                assert!(!report.contains("permuted"), "{report}");
            };
            let receipt = folder.join("receipt.json");
            let bytes = fs::read(&receipt).unwrap();
            fs::write(&receipt, &bytes[..bytes.len() / 2]).unwrap();
            says("`receipt.json` cannot be read");
            fs::remove_file(&receipt).unwrap();
            says("`receipt.json` is missing");
            fs::write(&receipt, bytes).unwrap();
            let sidecar = folder.join("rewrites.nemoconv");
            let mut bytes = fs::read(&sidecar).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&sidecar, bytes).unwrap();
            says("its sha256 is not");
            fs::remove_file(sidecar).unwrap();
            says("`rewrites.nemoconv`, which `receipt.json` names, is missing");
        }
    }
}

#[test]
fn static_inputs_get_their_scale_from_the_samples() {
    let place = Place::new();
    place.refuses(
        &nano(),
        &["--scheme", "w8a8-static"],
        &["static inputs", "--calibration"],
    );
    let text = text();
    let flags = calibrated(&text, &["--scheme", "w8a8-static"]);
    let out = place.path("packed");
    let (model, folder) = (nano(), out.clone());
    let fixed = [
        "to-safetensors",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ];
    let output = nemoconv(fixed.iter().chain(&flags));
    let talk = stderr(&output);
    assert!(talk.contains("rounding takes about"), "{talk}");
    let tensors = read_tensors(&folder.join("model.safetensors"));
    let (dtype, shape, bytes) = &tensors["backbone.layers.1.mixer.down_proj.input_scale"];
    assert_eq!((dtype.as_str(), shape.as_slice()), ("BF16", &[1][..]));
    let scale = half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    assert!(scale > 0.0 && scale < 10.0, "{scale}");
}

/// Where the clip is: no scale is larger than by the largest input, some are smaller.
#[test]
fn static_inputs_are_clipped_where_that_loses_less() {
    let place = Place::new();
    let text = text();
    let scales = |clip: &str| -> BTreeMap<String, f32> {
        let flags = ["--scheme", "w8a8-static", "--activation-clip", clip];
        let folder = place.pack(clip, &calibrated(&text, &flags));
        let tensors = read_tensors(&folder.join("model.safetensors")).into_iter();
        let scales = tensors.filter(|(name, _)| name.ends_with(".input_scale"));
        scales
            .map(|(name, (_, _, bytes))| {
                let scale = half::bf16::from_le_bytes([bytes[0], bytes[1]]);
                (name, scale.to_f32())
            })
            .collect()
    };
    let (max, mse) = (scales("max"), scales("mse"));
    assert_eq!(max.len(), 12);
    assert!(max.iter().all(|(name, scale)| mse[name] <= *scale));
    assert!(max.iter().any(|(name, scale)| mse[name] < 0.9 * scale));
    let query = |kind: &str| mse[&format!("backbone.layers.3.mixer.{kind}_proj.input_scale")];
    assert!(query("q") == query("k") && query("k") == query("v"));
}

/// An expert, and a matrix that is kept, in F32 beside BF16: as checkpoints have them that were merged from several.
#[test]
fn a_matrix_of_another_float_loses_nothing_on_its_way_to_codes() {
    let place = Place::new();
    let model = moe(&place);
    let path = model.join("model.safetensors");
    let tensors = read_tensors(&path);
    let expert = "backbone.layers.1.mixer.experts.1.up_proj";
    let shared = "backbone.layers.1.mixer.shared_experts.up_proj";
    let between = |name: &str| {
        let (_, shape, bytes) = &tensors[&format!("{name}.weight")];
        let (halves, _) = bytes.as_chunks();
        let values = halves.iter().map(|half| half::bf16::from_le_bytes(*half));
        let values = values.enumerate().map(|(i, value)| {
            let between = 1.0 + ((i * 7) % 13) as f32 * 3e-4;
            value.to_f32() * between
        });
        let bytes = values.flat_map(f32::to_le_bytes).collect();
        ("F32".to_string(), shape.clone(), bytes)
    };
    let pack = |name: &str, wide: &[&str]| {
        let mut tensors = tensors.clone();
        for module in wide {
            tensors.insert(format!("{module}.weight"), between(module));
        }
        write_tensors(&path, &tensors);
        let out = place.path(name);
        let flags = ["--linear", "shared_experts.up=keep"];
        let fixed = ["to-safetensors", model.to_str().unwrap(), "-o"];
        let all = [&fixed[..], &[out.to_str().unwrap()], &flags].concat();
        let output = nemoconv(all);
        assert!(output.status.success(), "{}", stderr(&output));
        let packed = read_tensors(&out.join("model.safetensors"));
        (packed, stderr(&output))
    };
    let (mixed, talk) = pack("mixed", &[expert, shared]);
    let remark = format!("1 kept matrices, such as `{shared}` in F32");
    assert!(talk.contains(&remark), "{talk}");
    let name = format!("{shared}.weight");
    assert!(mixed[&name] == between(shared), "kept as it was");
    // Its neighbour alone decided the type of both.
    let both = [expert, &expert.replace("experts.1", "experts.0")];
    let (wide, talk) = pack("wide", &both);
    assert!(!talk.contains("kept matrices"), "{talk}");
    for part in ["weight_packed", "weight_scale"] {
        let name = format!("{expert}.{part}");
        assert!(mixed[&name] == wide[&name], "{name}");
    }
}

#[test]
fn absorbed_biases_are_written_and_told_from_damage() {
    let place = Place::new();
    let text = text();
    let folder = place.pack(
        "packed",
        &calibrated(&text, &["--bias-absorption", "--passes", "0"]),
    );
    let bias = "backbone.layers.0.mixer.conv1d.bias";
    let path = folder.join("model.safetensors");
    let mut packed = read_tensors(&path);
    let source = read_tensors(&nano().join("model.safetensors"));
    assert!(packed[bias] != source[bias]);
    let validate = || {
        let (folder, reference) = (folder.to_str().unwrap(), nano());
        let reference = reference.to_str().unwrap();
        let output = nemoconv(["validate", folder, "--reference", reference, "-q"]);
        let report = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), report)
    };
    let (code, report) = validate();
    assert_eq!(code, Some(0), "{report}");
    assert!(report.contains("note weights/bias-absorbed"), "{report}");
    // Another bias altogether.
    let (_, _, bytes) = packed.get_mut(bias).unwrap();
    bytes
        .iter_mut()
        .skip(1)
        .step_by(2)
        .for_each(|high| *high ^= 0x80);
    write_tensors(&path, &packed);
    let (code, report) = validate();
    assert_eq!(code, Some(2), "{report}");
}

/// One walk for both: the GGUF file is that of a walk of its own, the folder is whole and rounded with feedback.
#[test]
fn a_folder_comes_from_the_walk_of_a_gguf_file() {
    let place = Place::new();
    let (text, model) = (text(), nano());
    let convert = |name: &str, more: &[&str]| {
        let out = place.path(name);
        let fixed = ["to-gguf", model.to_str().unwrap(), "-q", "-o"];
        let types = ["-t", "q4_0", "--pure", "--no-rewrites", "--passes", "0"];
        let flags = calibrated(&text, more);
        let output = nemoconv([&fixed[..], &[out.to_str().unwrap()], &types, &flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        fs::read(out).unwrap()
    };
    let folder = place.path("both");
    let also = ["--also-safetensors", folder.to_str().unwrap()];
    let scheme = ["--also-scheme", "w4a16-asym"];
    let both = convert("both.gguf", &[also, scheme].concat());
    assert!(both == convert("alone.gguf", &[]));
    let left: Vec<String> = names(place.0.path());
    let expected = [
        "alone.gguf",
        "alone.receipt.json",
        "both",
        "both.gguf",
        "both.receipt.json",
    ];
    assert_eq!(left, expected);
    let receipt = json_of(folder.join("receipt.json"));
    let rounded = receipt["rounding"].as_array().unwrap();
    let with_feedback = rounded.iter().filter(|line| line["treatment"] == "gptq");
    assert_eq!(with_feedback.count(), 12);
    let reference = model.to_str().unwrap();
    let validate = [
        "validate",
        folder.to_str().unwrap(),
        "--reference",
        reference,
        "-q",
    ];
    let output = nemoconv(validate);
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{report}");
}

#[test]
fn experts_take_what_every_reader_loads() {
    let place = Place::new();
    let moe = moe(&place);
    let output = place.try_pack(&moe, "both", &["--phase", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let config = json_of(place.path("both").join("config.json"))["quantization_config"].clone();
    assert_eq!(config["format"], "mixed-precision");
    // transformers takes the first group that has `experts` in an expression, and `shared_experts` has.
    let experts = &config["config_groups"]["group_0"];
    assert_eq!(
        (experts["format"].clone(), experts["targets"].clone()),
        (
            json!("pack-quantized"),
            json!(["re:.*mixer\\.experts\\.\\d+\\.(up_proj|down_proj)$"])
        )
    );
    assert_eq!(
        config["ignore"],
        json!(["backbone.layers.1.mixer.gate", "lm_head"])
    );
    let output = place.try_pack(&moe, "vllm", &["--phase", "1", "--readers", "vllm"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let config = json_of(place.path("vllm").join("config.json"))["quantization_config"].clone();
    assert_eq!(config["format"], "int-quantized");
    // Rows of 256 and of 64: the experts of a layer share the smaller group.
    let output = place.try_pack(&moe, "groups", &["--scheme", "w4a16"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let config = json_of(place.path("groups").join("config.json"))["quantization_config"].clone();
    assert_eq!(
        config["config_groups"]["group_0"]["weights"]["group_size"],
        64
    );
}

#[test]
fn the_plan_is_shown_without_writing() {
    let place = Place::new();
    let output = place.try_pack(&nano(), "none", &["--dry-run", "--phase", "3"]);
    assert!(output.status.success());
    insta::assert_snapshot!("packed_plan", String::from_utf8_lossy(&output.stdout));
    assert!(names(place.0.path()).is_empty());
    let recipe = place.try_pack(
        &nano(),
        "none",
        &["--print-recipe", "--scheme", "w4a16-asym"],
    );
    let path = place.path("printed.yaml");
    fs::write(&path, &recipe.stdout).unwrap();
    let by_recipe = place.pack("recipe", &["--recipe", path.to_str().unwrap()]);
    let by_flag = place.pack("flag", &["--scheme", "w4a16-asym"]);
    assert!(files(&by_recipe) == files(&by_flag));
}
