//! The drill: one defect per artifact, each found and named.

use std::path::{Path, PathBuf};

use nemoconv::formats::GgmlType;
use nemoconv::formats::gguf::Value;
use nemoconv_fixtures::checkpoint::RandomCheckpoint;
use nemoconv_fixtures::nano;
use serde_json::json;
use tempfile::{TempDir, tempdir};

use super::damage::{Editable, offset_field};
use super::{expect, faults};
use crate::support::{copy_of, to_gguf};
use nemoconv::report::Finding;

/// The nano model as a file of this type.
fn converted(file_type: &str) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    to_gguf(&nano(), &path, &["-t", file_type]);
    (folder, path)
}

/// Changes an artifact in place.
fn edit(path: &Path, edit: impl FnOnce(&mut Editable)) {
    let mut editable = Editable::read(path);
    edit(&mut editable);
    editable.write(path);
}

const DOWN: &str = "blk.1.ffn_down.weight";
const SSM_IN: &str = "blk.0.ssm_in.weight";

/// Where a block keeps the F16 scale of its codes.
fn scale_offset(ty: GgmlType) -> usize {
    match ty {
        GgmlType::Q2_K => 80,
        GgmlType::Q3_K => 108,
        GgmlType::Q6_K => 208,
        GgmlType::TQ1_0 => 52,
        GgmlType::TQ2_0 => 64,
        _ => 0,
    }
}

#[test]
fn a_flipped_byte_in_a_scale() {
    let types = [
        "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k",
        "iq4_nl", "iq4_xs", "tq1_0", "tq2_0",
    ];
    for file_type in types {
        let (_folder, path) = converted(file_type);
        let mut row = 0;
        edit(&path, |gguf| {
            row = gguf.row_bytes(SSM_IN);
            let (tensor, bytes) = gguf.tensor(SSM_IN);
            let high = 7 * row + scale_offset(tensor.ty) + 1;
            bytes[high] ^= 0x40;
        });
        let faults = faults(&path, Some(&nano()));
        let id = "weights/scale-out-of-range";
        expect(&faults, id, SSM_IN, &["row 7, block 0"]);
        assert_eq!(faults.len(), 1, "{file_type}: {faults:#?}");
        assert!(faults[0].place.offset.is_some() && faults[0].place.layer == Some(0));
    }
}

/// Not every byte can show: the low one of an F16 scale may change it by a thousandth.
#[test]
fn most_flipped_bytes_of_scales_are_found() {
    let cases = [
        ("q8_0", 0..2, 2),
        ("q4_0", 0..2, 2),
        ("q4_k_m", 0..16, 15),
        ("q6_k", 192..210, 18),
        ("iq4_xs", 0..8, 7),
        ("q3_k_m", 96..110, 11),
    ];
    for (file_type, bytes, expected) in cases {
        let (_folder, path) = converted(file_type);
        let found = bytes.clone().filter(|byte| {
            let flip = |gguf: &mut Editable| {
                let row = gguf.row_bytes(DOWN);
                let at = 7 * row + *byte;
                let (_, bytes) = gguf.tensor(DOWN);
                bytes[at] = !bytes[at];
            };
            edit(&path, flip);
            let faults = faults(&path, Some(&nano()));
            edit(&path, flip);
            let named = |finding: &&Finding| finding.place.tensor.as_deref() == Some(DOWN);
            assert_eq!(faults.iter().filter(named).count(), faults.len());
            !faults.is_empty()
        });
        let found = found.count();
        println!(
            "{file_type}: {found} of {} flipped bytes are found",
            bytes.len()
        );
        assert!(found >= expected, "{file_type}: {found} of {}", bytes.len());
    }
}

