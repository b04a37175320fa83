//! Random linears of packed checkpoints, and what `formats` reads from them.

use std::fs;
use std::ops::Range;

use nemoconv_device::{Array, Device};
use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::packed::{Group, PackedLinear, Role, RowBuffers, Scheme};
use safetensors::tensor::{Dtype as Stored, TensorView};

use super::{HALVES, Random};

/// The tensors of a linear.
pub struct Linear {
    scheme: Scheme,
    rows: usize,
    columns: usize,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Linear {
    /// Random codes, scales of a type, in one of the shapes that the layout has for them.
    pub fn random(
        scheme: Scheme,
        shape: [usize; 2],
        scale_dtype: Dtype,
        scale_shape: usize,
    ) -> Self {
        let mut random = Random::new(7);
        let columns = shape[1];
        let group_index = group_index(&scheme, columns);
        Self::of(
            scheme,
            shape,
            (scale_dtype, scale_shape),
            |role, dtype, count| match role {
                Role::Scale => scales(dtype, count * dtype.bytes(), &mut random),
                Role::SecondScale => 2688.7_f32.to_le_bytes().to_vec(),
                Role::GroupIndex => group_index.clone(),
                Role::Shape => shape.map(usize::to_le_bytes).concat(),
                _ => random.bytes(count * dtype.bytes()),
            },
        )
    }

    /// The bytes that `fill` gives for so many elements of each tensor.
    pub fn of(
        scheme: Scheme,
        [rows, columns]: [usize; 2],
        (scale_dtype, scale_shape): (Dtype, usize),
        mut fill: impl FnMut(Role, Dtype, usize) -> Vec<u8>,
    ) -> Self {
        let mut tensors = Vec::new();
        for spec in scheme.tensors(rows, columns).unwrap() {
            let (dtype, shape) = match spec.role {
                Role::Scale => (scale_dtype, spec.shapes[scale_shape].clone()),
                _ => (spec.dtypes[0], spec.shapes[0].clone()),
            };
            let bytes = fill(spec.role, dtype, shape.iter().product());
            tensors.push(Tensor {
                name: format!("m.{}", spec.suffix),
                dtype,
                shape,
                bytes,
            });
        }
        Self {
            scheme,
            rows,
            columns,
            tensors,
        }
    }

    /// `out_features` and `in_features`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// What `formats` decodes, in the order of rows that a device gives.
    pub fn values(&self, head_rows: usize) -> Vec<f32> {
        self.with(|linear, checkpoint| {
            let mut values = vec![0.0; self.rows * self.columns];
            linear
                .dequantize(checkpoint, 0, &mut RowBuffers::default(), &mut values)
                .unwrap();
            let rows = (0..self.rows).map(|row| interleaved(row, head_rows));
            rows.flat_map(|row| &values[row * self.columns..][..self.columns])
                .copied()
                .collect()
        })
    }

    /// Opens a file with these tensors.
    pub fn with<T>(&self, use_it: impl FnOnce(&PackedLinear, &Checkpoint) -> T) -> T {
        let views = self.tensors.iter().map(|tensor| {
            let dtype = match tensor.dtype {
                Dtype::Bf16 => Stored::BF16,
                Dtype::F16 => Stored::F16,
                Dtype::F32 => Stored::F32,
                Dtype::F8E4M3 => Stored::F8_E4M3,
                Dtype::U8 => Stored::U8,
                Dtype::I8 => Stored::I8,
                Dtype::I32 => Stored::I32,
                _ => Stored::I64,
            };
            let view = TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes);
            (&tensor.name, view.unwrap())
        });
        let folder = tempfile::tempdir().unwrap();
        let file = safetensors::serialize(views, None).unwrap();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let [rows, columns] = [self.rows, self.columns];
        let linear = PackedLinear::resolve(&checkpoint, "m", &self.scheme, rows, columns).unwrap();
        use_it(&linear, &checkpoint)
    }
}

/// Columns in the order of their groups.
pub fn group_index(scheme: &Scheme, columns: usize) -> Vec<u8> {
    let size = match scheme.layout.group() {
        Some(Group::Columns(size)) => size,
        _ => columns,
    };
    let groups = (0..columns).map(|column| (column / size) as i32);
    groups.flat_map(i32::to_le_bytes).collect()
}

/// Random scales, every other one special. Subnormal numbers of F32 are left out: devices may take them for zero.
fn scales(dtype: Dtype, bytes: usize, random: &mut Random) -> Vec<u8> {
    let normal = |bits: u32| f32::from_bits(bits & 0x87ff_ffff | 0x3800_0000);
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -1.0];
    let mut scale = || match random.bits() % 2 {
        0 => normal(random.bits()),
        _ => random.one_of(&special),
    };
    match dtype {
        Dtype::F32 => (0..bytes / 4).flat_map(|_| scale().to_le_bytes()).collect(),
        Dtype::Bf16 => (0..bytes / 2)
            .flat_map(|_| ((scale().to_bits() >> 16) as u16).to_le_bytes())
            .collect(),
        Dtype::F16 => (0..bytes / 2)
            .flat_map(|_| random.one_of(&HALVES).to_le_bytes())
            .collect(),
        _ => random.bytes(bytes),
    }
}

/// Within a head, row `2 j + a` comes from `a d/2 + j`.
pub fn interleaved(row: usize, head_rows: usize) -> usize {
    match head_rows {
        0 => row,
        _ => {
            let at = row % head_rows;
            row - at + at % 2 * head_rows / 2 + at / 2
        }
    }
}

/// Decodes several parts of so many rows, and has what was found of each compared: what it is, values, their places.
pub fn check_parts(
    what: &str,
    device: &Device,
    [all, columns]: [usize; 2],
    decode: impl Fn(Range<usize>, &mut Array),
    compare: impl Fn(&str, &[f32], Range<usize>),
) {
    for rows in [0..all, 3..4, 8..all, all - 6..all] {
        let what = format!("{what}, rows {rows:?}");
        let values = vec![77.0; rows.len() * columns + 1];
        let mut out = device.upload(&values).unwrap();
        decode(rows.clone(), &mut out);
        let mut found = device.download(&out, 0..out.len()).unwrap();
        assert_eq!(found.pop(), Some(77.0), "{what}: the value behind");
        compare(&what, &found, rows.start * columns..rows.end * columns);
    }
}
