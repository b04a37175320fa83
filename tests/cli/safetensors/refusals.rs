//! What `to-safetensors` refuses, and that nothing is left then.

use super::*;

#[test]
fn what_a_reader_would_misread_is_refused_by_its_name() {
    let place = Place::new();
    let refuses = |flags: &[&str], expected: &[&str]| place.refuses(&nano(), flags, expected);
    refuses(
        &["--linear", "q_proj=w8a16"],
        &["vLLM fuses q, k and v", "layers.3.mixer"],
    );
    refuses(
        &["--linear", "k_proj=keep"],
        &["not quantized", "vLLM fuses"],
    );
    refuses(
        &["--scheme", "gptq-4", "--linear", "up_proj=w8a8"],
        &["one folder", "no reader"],
    );
    refuses(&["--group-size", "48"], &["128, 64 or 32", "found 48"]);
    refuses(
        &["--linear", "gate_proj=keep"],
        &["`gate_proj` matches no linear"],
    );
    refuses(&["--scheme", "gptq-4"], &["multiples of 32", "in_proj"]);
    let moe = moe(&place);
    place.refuses(
        &moe,
        &["--linear", "experts\\.\\d+\\.=w8a8"],
        &[
            "transformers leaves experts in I8 at random",
            "--readers vllm",
        ],
    );
    place.refuses(
        &moe,
        &["--linear", "experts\\.\\d+\\.=w4a16-asym"],
        &["no zero points of experts", "--readers vllm"],
    );
    place.refuses(
        &moe,
        &["--linear", "mixer\\.experts\\.=keep"],
        &["packed experts alone", "--readers vllm"],
    );
    place.refuses(
        &moe,
        &["--linear", "experts\\.1\\.=keep"],
        &["expert 0 alone"],
    );
    place.refuses(
        &moe,
        &["--group-size", "128"],
        &["groups of 128 do not divide rows of 64", "experts"],
    );
}

#[test]
fn a_packed_head_is_named_and_nothing_packed_is_refused() {
    let place = Place::new();
    let flags = ["--scheme", "w8a16", "--linear", "lm_head=w8a16"];
    let config =
        json_of(place.pack("head", &flags).join("config.json"))["quantization_config"].clone();
    assert_eq!(
        config["config_groups"]["group_0"]["targets"],
        json!(["Linear", "lm_head"])
    );
    assert_eq!(config["ignore"], json!([]));
    place.refuses(
        &nano(),
        &["--linear", ".=keep"],
        &["no linear is left to quantize"],
    );
}

#[test]
fn a_folder_with_something_in_it_is_left_alone() {
    let place = Place::new();
    let out = place.path("taken");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "mine").unwrap();
    let output = place.try_pack(&nano(), "taken", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("not an empty folder"),
        "{}",
        stderr(&output)
    );
    assert_eq!(names(&out), ["mine"]);
    fs::remove_file(out.join("mine")).unwrap();
    place.pack("taken", &[]);
    let output = place.try_pack(&nano(), "absent/packed", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("absent"), "{}", stderr(&output));
}

#[test]
fn weights_that_do_not_fit_are_refused_or_allowed() {
    let place = Place::new();
    let model = copy_of(&nano(), &place.path("source"));
    let path = model.join("model.safetensors");
    let name = "backbone.layers.1.mixer.up_proj.weight";
    let mut tensors = read_tensors(&path);
    let set = |tensors: &mut crate::support::Tensors, value: f32| {
        let bytes = half::bf16::from_f32(value).to_le_bytes();
        tensors.get_mut(name).unwrap().2[..2].copy_from_slice(&bytes);
    };
    set(&mut tensors, 1e7);
    write_tensors(&path, &tensors);
    let gptq = ["--scheme", "gptq-4", "--linear", "in_proj=keep"];
    place.refuses(&model, &gptq, &["too large for F16", "ffn_up"]);
    let output = place.try_pack(
        &model,
        "allowed",
        &[&gptq[..], &["--allow-f16-overflow"]].concat(),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    set(&mut tensors, f32::NAN);
    write_tensors(&path, &tensors);
    place.refuses(&model, &[], &["NaN or infinite", "--allow-nonfinite"]);
}
