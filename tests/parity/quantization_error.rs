//! Weighted errors of the searched types beside llama-quantize's: never 0.1 % above on any tensor, below in all.
//!
//! One test compares with frozen errors of a small model; the other runs the real llama-quantize on
//! every `NAME-f32.gguf` with its `NAME.imatrix.gguf` in the folder `NEMOCONV_PARITY_GGUF` (both as in
//! `fixtures/reference/quantization_error/errors.py`), with the program in the folder `NEMOCONV_LLAMA_BIN`.

#![allow(clippy::print_stdout, reason = "tables and reasons for skipping")]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use nemoconv::{
    formats::{GgmlType, block, checkpoint::Checkpoint, float, gguf::Header},
    quantize::quantize_rows,
};

/// Our error over llama-quantize's, at most, on any tensor.
const WORST_RATIO: f64 = 1.001;

/// The searched types and the `--pure` file types that llama-quantize makes of them.
const TYPES: [(GgmlType, &str); 6] = [
    (GgmlType::Q2_K, "Q2_K"),
    (GgmlType::Q3_K, "Q3_K_S"),
    (GgmlType::Q4_K, "Q4_K_S"),
    (GgmlType::Q5_K, "Q5_K_S"),
    (GgmlType::Q6_K, "Q6_K"),
    (GgmlType::IQ4_XS, "IQ4_XS"),
];

/// A stack of matrices of f32, rows of `columns`.
struct Tensor {
    values: Vec<f32>,
    columns: usize,
    matrices: usize,
}

/// Importance of each tensor's columns, matrix after matrix.
type Importance = BTreeMap<String, Vec<f32>>;

/// Ratios of one type with or without importance.
#[derive(Default)]
struct Ratios {
    worst: f64,
    worst_tensor: String,
    log_sum: f64,
    count: u32,
}

impl Ratios {
    fn add(&mut self, tensor: &str, ratio: f64) {
        if ratio > self.worst {
            (self.worst, self.worst_tensor) = (ratio, tensor.to_owned());
        }
        self.log_sum += ratio.ln();
        self.count += 1;
    }

    fn check(&self, ty: &str, importance: &str) {
        let mean = (self.log_sum / f64::from(self.count)).exp();
        let (worst, tensor) = (self.worst, &self.worst_tensor);
        println!("{ty:7} imatrix {importance:3}  mean {mean:.4}  worst {worst:.4} ({tensor})");
        assert!(
            worst <= WORST_RATIO,
            "{ty} of `{tensor}`: {worst} times llama-quantize's error"
        );
        assert!(
            mean < 1.0,
            "{ty}: {mean} times llama-quantize's error in all"
        );
    }
}

#[test]
fn errors_stay_below_the_frozen_ones_of_llama_quantize() {
    const MODEL: &str = "nemotron-h-nano";
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = env::var_os("NEMOCONV_SHARED").map(|shared| PathBuf::from(shared).join("models"));
    let places = [Some(repository.join("fixtures/data")), shared];
    let folders = places.into_iter().flatten().map(|place| place.join(MODEL));
    let Some(folder) = folders.into_iter().find(|folder| folder.exists()) else {
        println!("skipped: no `{MODEL}` in fixtures/data or $NEMOCONV_SHARED/models");
        return;
    };
    let checkpoint = Checkpoint::open(&folder).expect("the model opens");
    let reference = repository.join("fixtures/reference/quantization_error");
    let importance = read_importance(&reference.join(format!("{MODEL}.imatrix.gguf")));
    let table = fs::read_to_string(reference.join(format!("{MODEL}.tsv"))).expect("the table");
    let mut ratios = BTreeMap::<(&str, &str), Ratios>::new();
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        let [ty, with_importance, name, source, error] = fields[..] else {
            panic!("`{line}` has five fields");
        };
        let importance = (with_importance == "yes")
            .then(|| importance.get(name))
            .flatten();
        let tensor = checkpoint_tensor(&checkpoint, source);
        let ours = our_error(ty.parse().expect("a type"), &tensor, importance);
        let theirs: f64 = error.parse().expect("a number");
        ratios
            .entry((ty, with_importance))
            .or_default()
            .add(name, ours / theirs);
    }
    assert_eq!(ratios.len(), 2 * TYPES.len());
    for ((ty, with_importance), ratios) in &ratios {
        ratios.check(ty, with_importance);
    }
}

