//! Linears of every layout, made here and made by the formats' own tools. The latter run where `NEMOCONV_SHARED` has
//! them.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Theirs, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::packed::Quantization;
use crate::packed::bits::{pack_columns, pack_rows, pack_transposed, to_gptq_v1_zeros};
use crate::packed::config::compressed_tensors::CompressedTensors;

/// Tensors of a file: name, type, shape, bytes.
type Tensor = (&'static str, Theirs, Vec<usize>, Vec<u8>);

fn folder(tensors: &[Tensor]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (
            *name,
            TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        )
    });
    fs::write(
        folder.path().join("model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
    folder
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
        .collect()
}

fn f16_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|x| f16::from_f32(*x).to_le_bytes())
        .collect()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn shape_bytes(rows: i64, columns: i64) -> Vec<u8> {
    [rows, columns].map(i64::to_le_bytes).concat()
}

/// Codes of a matrix, and scales and zero points of groups of its columns.
struct Sample {
    rows: usize,
    columns: usize,
    group: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<i8>,
}

impl Sample {
    fn new(width: Width, rows: usize, columns: usize, group: usize) -> Self {
        let span = 1 << width.bits();
        let code = |i: usize, factor: usize| ((i * factor % span) as i32 - span as i32 / 2) as i8;
        let groups = rows * columns / group;
        Self {
            rows,
            columns,
            group,
            codes: (0..rows * columns).map(|i| code(i, 11)).collect(),
            // Values that BF16 and F16 both hold.
            scales: (0..groups).map(|i| (1 + i % 7) as f32 / 64.0).collect(),
            zeros: (0..groups).map(|i| code(i, 5)).collect(),
        }
    }

    fn values(&self, symmetric: bool) -> Vec<f32> {
        let value = |(i, code): (usize, &i8)| {
            let group =
                i / self.columns * (self.columns / self.group) + i % self.columns / self.group;
            let zero = if symmetric {
                0
            } else {
                i32::from(self.zeros[group])
            };
            (i32::from(*code) - zero) as f32 * self.scales[group]
        };
        self.codes.iter().enumerate().map(value).collect()
    }

    fn groups(&self) -> usize {
        self.columns / self.group
    }

    fn compressed(&self, width: Width) -> Vec<Tensor> {
        let words = width.words(self.columns);
        let mut packed = vec![0; self.rows * words * 4];
        pack_rows(width, self.columns, &self.codes, &mut packed).unwrap();
        let zero_words = width.words(self.rows);
        let mut zeros = vec![0; zero_words * self.groups() * 4];
        pack_columns(width, self.groups(), &self.zeros, &mut zeros).unwrap();
        let (rows, columns, groups) = (self.rows, self.columns, self.groups());
        vec![
            ("m.weight_packed", Theirs::I32, vec![rows, words], packed),
            (
                "m.weight_scale",
                Theirs::BF16,
                vec![rows, groups],
                bf16_bytes(&self.scales),
            ),
            (
                "m.weight_shape",
                Theirs::I64,
                vec![2],
                shape_bytes(rows as i64, columns as i64),
            ),
            (
                "m.weight_zero_point",
                Theirs::I32,
                vec![zero_words, groups],
                zeros,
            ),
        ]
    }

    fn gptq(&self, width: Width, zeros_are: GptqZeros) -> Vec<Tensor> {
        let (rows, columns, groups) = (self.rows, self.columns, self.groups());
        let words = width.words(columns);
        let mut codes = vec![0; words * rows * 4];
        pack_transposed(width, columns, &self.codes, &mut codes).unwrap();
        let by_group = |at: usize| (at % rows) * groups + at / rows;
        let zeros: Vec<i8> = (0..rows * groups)
            .map(|at| self.zeros[by_group(at)])
            .collect();
        let scales: Vec<f32> = (0..rows * groups)
            .map(|at| self.scales[by_group(at)])
            .collect();
        let mut packed_zeros = vec![0; width.words(rows) * groups * 4];
        pack_rows(width, rows, &zeros, &mut packed_zeros).unwrap();
        if zeros_are == GptqZeros::MinusOne {
            to_gptq_v1_zeros(width, &mut packed_zeros);
        }
        let index = (0..columns).flat_map(|column| ((column / self.group) as i32).to_le_bytes());
        vec![
            ("m.qweight", Theirs::I32, vec![words, rows], codes),
            (
                "m.qzeros",
                Theirs::I32,
                vec![groups, width.words(rows)],
                packed_zeros,
            ),
            (
                "m.scales",
                Theirs::F16,
                vec![groups, rows],
                f16_bytes(&scales),
            ),
            ("m.g_idx", Theirs::I32, vec![columns], index.collect()),
        ]
    }
}