/// A float has no scale: there it is the value itself.
#[test]
fn a_flipped_byte_in_a_float() {
    for (file_type, bytes_per_weight) in [("bf16", 2), ("f16", 2), ("f32", 4)] {
        let (_folder, path) = converted(file_type);
        edit(&path, |gguf| {
            let row = gguf.row_bytes(SSM_IN);
            let (_, bytes) = gguf.tensor(SSM_IN);
            bytes[7 * row + 3 * bytes_per_weight + bytes_per_weight - 1] ^= 0x04;
        });
        let faults = faults(&path, Some(&nano()));
        assert_eq!(faults.len(), 1, "{file_type}: {faults:#?}");
        assert!(faults[0].message.contains("row 7, column"), "{faults:#?}");
        assert_eq!(faults[0].place.tensor.as_deref(), Some(SSM_IN));
    }
}

#[test]
fn one_permuted_tensor() {
    let tensor = "blk.1.ffn_up.weight";
    for file_type in ["bf16", "q8_0", "q4_k_m", "q2_k", "tq2_0"] {
        let (_folder, path) = converted(file_type);
        edit(&path, |gguf| {
            let row = gguf.row_bytes(tensor);
            gguf.tensor(tensor).1.rotate_left(7 * row);
        });
        let faults = faults(&path, Some(&nano()));
        let id = "weights/permuted-rows-suspected";
        // Two bits leave some rows beyond recognition.
        let words = match file_type {
            "tq2_0" => ["rows 0..", " hold rows 7.."],
            _ => ["512 rows", "rows 0..505 hold rows 7..512"],
        };
        expect(&faults, id, tensor, &words);
        assert_eq!(faults.len(), 1, "{file_type}: {faults:#?}");
    }
}

/// Rows of a matrix shuffled without any pattern, and columns, which no row explains.
#[test]
fn a_tensor_permuted_beyond_recognition() {
    let (_folder, path) = converted("q8_0");
    let tensor = DOWN;
    edit(&path, |gguf| {
        let row = gguf.row_bytes(tensor);
        let bytes = gguf.tensor(tensor).1;
        let rows: Vec<Vec<u8>> = bytes.chunks(row).map(<[u8]>::to_vec).collect();
        let shuffled = (0..rows.len()).map(|index| rows[index * 37 % rows.len()].clone());
        *bytes = shuffled.flatten().collect();
    });
    let id = "weights/permuted-rows-suspected";
    expect(&faults(&path, Some(&nano())), id, tensor, &["row", "hold"]);
    let (_folder, path) = converted("q8_0");
    edit(&path, |gguf| {
        let row = gguf.row_bytes(tensor);
        let rows = gguf.tensor(tensor).1.chunks_mut(row);
        rows.for_each(|row| row.rotate_left(34 * 3));
    });
    let words = ["the values are those of the reference in another order"];
    expect(&faults(&path, Some(&nano())), id, tensor, &words);
}

#[test]
fn a_wrong_pre_tokenizer() {
    for (name, words) in [
        ("gpt-2", "is `gpt-2`, the reference implies `pixtral`"),
        ("tekken", "is `tekken`"),
        ("nonsense", "`nonsense`"),
    ] {
        let (_folder, path) = converted("q8_0");
        edit(&path, |gguf| gguf.metadata.set("tokenizer.ggml.pre", name));
        let faults = faults(&path, Some(&nano()));
        let id = "tokenizer/wrong-pre-tokenizer";
        expect(&faults, id, "tokenizer.ggml.pre", &[words]);
        if name == "gpt-2" {
            let id = "tokenizer/token-ids-differ";
            expect(&faults, id, "tokenizer.ggml.pre", &["texts have other ids"]);
        }
    }
    // The same rules under another name are no defect.
    let (_folder, path) = converted("q8_0");
    edit(&path, |gguf| {
        gguf.metadata.set("tokenizer.ggml.pre", "llama-bpe")
    });
    assert_eq!(faults(&path, Some(&nano())), []);
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}";

