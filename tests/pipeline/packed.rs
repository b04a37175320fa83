//! Packed folders as models: the values that they decode to, the findings that they give, the files that are made of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nemoconv::artifact::{StoredModel, StoredTensor};
use nemoconv::backend::activation::Activation;
use nemoconv::backend::cpu::{Cpu, Residence};
use nemoconv::formats::GgmlType;
use nemoconv::formats::gguf::Gguf;
use nemoconv::forward::network::{Network, Sequence};
use nemoconv::forward::numerics::Numerics;
use nemoconv::forward::observer::Silent;
use nemoconv::report::{Finding, Severity};
use nemoconv_fixtures::checkpoint::{Experts, RandomCheckpoint};
use nemoconv_fixtures::nano;
use nemoconv_fixtures::packed::{INPUT_SCALE, Layout, write};
use tempfile::{TempDir, tempdir};

use super::{expect, findings};
use crate::support::{edit_config, read_tensors, stderr, to_gguf, try_to_gguf, write_tensors};

const LAYOUTS: [Layout; 8] = [
    packed(4, 64, true),
    packed(4, 32, false),
    packed(8, 128, true),
    Layout::Int8 {
        fixed_inputs: false,
    },
    Layout::Int8 { fixed_inputs: true },
    Layout::Gptq { bits: 4, group: 64 },
    Layout::Gptq {
        bits: 8,
        group: 128,
    },
    Layout::Nvfp4,
];

const fn packed(bits: u32, group: usize, symmetric: bool) -> Layout {
    Layout::Packed {
        bits,
        group,
        symmetric,
    }
}

/// A source, its codes, and what they decode to.
struct Folders {
    source: PathBuf,
    packed: PathBuf,
    plain: PathBuf,
    folder: TempDir,
}