fn plain(layout: Layout) -> Scheme {
    Scheme {
        layout,
        inputs: Inputs::AsTheyAre,
    }
}

/// Decodes `module` as a whole and in uneven parts.
#[track_caller]
fn check(
    path: &Path,
    module: &str,
    scheme: &Scheme,
    [rows, columns]: [usize; 2],
    expected: &[f32],
) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let linear = PackedLinear::resolve(&checkpoint, module, scheme, rows, columns).unwrap();
    let mut buffers = RowBuffers::default();
    for step in [rows, 1, 3, 7] {
        for first in (0..rows).step_by(step) {
            let part = first * columns..(first + step).min(rows) * columns;
            let mut values = vec![f32::NAN; part.len()];
            linear
                .dequantize(&checkpoint, first, &mut buffers, &mut values)
                .unwrap();
            let same = values
                .iter()
                .zip(&expected[part])
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{module}: rows from {first}, {step} at once");
        }
    }
    let mut beyond = vec![0.0; columns];
    assert!(
        linear
            .dequantize(&checkpoint, rows, &mut buffers, &mut beyond)
            .is_err()
    );
    assert!(
        linear
            .dequantize(&checkpoint, usize::MAX, &mut buffers, &mut beyond)
            .is_err()
    );
    assert!(
        linear
            .dequantize(&checkpoint, 0, &mut buffers, &mut beyond[1..])
            .is_err()
    );
}

#[track_caller]
fn check_refused(tensors: &[Tensor], layout: Layout, [rows, columns]: [usize; 2], expected: &str) {
    let folder = folder(tensors);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = PackedLinear::resolve(&checkpoint, "m", &plain(layout), rows, columns).unwrap_err();
    let path = folder.path().display().to_string();
    let text = error.to_string().replace(&path, "DIR");
    let place = text.rfind(" at 0x").map_or(text.len(), |at| at);
    assert_eq!(text[..place], *expected);
}

#[test]
fn integers_in_words() {
    for width in [Width::Four, Width::Eight] {
        // 19 rows and 40 columns: neither fills whole words of zero points.
        let sample = Sample::new(width, 19, 40, 8);
        let folder = folder(&sample.compressed(width));
        for symmetric in [true, false] {
            let layout = Layout::PackQuantized {
                width,
                group: Group::Columns(8),
                symmetric,
            };
            check(
                folder.path(),
                "m",
                &plain(layout),
                [19, 40],
                &sample.values(symmetric),
            );
        }
    }
    // The last word of a row of 5 is filled with zeros.
    let sample = Sample::new(Width::Four, 3, 5, 5);
    let layout = Layout::PackQuantized {
        width: Width::Four,
        group: Group::Row,
        symmetric: true,
    };
    let folder = folder(&sample.compressed(Width::Four));
    check(
        folder.path(),
        "m",
        &plain(layout),
        [3, 5],
        &sample.values(true),
    );
}

#[test]
fn integers_in_bytes() {
    let sample = Sample::new(Width::Eight, 11, 12, 12);
    let bytes = |codes: &[i8]| codes.iter().map(|code| code.cast_unsigned()).collect();
    let folder = folder(&[
        ("m.weight", Theirs::I8, vec![11, 12], bytes(&sample.codes)),
        (
            "m.weight_scale",
            Theirs::BF16,
            vec![11, 1],
            bf16_bytes(&sample.scales),
        ),
        (
            "m.weight_zero_point",
            Theirs::I8,
            vec![11, 1],
            bytes(&sample.zeros),
        ),
        ("m.input_scale", Theirs::BF16, vec![1], bf16_bytes(&[0.25])),
    ]);
    for symmetric in [true, false] {
        let layout = Layout::IntQuantized {
            bits: 8,
            group: Group::Row,
            symmetric,
        };
        check(
            folder.path(),
            "m",
            &plain(layout),
            [11, 12],
            &sample.values(symmetric),
        );
    }
    let layout = Layout::IntQuantized {
        bits: 8,
        group: Group::Row,
        symmetric: true,
    };
    let scheme = Scheme {
        layout,
        inputs: Inputs::Int8PerTensor,
    };
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let linear = PackedLinear::resolve(&checkpoint, "m", &scheme, 11, 12).unwrap();
    assert_eq!(linear.input_scale(&checkpoint).unwrap(), Some(0.25));
    assert_eq!(linear.positions().count(), 3);
}

