//! `dequantize_floats` on FP8 and NVFP4 linears.

use nemoconv_device::{Device, Family, FloatLayout};
use nemoconv_formats::Dtype;
use nemoconv_formats::packed::{
    Inputs, Layout, Nvfp4Names, Role, Scheme, SecondScale, StoredLinear,
};

use super::packed::{Linear, check_parts};
use crate::drivers;

/// More than a block of FP8, and no multiples of one.
const ROWS: usize = 150;
const COLUMNS: usize = 131;
/// Divides `ROWS`, but no block.
const HEAD_ROWS: usize = 10;
/// Rows are whole groups of NVFP4.
const NVFP4_COLUMNS: usize = 48;
/// Last places that quotients in WGSL may be off: its specification says 2.5.
const WGSL_QUOTIENTS: u32 = 3;

/// Bits of NaN codes and scales are among the random ones.
fn check(name: &str, device: &Device, linear: &Linear, columns: usize) {
    let layout = linear.with(|linear, checkpoint| {
        let Some(StoredLinear::Floats(stored)) = linear.stored(checkpoint).unwrap() else {
            panic!("{name}: these are floats");
        };
        FloatLayout {
            codes: stored.storage,
            columns,
            block: stored.block,
            scales: stored.scale_dtype,
            second_scale: stored.second_scale,
            head_rows: 0,
        }
    });
    let divides = matches!(layout.second_scale, SecondScale::Divisor(_));
    let is_exact = !divides || device.description().family == Family::Cuda;
    let places = if is_exact { 0 } else { WGSL_QUOTIENTS };
    let [codes, scales] = [Role::Codes, Role::Scale].map(|role| linear.send(device, role).unwrap());
    for head_rows in [0, HEAD_ROWS] {
        let layout = FloatLayout {
            head_rows,
            ..layout
        };
        let what = format!("{name}, {layout:?}");
        let expected = linear.values(head_rows);
        check_parts(&what, device, columns, &expected, places, |rows, out| {
            device
                .dequantize_floats(&layout, &codes, &scales, rows, out)
                .unwrap();
        });
    }
}

#[test]
fn float8_as_formats_decodes_it() {
    for (name, device) in drivers::all() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            // Scales of rows, of the tensor, of blocks.
            for scale_shape in 0..3 {
                let scheme = Scheme::float8("weight_scale", Inputs::AsTheyAre);
                let linear = Linear::random(scheme, [ROWS, COLUMNS], dtype, scale_shape);
                check(&name, &device, &linear, COLUMNS);
            }
        }
    }
}

#[test]
fn nvfp4_as_formats_decodes_it() {
    for (name, device) in drivers::all() {
        for names in [Nvfp4Names::CompressedTensors, Nvfp4Names::ModelOpt] {
            let scheme = Scheme {
                layout: Layout::Nvfp4(names),
                inputs: Inputs::AsTheyAre,
            };
            let shape = [ROWS, NVFP4_COLUMNS];
            let linear = Linear::random(scheme, shape, Dtype::F8E4M3, 0);
            check(&name, &device, &linear, NVFP4_COLUMNS);
        }
    }
}