#[test]
fn errors_stay_below_those_of_llama_quantize() {
    let (Some(programs), Some(folder)) = (
        env::var_os("NEMOCONV_LLAMA_BIN"),
        env::var_os("NEMOCONV_PARITY_GGUF"),
    ) else {
        println!("skipped: NEMOCONV_LLAMA_BIN and NEMOCONV_PARITY_GGUF name no folders");
        return;
    };
    let program = Path::new(&programs).join("llama-quantize");
    let mut models: Vec<PathBuf> = fs::read_dir(folder)
        .expect("a folder of GGUF files")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.to_string_lossy().ends_with("-f32.gguf"))
        .collect();
    models.sort();
    assert!(!models.is_empty(), "the folder holds `NAME-f32.gguf`");
    for model in models {
        println!("{}", model.display());
        let imatrix = PathBuf::from(
            model
                .to_string_lossy()
                .replace("-f32.gguf", ".imatrix.gguf"),
        );
        let originals = read_gguf(&model);
        let importance = read_importance(&imatrix);
        for (ty, file_type) in TYPES {
            for with_importance in [None, Some(imatrix.as_path())] {
                let theirs = run_llama_quantize(&program, &model, with_importance, file_type);
                let mut ratios = Ratios::default();
                for (name, stored) in theirs.iter().filter(|(_, stored)| stored.ty == ty) {
                    let tensor = &originals[name].tensor;
                    let importance = with_importance.and_then(|_| importance.get(name));
                    let theirs = weighted_error(ty, tensor, importance, &stored.tensor.values);
                    ratios.add(name, our_error(ty, tensor, importance) / theirs);
                }
                ratios.check(
                    ty.name(),
                    if with_importance.is_some() {
                        "yes"
                    } else {
                        "no"
                    },
                );
            }
        }
    }
}

/// Quantizes every tensor to one type and reads the result back.
fn run_llama_quantize(
    program: &Path,
    model: &Path,
    imatrix: Option<&Path>,
    file_type: &str,
) -> BTreeMap<String, Stored> {
    let name = format!("nemoconv-parity-{}-{file_type}.gguf", std::process::id());
    let out = env::temp_dir().join(name);
    let mut command = Command::new(program);
    command.arg("--pure");
    if let Some(imatrix) = imatrix {
        command.arg("--imatrix").arg(imatrix);
    }
    let output = command
        .arg(model)
        .arg(&out)
        .arg(file_type)
        .output()
        .expect("the program starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let tensors = read_gguf(&out);
    fs::remove_file(&out).expect("our own file");
    tensors
}

/// A tensor of a GGUF file, dequantized.
struct Stored {
    ty: GgmlType,
    tensor: Tensor,
}

fn read_gguf(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(path).expect("a readable file");
    let header = Header::parse(&bytes).expect("a GGUF file");
    let tensors = header.tensors.iter().map(|info| {
        let start = usize::try_from(header.data_offset + info.offset).expect("a small file");
        let end = start + usize::try_from(info.bytes()).expect("a small file");
        let dims: Vec<usize> = info.dims.iter().map(|&dim| dim as usize).collect();
        let mut values = vec![0.0; dims.iter().product()];
        block::dequantize(info.ty, &bytes[start..end], &mut values).expect("whole blocks");
        let matrices = dims.get(2).copied().unwrap_or(1);
        let tensor = Tensor {
            values,
            columns: dims[0],
            matrices,
        };
        (
            info.name.clone(),
            Stored {
                ty: info.ty,
                tensor,
            },
        )
    });
    tensors.collect()
}

/// Mean squared activations; 1 for experts that were never chosen.
fn read_importance(path: &Path) -> Importance {
    let tensors = read_gguf(path);
    let mut importance = Importance::new();
    for (name, sums) in &tensors {
        let Some(weight) = name.strip_suffix(".in_sum2") else {
            continue;
        };
        let counts = &tensors[&format!("{weight}.counts")].tensor.values;
        let columns = sums.tensor.values.chunks(sums.tensor.columns).zip(counts);
        let means = columns.flat_map(|(sums, &count)| {
            sums.iter()
                .map(move |sum| if count > 0.0 { sum / count } else { 1.0 })
        });
        importance.insert(weight.to_owned(), means.collect());
    }
    importance
}

fn checkpoint_tensor(checkpoint: &Checkpoint, name: &str) -> Tensor {
    let entry = checkpoint
        .tensor(name)
        .unwrap_or_else(|| panic!("`{name}` is in the model"));
    let mut values = vec![0.0; entry.elements() as usize];
    float::to_f32(entry.dtype, checkpoint.bytes(entry), &mut values).expect("floats");
    Tensor {
        values,
        columns: entry.shape[1],
        matrices: 1,
    }
}

fn our_error(ty: GgmlType, tensor: &Tensor, importance: Option<&Vec<f32>>) -> f64 {
    let mut stored = Vec::with_capacity(tensor.values.len());
    for (matrix, values) in matrices(&tensor.values, tensor).enumerate() {
        let importance = importance.map(|all| &all[matrix * tensor.columns..][..tensor.columns]);
        let mut bytes = vec![0; ty.bytes_for(values.len() as u64).expect("whole blocks") as usize];
        let overflow = quantize_rows(ty, tensor.columns, values, importance, &mut bytes);
        assert_eq!(overflow.0, 0);
        let mut matrix = vec![0.0; values.len()];
        block::dequantize(ty, &bytes, &mut matrix).expect("whole blocks");
        stored.extend(matrix);
    }
    weighted_error(ty, tensor, importance, &stored)
}

fn matrices<'a>(values: &'a [f32], tensor: &Tensor) -> impl Iterator<Item = &'a [f32]> {
    values.chunks(values.len() / tensor.matrices)
}