#[test]
fn gptq_in_both_versions() {
    for (width, rows) in [(Width::Four, 24), (Width::Eight, 12)] {
        for zeros in [GptqZeros::MinusOne, GptqZeros::AsTheyAre] {
            let sample = Sample::new(width, rows, 32, 16);
            let folder = folder(&sample.gptq(width, zeros));
            let layout = Layout::Gptq {
                width,
                group: Group::Columns(16),
                symmetric: false,
                zeros,
            };
            check(
                folder.path(),
                "m",
                &plain(layout),
                [rows, 32],
                &sample.values(false),
            );
        }
    }
}

#[test]
fn four_bit_floats_under_both_names() {
    // Every E2M1 code in order, then backwards; scales 0.5 and 448.
    let codes: Vec<u8> = (0..8).map(|i| (2 * i) | ((2 * i + 1) << 4)).collect();
    let codes = [codes.clone(), codes.iter().rev().copied().collect()].concat();
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = |code: u8| e2m1[usize::from(code & 7)] * if code > 7 { -1.0 } else { 1.0 };
    let unscaled = codes
        .iter()
        .flat_map(|byte| [value(byte & 15), value(byte >> 4)]);
    let scaled: Vec<f32> = unscaled
        .enumerate()
        .map(|(i, x): (usize, f32)| x * [0.5, 448.0][i / 16])
        .collect();
    let scales = vec![0x30, 0x7e];
    let tensors = |codes_name, second_name, second: f32| {
        folder(&[
            (codes_name, Theirs::U8, vec![1, 16], codes.clone()),
            (
                "m.weight_scale",
                Theirs::F8_E4M3,
                vec![1, 2],
                scales.clone(),
            ),
            (second_name, Theirs::F32, vec![], f32_bytes(&[second])),
        ])
    };
    let check = |folder: TempDir, names, expected: Vec<f32>| {
        check(
            folder.path(),
            "m",
            &plain(Layout::Nvfp4(names)),
            [1, 32],
            &expected,
        );
    };
    check(
        tensors("m.weight", "m.weight_scale_2", 0.1),
        Nvfp4Names::ModelOpt,
        scaled.iter().map(|x| x * 0.1).collect(),
    );
    check(
        tensors("m.weight_packed", "m.weight_global_scale", 3.0),
        Nvfp4Names::CompressedTensors,
        scaled.iter().map(|x| x / 3.0).collect(),
    );
}

#[test]
fn eight_bit_floats_find_their_scales() {
    let (rows, columns) = (130, 129);
    let codes: Vec<u8> = (0..rows * columns).map(|i| (i % 0x7f) as u8).collect();
    let mut values = vec![0.0; codes.len()];
    float::to_f32(Dtype::F8E4M3, &codes, &mut values).unwrap();
    let blocks = |at: usize| at / columns / 128 * 2 + at % columns / 128;
    type ScaleOf<'a> = &'a dyn Fn(usize) -> usize;
    let cases: [(Vec<usize>, ScaleOf); 5] = [
        (vec![], &|_| 0),
        (vec![1, 1], &|_| 0),
        (vec![rows], &|at| at / columns),
        (vec![rows, 1], &|at| at / columns),
        (vec![2, 2], &blocks),
    ];
    for (shape, scale_of) in cases {
        let scales: Vec<f32> = (0..shape.iter().product())
            .map(|i| 1.0 + i as f32 / 8.0)
            .collect();
        let folder = folder(&[
            (
                "m.weight",
                Theirs::F8_E4M3,
                vec![rows, columns],
                codes.clone(),
            ),
            ("m.weight_scale_inv", Theirs::F32, shape, f32_bytes(&scales)),
        ]);
        let expected: Vec<f32> = values
            .iter()
            .enumerate()
            .map(|(at, x)| x * scales[scale_of(at)])
            .collect();
        let scheme = Scheme::float8("weight_scale_inv", Inputs::AsTheyAre);
        check(folder.path(), "m", &scheme, [rows, columns], &expected);
    }
}

