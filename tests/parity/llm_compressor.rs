//! Packed folders beside those of llm-compressor 0.14 (compressed-tensors 0.19), byte for byte; GPTQ's layout beside a folder
//! that vLLM reads.
//!
//! Needs the folder of published outputs, `gold/`, in `NEMOCONV_SHARED`.

use std::path::{Path, PathBuf};

use nemoconv::formats::packed::{Role, Width, bits};
use nemoconv::plan::packed::scheme::NamedScheme;
use nemoconv::quantize::integer::{IntegerGrid, ScaleFloat};
use nemoconv::write::packed::parts::Rows;
use serde_json::Value;
use tempfile::tempdir;

use crate::support::{Tensors, nemoconv, read_tensors, stderr};

fn gold() -> Option<PathBuf> {
    let shared = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from);
    if shared.is_none() {
        println!("skipped: NEMOCONV_SHARED names no folder");
    }
    shared.map(|shared| shared.join("gold"))
}

fn quantization_config(folder: &Path) -> Value {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config.replace("Infinity", "1e30")).unwrap();
    config["quantization_config"].clone()
}

#[test]
fn every_folder_is_theirs_when_we_round_as_they_do() {
    let Some(gold) = gold() else { return };
    let check = |source: &str, expected: &str, flags: &[&str]| {
        let out = tempdir().unwrap();
        let ours = out.path().join("packed");
        let model = gold.join(format!("compressed-tensors-source-{source}"));
        let fixed = [
            "to-safetensors",
            model.to_str().unwrap(),
            "-q",
            "-o",
            ours.to_str().unwrap(),
        ];
        let rounding = ["--rounding", "llmcompressor"];
        let output = nemoconv(fixed.iter().chain(&rounding).chain(flags));
        assert!(output.status.success(), "{}", stderr(&output));
        let theirs = gold.join(format!("compressed-tensors-{expected}"));
        let shard = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(
            shard(&ours) == shard(&theirs),
            "{expected}: the shards differ"
        );
        assert_eq!(
            quantization_config(&ours),
            quantization_config(&theirs),
            "{expected}"
        );
    };
    check(
        "dense",
        "w4a16-g128",
        &["--scheme", "w4a16", "--group-size", "128"],
    );
    check("dense", "w4a16-g128-asym", &["--scheme", "w4a16-asym"]);
    check("dense", "w8a8-int8-rtn", &["--scheme", "w8a8"]);
    check("dense", "w4a8-int", &["--scheme", "w4a8"]);
    let mixed = [
        "--linear",
        "in_proj|out_proj=w8a8",
        "--linear",
        "up_proj|down_proj=w4a16",
        "--linear",
        ".=keep",
        "--group-size",
        "64",
    ];
    check("dense", "mixed-w8a8-w4a16g64", &mixed);
    check("moe", "moe-w4a16-g128", &["--scheme", "w4a16"]);
    check(
        "moe",
        "moe-w8a8-int8",
        &["--scheme", "w8a8", "--readers", "vllm"],
    );
}

/// The parts of a GPTQ linear.
fn gptq_parts(tensors: &Tensors, module: &str) -> [Vec<u8>; 4] {
    ["qweight", "scales", "qzeros", "g_idx"]
        .map(|part| tensors[&format!("{module}.{part}")].2.clone())
}

#[test]
fn gptq_folders_are_packed_bit_for_bit() {
    let Some(gold) = gold() else { return };
    let tensors = read_tensors(&gold.join("gptq-dense-w4g64/model.safetensors"));
    let grid = IntegerGrid {
        width: Width::Four,
        group_size: Some(64),
        has_zero_point: false,
        scale: ScaleFloat::F16,
    };
    let scheme = NamedScheme::Gptq4.with_groups(64);
    assert_eq!(scheme.grid, grid);
    let modules: Vec<&str> = tensors
        .keys()
        .filter_map(|name| name.strip_suffix(".qweight"))
        .collect();
    assert_eq!(modules.len(), 8);
    for module in modules {
        let expected = gptq_parts(&tensors, module);
        let (columns, rows) = (
            expected[3].len() / 4,
            tensors[&format!("{module}.scales")].1[1],
        );
        let mut codes = vec![0; rows * columns];
        bits::unpack_transposed(Width::Four, columns, &expected[0], &mut codes).unwrap();
        // Integer rows: the codes of a row, then its scales.
        let mut integers = Vec::new();
        for (row, codes) in codes.chunks(columns).enumerate() {
            integers.extend(codes.iter().map(|code| code.cast_unsigned()));
            let of_row = |group: usize| (group * rows + row) * 2;
            let scales = (0..columns / 64)
                .flat_map(|group| expected[1][of_row(group)..of_row(group) + 2].to_vec());
            integers.extend(scales);
        }
        let rows = Rows {
            layout: &scheme.scheme.layout,
            grid: &grid,
            all_rows: rows,
            columns,
            first: 0,
            rows: &integers,
        };
        let roles = [Role::Codes, Role::Scale, Role::ZeroPoint, Role::GroupIndex];
        let mut found = Vec::new();
        for (role, expected) in roles.into_iter().zip(&expected) {
            assert_eq!(
                rows.part(role, &mut found).unwrap(),
                0,
                "{module}: {role:?}"
            );
            assert!(found == *expected, "{module}: {role:?}");
        }
    }
}