/// The nano model with a chat template, and its artifact.
fn with_template(folder: &Path) -> (PathBuf, PathBuf) {
    let model = copy_of(&nano(), folder);
    let path = model.join("tokenizer_config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["chat_template"] = json!(TEMPLATE);
    std::fs::write(path, config.to_string()).unwrap();
    let artifact = folder.join("m.gguf");
    to_gguf(&model, &artifact, &["-t", "q8_0"]);
    (model, artifact)
}

#[test]
fn a_cut_template() {
    const KEY: &str = "tokenizer.chat_template";
    let check = |template: Option<&str>, expected: &[(&str, &str)]| {
        let folder = tempdir().unwrap();
        let (model, path) = with_template(folder.path());
        assert_eq!(faults(&path, Some(&model)), []);
        edit(&path, |gguf| match template {
            Some(template) => gguf.metadata.set(KEY, template),
            None => drop(gguf.metadata.remove(KEY)),
        });
        let faults = faults(&path, Some(&model));
        for (id, words) in expected {
            expect(&faults, id, KEY, &[words]);
        }
        assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    };
    let cut = ("tokenizer/chat-template-cut", "ends after");
    let differs = "tokenizer/chat-template-differs";
    check(
        Some(&TEMPLATE[..100]),
        &[cut, ("tokenizer/chat-template-invalid", "line 1")],
    );
    // What is left parses.
    let left = TEMPLATE.find("{% if add").unwrap();
    check(Some(&TEMPLATE[..left]), &[cut]);
    let changed = TEMPLATE.replace("[/INST]", "[/INST] ");
    check(
        Some(&changed),
        &[(differs, "from byte"), (differs, "conversation 1 of 5")],
    );
    check(None, &[(differs, "is missing")]);
}

/// A small model with experts and its artifact.
fn experts(folder: &Path, file_type: &str) -> (PathBuf, PathBuf) {
    let checkpoint = RandomCheckpoint {
        pattern: "ME*E".into(),
        ..RandomCheckpoint::default()
    };
    let model = checkpoint.write_as(folder, "experts").unwrap();
    let path = folder.join("m.gguf");
    to_gguf(&model, &path, &["-t", file_type]);
    (model, path)
}

const UP: &str = "blk.1.ffn_up_exps.weight";

#[test]
fn a_missing_expert() {
    // Left out of the stack.
    let folder = tempdir().unwrap();
    let (model, path) = experts(folder.path(), "q4_k_m");
    edit(&path, |gguf| {
        let (tensor, bytes) = gguf.tensor(UP);
        tensor.dims[2] -= 1;
        bytes.truncate(bytes.len() / 16 * 15);
    });
    let id = "container/wrong-shape";
    expect(&faults(&path, Some(&model)), id, UP, &["15 of 16 experts"]);
    // In the stack, and empty; with and without a reference.
    for file_type in ["bf16", "q8_0", "q4_k_m"] {
        let folder = tempdir().unwrap();
        let (model, path) = experts(folder.path(), file_type);
        edit(&path, |gguf| {
            let (_, bytes) = gguf.tensor(UP);
            let expert = bytes.len() / 16;
            bytes[5 * expert..6 * expert].fill(0);
        });
        for reference in [None, Some(model.as_path())] {
            let id = "weights/missing-expert";
            let faults = faults(&path, reference);
            expect(&faults, id, UP, &["expert 5 of 16 holds zeros only"]);
        }
    }
}

#[test]
fn swapped_experts() {
    for file_type in ["bf16", "q4_k_m"] {
        let folder = tempdir().unwrap();
        let (model, path) = experts(folder.path(), file_type);
        edit(&path, |gguf| gguf.swap_rows(UP, 2 * 256, 9 * 256, 256));
        let faults = faults(&path, Some(&model));
        let words = ["expert 2 holds expert 9", "expert 9 holds expert 2"];
        expect(&faults, "weights/permuted-rows-suspected", UP, &words);
        assert_eq!(faults.len(), 1, "{file_type}: {faults:#?}");
    }
}

#[test]
fn swapped_rows_of_x_and_z() {
    for file_type in ["bf16", "q8_0", "q4_k_m", "iq4_nl", "q2_k"] {
        let (_folder, path) = converted(file_type);
        edit(&path, |gguf| gguf.swap_rows(SSM_IN, 0, 512, 512));
        let faults = faults(&path, Some(&nano()));
        let words = [
            "rows 0..512 (z) hold rows 512..1024 (x)",
            "rows 512..1024 (x) hold rows 0..512 (z)",
        ];
        expect(&faults, "weights/permuted-rows-suspected", SSM_IN, &words);
        assert_eq!(faults.len(), 1, "{file_type}: {faults:#?}");
    }
}

#[test]
fn a_shifted_offset() {
    let check = |shift: i64, expected: &str| {
        let (_folder, path) = converted("q8_0");
        let mut file = std::fs::read(&path).unwrap();
        let at = offset_field(&file, SSM_IN, 2);
        let offset = i64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        file[at..at + 8].copy_from_slice(&(offset + shift).to_le_bytes());
        std::fs::write(&path, file).unwrap();
        let faults = faults(&path, Some(&nano()));
        expect(&faults, expected, SSM_IN, &["of the data section, found"]);
        assert_eq!(faults.len(), 1, "{faults:#?}");
    };
    check(32, "container/gap-between-tensors");
    check(-32, "container/overlapping-tensors");
    check(8, "container/misaligned-tensor");
    let (_folder, path) = converted("q8_0");
    let mut file = std::fs::read(&path).unwrap();
    let at = offset_field(&file, SSM_IN, 2);
    file[at + 4] = 1;
    std::fs::write(&path, file).unwrap();
    let id = "container/offset-outside-file";
    expect(&faults(&path, None), id, SSM_IN, &["its data ends at"]);
}

#[test]
fn nan_in_one_block() {
    let types = [
        "bf16", "f16", "q8_0", "q4_0", "q4_k_m", "q6_k", "iq4_xs", "q2_k", "tq1_0",
    ];
    for file_type in types {
        let (_folder, path) = converted(file_type);
        edit(&path, |gguf| {
            let row = gguf.row_bytes(SSM_IN);
            let (tensor, bytes) = gguf.tensor(SSM_IN);
            let at = 9 * row + scale_offset(tensor.ty);
            bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
        });
        for reference in [None, Some(nano())] {
            let faults = faults(&path, reference.as_deref());
            expect(&faults, "weights/not-finite", SSM_IN, &["row 9, "]);
        }
    }
}

/// Without a reference the file itself still shows a broken scale.
#[test]
fn a_broken_scale_without_a_reference() {
    for file_type in ["q8_0", "q4_k_m", "bf16"] {
        let (_folder, path) = converted(file_type);
        edit(&path, |gguf| {
            let row = gguf.row_bytes(SSM_IN);
            let (tensor, bytes) = gguf.tensor(SSM_IN);
            let high = 7 * row + scale_offset(tensor.ty) + 1;
            bytes[high] = 0x7a;
        });
        let faults = faults(&path, None);
        let id = "weights/scale-out-of-range";
        expect(&faults, id, SSM_IN, &["row 7, "]);
    }
}

/// Keys that contradict the tensors, and keys that are not there.
#[test]
fn keys_are_held_against_tensors() {
    let check = |key: &str, value: Option<Value>, id: &str| {
        let (_folder, path) = converted("q8_0");
        edit(&path, |gguf| match value {
            Some(value) => gguf.metadata.set(key, value),
            None => drop(gguf.metadata.remove(key)),
        });
        expect(&faults(&path, None), id, key, &[]);
    };
    let contradicting = "container/contradicting-key";
    check("nemotron_h.block_count", Some(Value::U32(6)), contradicting);
    check(
        "nemotron_h.embedding_length",
        Some(Value::U32(512)),
        contradicting,
    );
    check(
        "nemotron_h.vocab_size",
        Some(Value::U32(512)),
        contradicting,
    );
    check("nemotron_h.ssm.state_size", None, "container/missing-key");
    check("tokenizer.ggml.tokens", None, "container/missing-key");
    let wrong = "container/wrong-key-type";
    check("nemotron_h.ssm.group_count", Some(Value::I32(2)), wrong);
    check(
        "general.architecture",
        Some("llama".into()),
        "container/unsupported-architecture",
    );
}