const PACKED: Layout = Layout::PackQuantized {
    width: Width::Four,
    group: Group::Columns(8),
    symmetric: false,
};

const GPTQ: Layout = Layout::Gptq {
    width: Width::Four,
    group: Group::Columns(8),
    symmetric: false,
    zeros: GptqZeros::MinusOne,
};

#[test]
fn incomplete_linears_are_refused() {
    let whole = Sample::new(Width::Four, 8, 16, 8).compressed(Width::Four);
    let without = |name: &str| -> Vec<Tensor> {
        whole
            .iter()
            .filter(|tensor| tensor.0 != name)
            .cloned()
            .collect()
    };
    let scheme = "which its scheme needs (W4A16 g8 asymmetric, pack-quantized) (DIR)";
    for part in [
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_packed",
    ] {
        let name = format!("m.{part}");
        let expected = format!("`m`: has no `{part}`, {scheme}");
        check_refused(&without(&name), PACKED, [8, 16], &expected);
    }
}

#[test]
fn lies_of_linears() {
    let whole = Sample::new(Width::Four, 8, 16, 8).compressed(Width::Four);
    let with = |tensor: Tensor| -> Vec<Tensor> {
        let name = tensor.0;
        let others = whole.iter().filter(|old| old.0 != name).cloned();
        others.chain([tensor]).collect()
    };
    let check = |tensor, expected: &str| {
        check_refused(&with(tensor), PACKED, [8, 16], expected);
    };
    check(
        ("m.weight_shape", Theirs::I64, vec![2], shape_bytes(16, 8)),
        "`m.weight_shape`: says [16, 8], expected [8, 16] (DIR/model.safetensors",
    );
    check(
        (
            "m.weight_shape",
            Theirs::I64,
            vec![2],
            shape_bytes(-1, i64::MAX),
        ),
        "`m.weight_shape`: says [-1, 9223372036854775807], expected [8, 16] (DIR/model.safetensors",
    );
    check(
        ("m.weight_scale", Theirs::BF16, vec![16], vec![0; 32]),
        "`m.weight_scale`: shape must be [8, 2], found [16] (DIR/model.safetensors",
    );
    check(
        ("m.weight_scale", Theirs::I32, vec![8, 2], vec![0; 64]),
        "`m.weight_scale`: dtype must be BF16 or F16 or F32, found I32 (DIR/model.safetensors",
    );
    check(
        ("m.weight_packed", Theirs::I32, vec![2, 8], vec![0; 64]),
        "`m.weight_packed`: shape must be [8, 2], found [2, 8] (DIR/model.safetensors",
    );
    check(
        ("m.weight_g_idx", Theirs::I32, vec![16], vec![0; 64]),
        "`m.weight_g_idx`: columns are quantized in the order of activations, which is not read (DIR/model.safetensors",
    );
    let group = |size| Layout::PackQuantized {
        width: Width::Four,
        group: Group::Columns(size),
        symmetric: true,
    };
    for size in [0, 5, 32, usize::MAX] {
        let expected = format!("`m`: groups of {size} do not divide rows of 16 (DIR)");
        check_refused(&whole, group(size), [8, 16], &expected);
    }
}

#[test]
fn lies_of_gptq_linears() {
    let sample = Sample::new(Width::Four, 8, 16, 8);
    let mut tensors = sample.gptq(Width::Four, GptqZeros::MinusOne);
    check_refused(
        &tensors,
        GPTQ,
        [12, 16],
        "`m`: a matrix of 12 x 16 does not fill words of 8 codes (DIR)",
    );
    let order = (0..16i32).flat_map(|column| (column % 2).to_le_bytes());
    tensors[3] = ("m.g_idx", Theirs::I32, vec![16], order.collect());
    check_refused(
        &tensors,
        GPTQ,
        [8, 16],
        "`m.g_idx`: columns are quantized in the order of activations, which is not read (DIR/model.safetensors",
    );
    tensors.remove(3);
    let folder = folder(&tensors);
    check(
        folder.path(),
        "m",
        &plain(GPTQ),
        [8, 16],
        &sample.values(false),
    );
}

/// Where files made by the formats' own tools are, or a line that says why not.
#[allow(clippy::print_stdout, reason = "says that it was skipped")]
fn gold() -> Option<PathBuf> {
    let shared = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from);
    if shared.is_none() {
        println!("skipped: NEMOCONV_SHARED is not set");
    }
    shared.map(|shared| shared.join("gold"))
}