impl Folders {
    fn of(source: &Path, layout: Layout) -> Self {
        let folder = tempdir().unwrap();
        let [packed, plain] = ["packed", "plain"].map(|name| folder.path().join(name));
        write(source, layout, &packed, &plain).unwrap();
        Self {
            source: source.to_owned(),
            packed,
            plain,
            folder,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Small, with experts.
fn experts(folder: &Path) -> PathBuf {
    let checkpoint = RandomCheckpoint {
        pattern: "ME*E".into(),
        hidden_size: 128,
        num_attention_heads: 4,
        head_dim: 32,
        ssm_state_size: 32,
        experts: Experts {
            n_routed_experts: 4,
            num_experts_per_tok: 2,
            moe_intermediate_size: 128,
            moe_shared_expert_intermediate_size: 128,
            moe_latent_size: None,
        },
        ..RandomCheckpoint::default()
    };
    checkpoint.write_as(folder, "experts").unwrap()
}

fn open(path: &Path) -> StoredModel {
    StoredModel::open(path.to_str().unwrap()).unwrap()
}

fn values(model: &StoredModel, tensor: &StoredTensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.weights() as usize];
    let of_matrix = tensor.rows * tensor.columns;
    for (matrix, values) in values.chunks_mut(of_matrix).enumerate() {
        // Not all rows at once: parts must fit together.
        for (part, values) in values.chunks_mut(7 * tensor.columns).enumerate() {
            model
                .dequantize_rows(tensor, matrix, 7 * part, &mut Vec::new(), values)
                .unwrap();
        }
    }
    values
}

#[track_caller]
fn assert_same_values(one: &Path, other: &Path, what: &str) {
    let (one, other) = (open(one), open(other));
    assert_eq!(one.tensors().len(), other.tensors().len());
    for tensor in one.tensors() {
        let theirs = other.tensor(&tensor.name).unwrap();
        let same = values(&one, tensor) == values(&other, theirs);
        assert!(same, "{what}: {}", tensor.name);
    }
}

/// What a gate would stop, but for experts that transformers alone cannot read.
fn faults(artifact: &Path, reference: Option<&Path>) -> Vec<Finding> {
    let mut found = super::faults(artifact, reference);
    found.retain(|finding| !finding.message.contains("; vLLM and SGLang read them"));
    found
}

#[test]
fn every_layout_decodes_to_its_values_without_findings() {
    let folder = tempdir().unwrap();
    for source in [nano(), experts(folder.path())] {
        for layout in LAYOUTS {
            let folders = Folders::of(&source, layout);
            assert_same_values(&folders.packed, &folders.plain, &format!("{layout:?}"));
            assert_eq!(faults(&folders.packed, None), [], "{layout:?}");
            for reference in [&folders.source, &folders.plain] {
                let faults = faults(&folders.packed, Some(reference));
                assert_eq!(faults, [], "{layout:?}");
            }
            let receipt = folders.packed.join("receipt.json");
            std::fs::write(receipt, r#"{"rounding": {"method": "nearest"}}"#).unwrap();
            let faults = faults(&folders.packed, Some(&folders.source));
            assert_eq!(faults, [], "{layout:?}, rounded to the nearest");
        }
    }
}

fn tensor_bytes(path: &Path) -> Vec<(String, GgmlType, Vec<u8>)> {
    let gguf = Gguf::open(path).unwrap();
    let tensors = gguf.header().tensors.iter();
    tensors
        .map(|t| (t.name.clone(), t.ty, gguf.tensor_bytes(t).to_vec()))
        .collect()
}

/// What is made of codes is what is made of the values they stand for.
#[test]
fn conversions_are_those_of_the_decoded_folder() {
    for layout in LAYOUTS {
        let folders = Folders::of(&nano(), layout);
        for flags in [&["-t", "q4_k_m"][..], &["-t", "bf16", "--widen"]] {
            let [ours, theirs] = [&folders.packed, &folders.plain].map(|model| {
                let path = folders.file("m.gguf");
                to_gguf(model, &path, flags);
                tensor_bytes(&path)
            });
            assert!(ours == theirs, "{layout:?} {flags:?}");
        }
    }
}

/// Types that hold the codes take them over: nothing is lost, whereas rounding the decoded values again loses.
#[test]
fn codes_go_over_bit_for_bit() {
    let folder = tempdir().unwrap();
    for (layout, ty) in [
        (packed(4, 32, true), "q4_0"),
        (packed(4, 64, true), "q4_0"),
        (Layout::Gptq { bits: 4, group: 64 }, "q4_0"),
        (packed(4, 32, false), "q8_0"),
        (packed(8, 128, true), "q8_0"),
        (
            Layout::Int8 {
                fixed_inputs: false,
            },
            "q8_0",
        ),
    ] {
        for source in [nano(), experts(folder.path())] {
            let folders = Folders::of(&source, layout);
            let path = folders.file("m.gguf");
            let others = ["--tensor-type", "^(token_embd|output)=bf16"];
            let flags = [&["-t", ty, "--pure"][..], &others].concat();
            to_gguf(&folders.packed, &path, &flags);
            let plain = open(&folders.plain);
            let gguf = open(&path);
            let coded = gguf.tensors().iter().filter(|t| t.ty.block_elements() > 1);
            let mut count = 0;
            for tensor in coded {
                let theirs = values(&plain, plain.tensor(&tensor.name).unwrap());
                let same = values(&gguf, tensor) == theirs;
                assert!(same, "{layout:?} {ty} {}", tensor.name);
                count += 1;
            }
            assert!(count > 5, "{count}");
        }
    }
}

/// The matrices that the fixtures pack.
const LINEARS: &str = "(ssm_(in|out)|attn_(q|k|v|output)|ffn_(up|down)(_exps|_shexp)?).weight";

#[test]
fn nvfp4_goes_over_with_its_second_scale() {
    let folder = tempdir().unwrap();
    for source in [nano(), experts(folder.path())] {
        let folders = Folders::of(&source, Layout::Nvfp4);
        let path = folders.file("m.gguf");
        let rule = format!("{LINEARS}=nvfp4");
        to_gguf(
            &folders.packed,
            &path,
            &["-t", "bf16", "--tensor-type", &rule],
        );
        let gguf = open(&path);
        let plain = open(&folders.plain);
        let coded = gguf.tensors().iter().filter(|t| t.ty == GgmlType::NVFP4);
        let mut count = 0;
        for tensor in coded {
            let stem = tensor.name.strip_suffix(".weight").unwrap();
            let scale = gguf.tensor(&format!("{stem}.scale")).unwrap();
            assert_eq!(scale.weights(), tensor.matrices as u64);
            let theirs = values(&plain, plain.tensor(&tensor.name).unwrap());
            assert!(values(&gguf, tensor) == theirs, "{}", tensor.name);
            count += 1;
        }
        assert!(count > 5, "{count}");
        for reference in [None, Some(&folders.packed), Some(&folders.source)] {
            let faults = faults(&path, reference.map(PathBuf::as_path));
            assert_eq!(faults, [], "{reference:?}");
        }
        let [ours, theirs] = [&path, &folders.plain].map(|model| logits(model));
        let differences = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
        let largest = differences.fold(0.0, f32::max);
        let size = theirs.iter().fold(0f32, |size, x| size.max(x.abs()));
        assert!(largest < 1e-5 * size, "{largest} of {size}");
    }
}

/// Logits after a few tokens, in f32.
fn logits(model: &Path) -> Vec<f32> {
    let stored = Arc::new(open(model));
    let backend = Cpu::new(Arc::clone(&stored), Residence::Mapped);
    let network = Network::open(&stored, backend, &Numerics::EXACT).unwrap();
    let mut state = network.empty_state().unwrap();
    let tokens: Vec<u32> = (5..25).collect();
    let mut batch = [Sequence {
        tokens: &tokens,
        state: &mut state,
    }];
    let normed = network.run(&mut batch, &mut Silent).unwrap();
    network.logits(&normed, &[19], &mut Silent).unwrap()
}

#[test]
fn nvfp4_is_not_made() {
    let folders = Folders::of(&nano(), packed(4, 64, true));
    let rule = format!("{LINEARS}=nvfp4");
    let flags = ["-t", "bf16", "--tensor-type", &rule];
    for model in [&folders.packed, &folders.source] {
        let output = try_to_gguf(model, &folders.file("m.gguf"), &flags);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("only taken over as it is"), "{message}");
    }
}

#[test]
fn inputs_are_taken_as_declared() {
    let activation = |layout, name: &str| {
        let folders = Folders::of(&nano(), layout);
        let model = open(&folders.packed);
        Numerics::of_target(&model).activation(model.tensor(name).unwrap())
    };
    let dynamic = Layout::Int8 {
        fixed_inputs: false,
    };
    let fixed = Layout::Int8 { fixed_inputs: true };
    let of_ssm = |layout| activation(layout, "blk.0.ssm_in.weight");
    assert_eq!(of_ssm(dynamic), Activation::TokenInt8);
    assert_eq!(of_ssm(fixed), Activation::StaticInt8(INPUT_SCALE));
    assert_eq!(of_ssm(Layout::Nvfp4), Activation::Nvfp4(INPUT_SCALE));
    assert_eq!(of_ssm(packed(8, 128, true)), Activation::None);
    assert_eq!(activation(dynamic, "output.weight"), Activation::None);
}

/// Changes tensors of a packed folder.
fn edit(folder: &Path, edit: impl FnOnce(&mut crate::support::Tensors)) {
    let path = folder.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &tensors);
}

const EXPERT_0: &str = "backbone.layers.1.mixer.experts.0.up_proj.weight";
const EXPERT_1: &str = "backbone.layers.1.mixer.experts.1.up_proj.weight";

/// Swaps these tensors of the first two experts.
fn swap(folder: &Path, suffixes: &[&str]) {
    edit(folder, |tensors| {
        for suffix in suffixes {
            let [first, second] = [EXPERT_0, EXPERT_1].map(|name| format!("{name}{suffix}"));
            let kept = tensors[&first].clone();
            let other = tensors.insert(second, kept).unwrap();
            tensors.insert(first, other);
        }
    });
}

#[test]
fn experts_are_compared_one_by_one() {
    let folder = tempdir().unwrap();
    let source = experts(folder.path());
    let stack = "blk.1.ffn_up_exps.weight";
    let whole = Folders::of(&source, packed(4, 64, true));
    swap(&whole.packed, &["_packed", "_scale"]);
    let found = faults(&whole.packed, Some(&source));
    let words = ["expert 0 holds expert 1", "expert 1 holds expert 0"];
    expect(&found, "weights/permuted-rows-suspected", stack, &words);
    // Codes of another expert under one's own scales.
    let codes = Folders::of(&source, packed(4, 64, true));
    swap(&codes.packed, &["_packed"]);
    let found = faults(&codes.packed, Some(&source));
    let wrong = found
        .iter()
        .find(|f| f.place.tensor.as_deref() == Some(stack));
    assert_eq!(wrong.unwrap().severity, Severity::Error, "{found:#?}");
    // Codes of nobody.
    let noise = Folders::of(&source, packed(4, 64, true));
    edit(&noise.packed, |tensors| {
        let codes = &mut tensors.get_mut(&format!("{EXPERT_0}_packed")).unwrap().2;
        for (index, byte) in codes.iter_mut().enumerate() {
            *byte = (index * 167 + index / 7) as u8;
        }
    });
    let found = faults(&noise.packed, Some(&source));
    let wrong = found
        .iter()
        .find(|f| f.place.tensor.as_deref() == Some(stack));
    assert_eq!(wrong.unwrap().severity, Severity::Error, "{found:#?}");
}

#[test]
fn linears_are_packed_or_listed() {
    let plain_in_proj = |folders: &Folders| {
        let name = "backbone.layers.0.mixer.in_proj.weight";
        let tensor = read_tensors(&folders.plain.join("model.safetensors"))[name].clone();
        edit(&folders.packed, |tensors| {
            tensors.retain(|found, _| !found.starts_with(name));
            tensors.insert(name.into(), tensor);
        });
        name
    };
    let folders = Folders::of(&nano(), packed(4, 64, true));
    let name = plain_in_proj(&folders);
    let found = findings(&folders.packed, None);
    let words = ["W4A16 g64", "plain F32"];
    expect(&found, "container/quantization-config", name, &words);
    // GPTQ has no such list: runtimes look at the tensors.
    let folders = Folders::of(&nano(), Layout::Gptq { bits: 4, group: 64 });
    let module = "backbone.layers.0.mixer.in_proj";
    let tensors = read_tensors(&folders.plain.join("model.safetensors"));
    edit(&folders.packed, |packed| {
        packed.retain(|found, _| !found.starts_with(module));
        let name = format!("{module}.weight");
        packed.insert(name.clone(), tensors[&name].clone());
    });
    assert_eq!(faults(&folders.packed, None), []);
}

#[test]
fn what_runtimes_fuse_is_stored_alike() {
    let folder = tempdir().unwrap();
    let source = experts(folder.path());
    let int8 = Layout::Int8 {
        fixed_inputs: false,
    };
    let found = findings(&Folders::of(&source, int8).packed, None);
    let up = "backbone.layers.1.mixer.experts.0.up_proj";
    let id = "container/quantization-config";
    expect(&found, id, up, &["transformers leaves experts"]);
    // Query plain and listed, key and value packed; one expert plain.
    let folders = Folders::of(&source, packed(4, 64, true));
    let plain = read_tensors(&folders.plain.join("model.safetensors"));
    let query = "backbone.layers.2.mixer.q_proj";
    let expert = "backbone.layers.1.mixer.experts.2.up_proj";
    edit(&folders.packed, |tensors| {
        for module in [query, expert] {
            tensors.retain(|name, _| !name.starts_with(module));
            let name = format!("{module}.weight");
            tensors.insert(name.clone(), plain[&name].clone());
        }
    });
    edit_config(&folders.packed, |config| {
        config["quantization_config"]["ignore"] =
            serde_json::json!(["re:.*gate$", "lm_head", query, expert]);
    });
    let found = faults(&folders.packed, None);
    expect(&found, id, up, &["experts of a layer"]);
    for projection in ["k_proj", "v_proj"] {
        let module = format!("backbone.layers.2.mixer.{projection}");
        expect(&found, id, &module, &["`blk.2.attn_q.weight`"]);
    }
}

#[test]
fn every_fault_of_a_packed_folder_is_found() {
    let folders = Folders::of(&nano(), packed(4, 64, true));
    edit(&folders.packed, |tensors| {
        tensors.remove("backbone.layers.0.mixer.in_proj.weight_scale");
        let shape = tensors.get_mut("backbone.layers.1.mixer.up_proj.weight_shape");
        shape.unwrap().2[0] ^= 1;
    });
    let found = findings(&folders.packed, None);
    let check = |tensor, words: &[&str]| expect(&found, "container/packed-linear", tensor, words);
    check(
        "backbone.layers.0.mixer.in_proj",
        &["has no `weight_scale`"],
    );
    check(
        "backbone.layers.1.mixer.up_proj.weight_shape",
        &["says [513, 256]"],
    );
}

/// Folders that the formats' own tools wrote, beside the checkpoints they were made from.
#[test]
fn folders_of_the_real_tools() {
    let Some(shared) = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from) else {
        println!("skipped: NEMOCONV_SHARED is not set");
        return;
    };
    let gold = shared.join("gold");
    for (name, source) in [
        ("compressed-tensors-w4a16-g128", "dense"),
        ("compressed-tensors-w4a16-g128-asym", "dense"),
        ("compressed-tensors-w8a8-int8-rtn", "dense"),
        ("compressed-tensors-w8a8-int8-gptq", "dense"),
        ("compressed-tensors-w4a8-int", "dense"),
        ("compressed-tensors-mixed-w8a8-w4a16g64", "dense"),
        ("compressed-tensors-moe-w4a16-g128", "moe"),
        ("compressed-tensors-moe-w8a8-int8", "moe"),
        ("gptq-dense-w4g64", "dense"),
    ] {
        let source = gold.join(format!("compressed-tensors-source-{source}"));
        let mut found = faults(&gold.join(name), Some(&source));
        // These folders have no tokenizer.
        found.retain(|finding| !finding.rule.id().starts_with("tokenizer/"));
        assert_eq!(found, [], "{name}");
    }
}