/// Sum of weight (stored - original)^2 with the weights of ggml's own search.
fn weighted_error(
    ty: GgmlType,
    tensor: &Tensor,
    importance: Option<&Vec<f32>>,
    stored: &[f32],
) -> f64 {
    let pairs = matrices(&tensor.values, tensor)
        .zip(matrices(stored, tensor))
        .enumerate();
    let errors = pairs.flat_map(|(matrix, (values, stored))| {
        let importance = importance.map(|all| &all[matrix * tensor.columns..][..tensor.columns]);
        let super_blocks = values.chunks(256).zip(stored.chunks(256)).enumerate();
        super_blocks.map(move |(number, (values, stored))| {
            let first = number * 256 % tensor.columns;
            let weights = match importance {
                None => own_weights(ty, values),
                Some(importance) => importance_weights(ty, values, &importance[first..first + 256]),
            };
            let squares = values
                .iter()
                .zip(stored)
                .map(|(&x, &y)| (f64::from(y) - f64::from(x)).powi(2));
            weights
                .iter()
                .zip(squares)
                .map(|(weight, square)| weight * square)
                .sum::<f64>()
        })
    });
    errors.sum()
}

/// Weights of a super-block without importance (ggml-quants.c, `quantize_row_*_ref`).
fn own_weights(ty: GgmlType, values: &[f32]) -> Vec<f64> {
    let weights = values.chunks(32).flat_map(|values| {
        let rms = mean_square(values).sqrt();
        values.iter().map(move |&x| match ty {
            GgmlType::Q2_K => f64::from(x).abs(),
            GgmlType::Q4_K | GgmlType::Q5_K => rms + f64::from(x).abs(),
            _ => f64::from(x).powi(2),
        })
    });
    weights.collect()
}

/// Weights of a super-block with importance (ggml-quants.c, `quantize_row_*_impl`).
fn importance_weights(ty: GgmlType, values: &[f32], importance: &[f32]) -> Vec<f64> {
    let factor = if ty == GgmlType::Q2_K { 1.0 } else { 2.0 };
    let energy = factor * mean_square(values);
    let weights = values
        .iter()
        .zip(importance)
        .map(|(&x, &importance)| match ty {
            GgmlType::Q6_K => f64::from(importance),
            _ => f64::from(importance) * (energy + f64::from(x).powi(2)).sqrt(),
        });
    weights.collect()
}

fn mean_square(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / values.len() as f64
}