/// Code `at` of a bit string, taken bit by bit, in signed terms.
fn code_at(words: &[u8], bits: usize, at: usize) -> i32 {
    let bit = |at: usize| i32::from(words[at / 8] >> (at % 8) & 1);
    let unsigned: i32 = (0..bits).map(|place| bit(at * bits + place) << place).sum();
    unsigned - (1 << (bits - 1))
}

/// A tensor of `file` as f32, or nothing.
fn floats(file: &SafeTensors, name: &str) -> Option<Vec<f32>> {
    let view = file.tensor(name).ok()?;
    let dtype = Dtype::from_name(&format!("{:?}", view.dtype())).unwrap();
    let mut values = vec![0.0; view.shape().iter().product()];
    float::to_f32(dtype, view.data(), &mut values).unwrap();
    Some(values)
}

/// The weight of `module` by another way than the reader's: a bit at a time, from the whole file.
fn decoded(file: &SafeTensors, module: &str, bits: usize) -> ([usize; 2], Vec<f32>) {
    let data = |suffix: &str| file.tensor(&format!("{module}.{suffix}")).ok();
    let gptq_scales = floats(file, &format!("{module}.scales"));
    if let Some(scales) = gptq_scales {
        let codes = data("qweight").unwrap();
        let (rows, columns) = (codes.shape()[1], codes.shape()[0] * 32 / bits);
        let groups = scales.len() / rows;
        let word = |row: usize, word: usize| &codes.data()[(word * rows + row) * 4..][..4];
        let value = |row: usize, column: usize| {
            let code = code_at(word(row, column * bits / 32), bits, column % (32 / bits));
            // Symmetric: every stored zero point is the middle.
            code as f32 * scales[column / (columns / groups) * rows + row]
        };
        let values = (0..rows * columns).map(|at| value(at / columns, at % columns));
        return ([rows, columns], values.collect());
    }
    let scales = floats(file, &format!("{module}.weight_scale")).unwrap();
    let (codes, [rows, columns]) = match data("weight_packed") {
        None => {
            let codes = data("weight").unwrap();
            let values = codes
                .data()
                .iter()
                .map(|code| i32::from(code.cast_signed()));
            (
                values.collect::<Vec<_>>(),
                [codes.shape()[0], codes.shape()[1]],
            )
        }
        Some(words) => {
            let shape = data("weight_shape").unwrap();
            let size =
                |at: usize| i64::from_le_bytes(shape.data()[at * 8..][..8].try_into().unwrap());
            let [rows, columns] = [size(0), size(1)].map(|size| size as usize);
            let row_bytes = words.data().len() / rows;
            let code = |at: usize| {
                code_at(
                    &words.data()[at / columns * row_bytes..],
                    bits,
                    at % columns,
                )
            };
            ((0..rows * columns).map(code).collect(), [rows, columns])
        }
    };
    let groups = scales.len() / rows;
    let zero = |row: usize, group: usize| {
        data("weight_zero_point").map_or(0, |words| {
            let per_word = 32 / bits;
            let word = &words.data()[(row / per_word * groups + group) * 4..][..4];
            code_at(word, bits, row % per_word)
        })
    };
    let value = |at: usize| {
        let (row, group) = (at / columns, at % columns / (columns / groups));
        (codes[at] - zero(row, group)) as f32 * scales[row * groups + group]
    };
    ([rows, columns], (0..codes.len()).map(value).collect())
}

const GOLD_FOLDERS: [&str; 9] = [
    "compressed-tensors-w4a16-g128",
    "compressed-tensors-w4a16-g128-asym",
    "compressed-tensors-w8a8-int8-rtn",
    "compressed-tensors-w8a8-int8-gptq",
    "compressed-tensors-w4a8-int",
    "compressed-tensors-mixed-w8a8-w4a16g64",
    "compressed-tensors-moe-w4a16-g128",
    "compressed-tensors-moe-w8a8-int8",
    "gptq-dense-w4g64",
];

