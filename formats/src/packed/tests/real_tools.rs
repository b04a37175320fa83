//! What the formats' own tools wrote; runs where `NEMOCONV_SHARED` has it.

use super::*;

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
