//! `dequantize_floats` on FP8 and NVFP4 linears.

use std::ops::Range;

use nemoconv_device::{Array, Device, Family, FloatLayout};
use nemoconv_formats::Dtype;
use nemoconv_formats::packed::{Inputs, Layout, Nvfp4Names, Scheme, SecondScale, StoredLinear};

use super::assert_within;
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

fn check(scheme: Scheme, shape: [usize; 2], scales: Dtype, scale_shape: usize) {
    let linear = Linear::random(scheme, shape, scales, scale_shape);
    for head_rows in [0, HEAD_ROWS] {
        let expected = linear.values(head_rows);
        on_every_device(&linear, head_rows, |what, off, found, places| {
            assert_within(what, found, &expected[places], off);
        });
    }
}

/// Decodes parts of a linear on every device, and has them compared as [`check_parts`] does; besides, the last places that
/// values may be off.
pub fn on_every_device(
    linear: &Linear,
    head_rows: usize,
    compare: impl Fn(&str, u32, &[f32], Range<usize>),
) {
    let shape = linear.shape();
    for (name, device) in drivers::all() {
        linear.with(|linear, checkpoint| {
            let StoredLinear::Floats(stored) = linear.stored(checkpoint).unwrap() else {
                panic!("these are floats");
            };
            let layout = FloatLayout {
                codes: stored.storage,
                columns: shape[1],
                block: stored.block,
                scales: stored.scale_dtype,
                second_scale: stored.second_scale,
                head_rows,
            };
            let [codes, scales] =
                [stored.codes, stored.scales].map(|bytes| device.upload_bytes(bytes).unwrap());
            let what = format!("{name}, {layout:?}");
            let off = places(&device, layout.second_scale);
            let decode = |rows, out: &mut Array| {
                device
                    .dequantize_floats(&layout, &codes, &scales, rows, out)
                    .unwrap();
            };
            let compare = |what: &str, found: &[f32], part| compare(what, off, found, part);
            check_parts(&what, &device, shape, decode, compare);
        });
    }
}

/// Last places that values may be off.
fn places(device: &Device, second_scale: SecondScale) -> u32 {
    match (second_scale, device.description().family) {
        (SecondScale::Factor(_), _) | (_, Family::Cuda) => 0,
        (SecondScale::Divisor(_), _) => WGSL_QUOTIENTS,
    }
}

#[test]
fn float8_as_formats_decodes_it() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        // Scales of rows, of the tensor, of blocks.
        for scale_shape in 0..3 {
            let scheme = Scheme::float8("weight_scale", Inputs::AsTheyAre);
            check(scheme, [ROWS, COLUMNS], dtype, scale_shape);
        }
    }
}

#[test]
fn nvfp4_as_formats_decodes_it() {
    for names in [Nvfp4Names::CompressedTensors, Nvfp4Names::ModelOpt] {
        let scheme = Scheme {
            layout: Layout::Nvfp4(names),
            inputs: Inputs::AsTheyAre,
        };
        check(scheme, [ROWS, NVFP4_COLUMNS], Dtype::F8E4M3, 0);
    }
}