/// Every linear of every folder that the formats' own tools wrote: the values of a bit-by-bit decoder, and next to the
/// weights they were made from.
#[test]
fn folders_of_the_real_tools() {
    let Some(gold) = gold() else { return };
    for name in GOLD_FOLDERS {
        let path = gold.join(name);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let quantization = Quantization::of(&checkpoint).unwrap().unwrap();
        let bytes = fs::read(path.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let source = gold.join(if name.contains("-moe-") {
            "compressed-tensors-source-moe/model.safetensors"
        } else {
            "compressed-tensors-source-dense/model.safetensors"
        });
        let source = fs::read(source).unwrap();
        let source = SafeTensors::deserialize(&source).unwrap();
        let scales = [".weight_scale", ".scales"];
        let modules: Vec<&str> = file
            .names()
            .into_iter()
            .filter_map(|name| scales.iter().find_map(|suffix| name.strip_suffix(suffix)))
            .collect();
        assert!(modules.len() >= 4, "{name}: {modules:?}");
        for module in modules {
            let scheme = quantization.scheme_of(module).unwrap();
            let (shape, expected) = decoded(&file, module, scheme.layout.bits());
            check(&path, module, scheme, shape, &expected);
            let weights = floats(&source, &format!("{module}.weight")).unwrap();
            let errors = weights
                .iter()
                .zip(&expected)
                .map(|(a, b)| f64::from(a - b).powi(2));
            let power: f64 = weights.iter().map(|x| f64::from(*x).powi(2)).sum();
            let relative = errors.sum::<f64>() / power;
            assert!(relative < 0.02, "{name} {module}: {relative}");
        }
    }
}

/// Typed configurations are written as they were read: every key, in order.
#[test]
fn configurations_of_the_real_tools() {
    let Some(gold) = gold() else { return };
    for name in GOLD_FOLDERS
        .into_iter()
        .filter(|name| name.starts_with("compressed"))
    {
        let text = fs::read_to_string(gold.join(name).join("config.json")).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        let value = &value["quantization_config"];
        let typed: CompressedTensors = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(
            serde_json::to_string(&typed).unwrap(),
            serde_json::to_string(value).unwrap(),
            "{name}"
        );
    }
}

/// GPTQModel's packer on one layer: the stored words and the matrix they stand for, which GPTQModel rounds to F16.
#[test]
fn words_of_the_real_packer() {
    let Some(gold) = gold() else { return };
    for (name, width) in [
        ("sym4-g64", Width::Four),
        ("asym4-g64", Width::Four),
        ("sym8-g64", Width::Eight),
    ] {
        let path = gold.join(format!("gptq-pack/{name}.safetensors"));
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let transposed = floats(&file, "dequant_KN").unwrap();
        let (rows, columns) = (96, 128);
        let expected: Vec<f32> = (0..rows * columns)
            .map(|at| transposed[at % columns * rows + at / columns])
            .collect();
        let data = |name: &str| file.tensor(name).unwrap().data().to_vec();
        for zeros in [GptqZeros::MinusOne, GptqZeros::AsTheyAre] {
            let version = match zeros {
                GptqZeros::MinusOne => "v1.qzeros",
                GptqZeros::AsTheyAre => "v2.qzeros",
            };
            let words = width.words(columns);
            let folder = folder(&[
                (
                    "m.qweight",
                    Theirs::I32,
                    vec![words, rows],
                    data("v2.qweight"),
                ),
                (
                    "m.qzeros",
                    Theirs::I32,
                    vec![2, width.words(rows)],
                    data(version),
                ),
                ("m.scales", Theirs::F16, vec![2, rows], data("v2.scales")),
                ("m.g_idx", Theirs::I32, vec![columns], data("v2.g_idx")),
            ]);
            let layout = Layout::Gptq {
                width,
                group: Group::Columns(64),
                symmetric: name.starts_with("sym"),
                zeros,
            };
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let scheme = plain(layout);
            let linear = PackedLinear::resolve(&checkpoint, "m", &scheme, rows, columns).unwrap();
            let mut values = vec![0.0; rows * columns];
            let mut buffers = RowBuffers::default();
            linear
                .dequantize(&checkpoint, 0, &mut buffers, &mut values)
                .unwrap();
            let rounded: Vec<f32> = values.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
            assert!(rounded == expected, "{name} {zeros:?}");
        }
    }
}

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
    let narrow = "W4A4 float g16, modelopt NVFP4, 4-bit float inputs, scales found at run time";
    let wide = "W8A8 float, float-quantized, 8-bit float inputs, scales fixed";
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
