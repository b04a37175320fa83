//! Configurations: which module takes which scheme, and what is refused.

use super::*;

fn scheme_of(config: Value, module: &str) -> Option<String> {
    let quantization = Quantization::parse(&config).unwrap();
    quantization.scheme_of(module).map(Scheme::to_string)
}

fn group(targets: &[&str], bits: u64, extra: Value) -> Value {
    let mut weights = json!({"num_bits": bits, "type": "int", "strategy": "channel"});
    for (key, value) in extra.as_object().unwrap() {
        weights[key] = value.clone();
    }
    json!({"targets": targets, "format": "pack-quantized", "weights": weights})
}

#[test]
fn modules_find_their_scheme() {
    let config = json!({
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": group(&["Linear"], 8, json!({})),
            "group_1": group(
                &["re:.*mixer.up_proj$", "backbone.layers.2.mixer.q_proj"],
                4,
                json!({"strategy": "group", "group_size": 32}),
            ),
        },
        "ignore": ["lm_head", "re:.*gate$"],
    });
    let check = |module, expected: Option<&str>| {
        assert_eq!(
            scheme_of(config.clone(), module).as_deref(),
            expected,
            "{module}"
        );
    };
    let wide = Some("W8A16 per row, pack-quantized");
    let narrow = Some("W4A16 g32, pack-quantized");
    // Names come before classes, whatever the order of the groups.
    check("backbone.layers.0.mixer.up_proj", narrow);
    check("model.layers.2.mixer.q_proj", narrow);
    check("backbone.layers.2.mixer.k_proj", wide);
    check("lm_head", None);
    check("backbone.layers.1.mixer.gate", None);
}

#[test]
fn small_float_inputs_are_known() {
    let check = |bits: u64, inputs: Value, expected: &str| {
        let mut inputs = inputs;
        inputs["num_bits"] = bits.into();
        inputs["type"] = "float".into();
        let float8 = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
        let config = json!({
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {
                "targets": ["Linear"], "format": "float-quantized", "weights": float8, "input_activations": inputs,
            }},
        });
        let found = scheme_of(config, "backbone.layers.0.mixer.up_proj").unwrap();
        assert!(found.ends_with(expected), "{found}");
    };
    let dynamic = |strategy: &str| json!({"strategy": strategy, "dynamic": true});
    check(
        8,
        dynamic("token"),
        "W8A8 float, float-quantized, float8 inputs per token",
    );
    check(
        8,
        json!({"strategy": "tensor"}),
        "float8 inputs with a fixed scale",
    );
    let groups = json!({"strategy": "group", "group_size": 128, "dynamic": true});
    check(8, groups, "float8 inputs per 128 of a token");
    let blocks =
        |size: u64| json!({"strategy": "tensor_group", "group_size": size, "dynamic": "local"});
    check(4, blocks(16), "NVFP4 inputs");
    check(4, blocks(32), "4-bit float inputs, scales fixed");
    check(
        8,
        dynamic("tensor"),
        "8-bit float inputs, scales found at run time",
    );
}

#[test]
fn gptq_overrides_by_pattern() {
    let config = json!({
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true,
        "dynamic": {
            r"+:.*\.layers\.5\.": {"bits": 8, "group_size": -1},
            r"-:.*\.experts\.": {},
        },
    });
    let check = |module, expected: Option<&str>| {
        assert_eq!(
            scheme_of(config.clone(), module).as_deref(),
            expected,
            "{module}"
        );
    };
    check("backbone.layers.1.mixer.up_proj", Some("W4A16 g128, gptq"));
    check(
        "backbone.layers.5.mixer.up_proj",
        Some("W8A16 per row, gptq"),
    );
    check("backbone.layers.5.mixer.experts.0.up_proj", None);
}

#[test]
fn modelopt_names_what_is_excluded_or_each_layer() {
    let config = json!({
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "backbone.layers.4.*"]},
    });
    let narrow = "W4A4 float g16, modelopt NVFP4, NVFP4 inputs";
    let wide = "W8A8 float, float-quantized, float8 inputs with a fixed scale";
    let check = |config: &Value, module, expected: Option<&str>| {
        assert_eq!(
            scheme_of(config.clone(), module).as_deref(),
            expected,
            "{module}"
        );
    };
    check(&config, "backbone.layers.5.mixer.up_proj", Some(narrow));
    check(&config, "backbone.layers.4.mixer.in_proj", None);
    check(&config, "lm_head", None);
    let mixed = json!({
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "backbone.layers.1.mixer.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "backbone.layers.1.mixer.down_proj": {"quant_algo": "FP8"},
        },
    });
    check(&mixed, "backbone.layers.1.mixer.up_proj", Some(narrow));
    check(&mixed, "model.layers.1.mixer.down_proj", Some(wide));
    check(&mixed, "backbone.layers.2.mixer.in_proj", None);
}

