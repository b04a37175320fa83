//! `dequantize_integers` on the linears that compressed-tensors writes.

use std::fs;
use std::ops::Range;

use nemoconv_device::{Device, IntegerLayout};
use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::packed::IntegerCodes;
use nemoconv_formats::packed::{
    Group, Inputs, Layout, PackedLinear, Role, RowBuffers, Scheme, Width,
};
use safetensors::tensor::{Dtype as Stored, TensorView};

use super::{HALVES, Random, assert_same};
use crate::drivers;

/// No multiples of the codes in a word.
const ROWS: usize = 21;
const COLUMNS: usize = 45;

const PLACES: [IntegerCodes; 3] = [
    IntegerCodes::Packed(Width::Four),
    IntegerCodes::Packed(Width::Eight),
    IntegerCodes::Bytes,
];
const GROUPS: [Group; 3] = [Group::Columns(15), Group::Row, Group::Tensor];
const SCALES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

fn scheme(layout: &IntegerLayout, symmetric: bool) -> Scheme {
    let group = layout.group;
    let layout = match layout.codes {
        IntegerCodes::Packed(width) => Layout::PackQuantized {
            width,
            group,
            symmetric,
        },
        IntegerCodes::Bytes => Layout::IntQuantized {
            bits: 8,
            group,
            symmetric,
        },
    };
    Scheme {
        layout,
        inputs: Inputs::AsTheyAre,
    }
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
        _ => (0..bytes / 2)
            .flat_map(|_| random.one_of(&HALVES).to_le_bytes())
            .collect(),
    }
}

fn check(name: &str, device: &Device, layout: &IntegerLayout, symmetric: bool) {
    let scheme = scheme(layout, symmetric);
    let mut random = Random::new(7);
    let mut tensors = Vec::new();
    let (mut codes, mut of_scales, mut zeros) = (Vec::new(), Vec::new(), None);
    for spec in scheme.tensors(ROWS, COLUMNS).unwrap() {
        let elements: usize = spec.shapes[0].iter().product();
        let dtype = match spec.role {
            Role::Scale => layout.scales,
            _ => spec.dtypes[0],
        };
        let bytes = match spec.role {
            Role::Scale => scales(dtype, elements * dtype.bytes(), &mut random),
            Role::Shape => [ROWS, COLUMNS].map(|size| size.to_le_bytes()).concat(),
            _ => random.bytes(elements * dtype.bytes()),
        };
        match spec.role {
            Role::Codes => codes = bytes.clone(),
            Role::Scale => of_scales = bytes.clone(),
            Role::ZeroPoint => zeros = Some(bytes.clone()),
            _ => {}
        }
        tensors.push((
            format!("m.{}", spec.suffix),
            dtype,
            spec.shapes[0].clone(),
            bytes,
        ));
    }
    let expected = decode(&scheme, &tensors);
    let codes = device.upload_bytes(&codes).unwrap();
    let of_scales = device.upload_bytes(&of_scales).unwrap();
    let zeros = zeros.map(|zeros| device.upload_bytes(&zeros).unwrap());
    let parts: [Range<usize>; 4] = [0..ROWS, 3..4, 8..ROWS, ROWS - 6..ROWS];
    for rows in parts {
        let mut out = device
            .upload(&vec![77.0; rows.len() * COLUMNS + 1])
            .unwrap();
        let zeros = zeros.as_ref();
        device
            .dequantize_integers(layout, &codes, &of_scales, zeros, rows.clone(), &mut out)
            .unwrap();
        let mut found = device.download(&out, 0..out.len()).unwrap();
        let what = format!("{name}, rows {rows:?} of {layout:?}, symmetric: {symmetric}");
        assert_eq!(found.pop(), Some(77.0), "{what}: the value behind");
        let expected = &expected[rows.start * COLUMNS..rows.end * COLUMNS];
        assert_same(&what, &found, expected);
    }
}

/// What `formats` reads from a file with these tensors.
fn decode(scheme: &Scheme, tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<f32> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = match dtype {
            Dtype::Bf16 => Stored::BF16,
            Dtype::F16 => Stored::F16,
            Dtype::F32 => Stored::F32,
            Dtype::I8 => Stored::I8,
            Dtype::I32 => Stored::I32,
            _ => Stored::I64,
        };
        (name, TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    let folder = tempfile::tempdir().unwrap();
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let linear = PackedLinear::resolve(&checkpoint, "m", scheme, ROWS, COLUMNS).unwrap();
    let mut values = vec![0.0; ROWS * COLUMNS];
    linear
        .dequantize(&checkpoint, 0, &mut RowBuffers::default(), &mut values)
        .unwrap();
    values
}

#[test]
fn every_layout_as_formats_decodes_it() {
    for (name, device) in drivers::all() {
        for (codes, group) in PLACES
            .iter()
            .flat_map(|codes| GROUPS.map(|group| (*codes, group)))
        {
            for scales in SCALES {
                let layout = IntegerLayout {
                    codes,
                    columns: COLUMNS,
                    group,
                    scales,
                };
                check(&name, &device, &layout, true);
                // Packed zero points of whole tensors are not known.
                if codes == IntegerCodes::Bytes || group != Group::Tensor {
                    check(&name, &device, &layout, false);
                }
            }
        }
    }
}
