//! `dequantize_integers` on the linears that compressed-tensors and GPTQ write.

use std::ops::Range;

use nemoconv_device::{Array, IntegerLayout};
use nemoconv_formats::Dtype;
use nemoconv_formats::packed::{GptqZeros, Group, Inputs, Layout, Scheme, StoredLinear, Width};

use super::assert_same;
use super::packed::{Linear, check_parts};
use crate::drivers;

/// No multiples of the codes in a word.
const SHAPE: [usize; 2] = [21, 45];
/// Heads that share words of zero points.
const HEAD_ROWS: usize = 6;
/// Whole heads, and whole words where a layout has no others.
const SHAPE_OF_HEADS: [usize; 2] = [24, 45];
const WHOLE_WORDS: [usize; 2] = [24, 48];

const WIDTHS: [Width; 2] = [Width::Four, Width::Eight];
const GROUPS: [Group; 3] = [Group::Columns(15), Group::Row, Group::Tensor];
const SCALES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

/// Every layout of compressed-tensors; packed zero points of whole tensors are not known.
fn compressed_tensors() -> Vec<Layout> {
    let mut layouts = Vec::new();
    for (group, symmetric) in GROUPS.map(|group| [(group, true), (group, false)]).concat() {
        layouts.push(Layout::IntQuantized {
            bits: 8,
            group,
            symmetric,
        });
        if symmetric || group != Group::Tensor {
            layouts.extend(WIDTHS.map(|width| Layout::PackQuantized {
                width,
                group,
                symmetric,
            }));
        }
    }
    layouts
}

/// Both versions of GPTQ.
fn gptq() -> Vec<Layout> {
    let mut layouts = Vec::new();
    for width in WIDTHS {
        for group in [Group::Columns(16), Group::Row] {
            layouts.extend(
                [GptqZeros::MinusOne, GptqZeros::AsTheyAre].map(|zeros| Layout::Gptq {
                    width,
                    group,
                    symmetric: false,
                    zeros,
                }),
            );
        }
    }
    layouts
}

fn check(layout: Layout, shape: [usize; 2], scales: Dtype, head_rows: usize) {
    let scheme = Scheme {
        layout,
        inputs: Inputs::AsTheyAre,
    };
    let linear = Linear::random(scheme, shape, scales, 0);
    let expected = linear.values(head_rows);
    on_every_device(&linear, head_rows, |what, found, places| {
        assert_same(what, found, &expected[places]);
    });
}

/// Decodes parts of a linear on every device, and has them compared as [`check_parts`] does.
pub fn on_every_device(
    linear: &Linear,
    head_rows: usize,
    compare: impl Fn(&str, &[f32], Range<usize>),
) {
    let shape = linear.shape();
    for (name, device) in drivers::all() {
        linear.with(|linear, checkpoint| {
            let StoredLinear::Integers(stored) = linear.stored(checkpoint).unwrap() else {
                panic!("these are integers");
            };
            let layout = IntegerLayout {
                codes: stored.storage,
                columns: shape[1],
                group: stored.group,
                scales: stored.scale_dtype,
                head_rows,
            };
            let what = format!("{name}, {}, {layout:?}", linear.scheme());
            let send = |bytes: &[u8]| device.upload_bytes(bytes).unwrap();
            let (codes, scales) = (send(stored.codes), send(&stored.scales));
            let zeros = stored.zeros.as_deref().map(send);
            let decode = |rows, out: &mut Array| {
                let zeros = zeros.as_ref();
                device
                    .dequantize_integers(&layout, &codes, &scales, zeros, rows, out)
                    .unwrap();
            };
            check_parts(&what, &device, shape, decode, &compare);
        });
    }
}

#[test]
fn every_layout_as_formats_decodes_it() {
    for scales in SCALES {
        for layout in compressed_tensors() {
            check(layout, SHAPE, scales, 0);
        }
        for layout in gptq() {
            check(layout, WHOLE_WORDS, scales, 0);
        }
    }
}

#[test]
fn halves_of_heads_are_interleaved() {
    for layout in compressed_tensors() {
        check(layout, SHAPE_OF_HEADS, Dtype::Bf16, HEAD_ROWS);
    }
    for layout in gptq() {
        check(layout, WHOLE_WORDS, Dtype::F16, HEAD_ROWS);
    }
}