#[test]
fn lies_of_configurations() {
    let check = |config: Value, expected: &str| {
        assert_eq!(
            Quantization::parse(&config).unwrap_err().to_string(),
            expected
        );
    };
    check(
        json!({"quant_method": "awq"}),
        "`quantization_config`: quant_method is `awq`; known are `compressed-tensors`, `gptq`, `modelopt` and `fp8`",
    );
    check(json!({}), "`quantization_config`: has no `quant_method`");
    check(json!([1]), "`quantization_config`: has no `quant_method`");
    let compressed = |group: Value, more: Value| {
        let mut config = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": group},
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    };
    let good = group(&["Linear"], 4, json!({}));
    let in_group = |extra: Value, expected: &str| {
        let key = "`quantization_config.config_groups.group_0`: ";
        let config = compressed(group(&["Linear"], 4, extra), json!({}));
        check(config, &format!("{key}{expected}"));
    };
    in_group(
        json!({"num_bits": 3}),
        "packed codes must have 4 or 8 bits, found 3",
    );
    in_group(
        json!({"strategy": "group"}),
        "strategy is `group` without a group_size",
    );
    in_group(
        json!({"strategy": "block"}),
        "integer weights must have strategy `tensor`, `channel` or `group`",
    );
    in_group(
        json!({"type": "float"}),
        "weights of 4-bit float in `pack-quantized` are not known",
    );
    let unknown = |extra, expected: &str| {
        check(
            compressed(group(&["Linear"], 4, extra), json!({})),
            expected,
        );
    };
    unknown(
        json!({"zero": 1}),
        "`quantization_config`: unknown field `zero`, expected one of `actorder`, `block_structure`, `dynamic`, \
         `group_size`, `num_bits`, `observer`, `observer_kwargs`, `scale_dtype`, `strategy`, `symmetric`, `type`, \
         `zp_dtype`",
    );
    check(
        compressed(
            good.clone(),
            json!({"sparsity_config": {"format": "sparse-bitmask"}}),
        ),
        "`quantization_config`: sparse weights (`sparse-bitmask`) are not read",
    );
    let transform = json!({"config_groups": {"u": {"type": "hadamard", "apply": [
        {"targets": ["Linear"], "location": "weight_input"}, {"targets": ["Linear"], "location": "input"},
    ]}}});
    check(
        compressed(good.clone(), json!({"transform_config": transform})),
        "`quantization_config`: transform_config rotates at run time (`input`), which is not known",
    );
    check(
        compressed(good, json!({"format": "marlin-24"})),
        "`quantization_config`: unknown variant `marlin-24`, expected one of `dense`, `pack-quantized`, \
         `int-quantized`, `float-quantized`, `naive-quantized`, `nvfp4-pack-quantized`, `mixed-precision`",
    );
    let gptq = |key: &str, value: Value, expected: &str| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 64});
        config[key] = value;
        check(config, &format!("`quantization_config`: {expected}"));
    };
    gptq("bits", json!(3), "bits must be 4 or 8, found 3");
    gptq(
        "group_size",
        json!(0),
        "group_size must be -1 or positive, found 0",
    );
    gptq(
        "format",
        json!("marlin"),
        "format is `marlin`; known are `gptq` and `gptq_v2`",
    );
    gptq(
        "desc_act",
        json!(true),
        "columns in the order of activations (`desc_act`) are not read",
    );
}

/// The configuration is looked for in config.json, then beside it.
#[test]
fn configurations_lie_in_three_places() {
    let check = |files: &[(&str, Value)], expected: Option<&str>| {
        let folder = folder(&[]);
        for (name, value) in files {
            fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let found = Quantization::of(&checkpoint).unwrap();
        let found = found.and_then(|found| Some(found.scheme_of("m")?.to_string()));
        assert_eq!(found.as_deref(), expected);
    };
    let gptq = json!({"bits": 4, "group_size": 64});
    let modelopt = json!({"quantization": {"quant_algo": "FP8_PB_WO"}});
    check(&[("config.json", json!({}))], None);
    check(
        &[("config.json", json!({})), ("quantize_config.json", gptq)],
        Some("W4A16 g64, gptq"),
    );
    check(
        &[("hf_quant_config.json", modelopt.clone())],
        Some("W8A16 float, float-quantized"),
    );
    let mixed = json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}});
    check(
        &[("config.json", mixed), ("hf_quant_config.json", modelopt)],
        Some("W8A16 float, float-quantized"),
    );
}
