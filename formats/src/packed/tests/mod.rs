//! Linears of every layout, made here and made by the formats' own tools. The latter run where `NEMOCONV_SHARED` has
//! them.

mod configurations;
mod layouts;
mod real_tools;
mod refusals;

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Theirs, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::packed::Quantization;
use crate::packed::bits::{Width, pack_columns, pack_rows, pack_transposed, to_gptq_v1_zeros};
use crate::packed::config::compressed_tensors::CompressedTensors;
use crate::packed::scheme::GptqZeros;

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
        let of_rows: Vec<_> = self.codes.chunks(columns).collect();
        pack_transposed(width, columns, &of_rows, &mut codes).unwrap();
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
