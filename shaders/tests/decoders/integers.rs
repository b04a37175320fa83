//! `dequantize_integers` on the linears that compressed-tensors writes.

use nemoconv_device::{Device, IntegerLayout};
use nemoconv_formats::Dtype;
use nemoconv_formats::packed::{Group, Inputs, IntegerCodes, Layout, Role, Scheme, Width};

use super::packed::{Linear, check_parts};
use crate::drivers;

/// No multiples of the codes in a word.
const ROWS: usize = 21;
const COLUMNS: usize = 45;
/// Heads that share words of zero points.
const HEAD_ROWS: usize = 6;

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

fn check(name: &str, device: &Device, layout: &IntegerLayout, symmetric: bool) {
    let rows = match layout.head_rows {
        0 => ROWS,
        head_rows => 4 * head_rows,
    };
    let shape = [rows, COLUMNS];
    let linear = Linear::random(scheme(layout, symmetric), shape, layout.scales, 0);
    let expected = linear.values(layout.head_rows);
    let [codes, scales] = [Role::Codes, Role::Scale].map(|role| linear.send(device, role).unwrap());
    let zeros = linear.send(device, Role::ZeroPoint);
    let what = format!("{name}, {layout:?}, symmetric: {symmetric}");
    check_parts(&what, device, COLUMNS, &expected, 0, |rows, out| {
        let zeros = zeros.as_ref();
        device
            .dequantize_integers(layout, &codes, &scales, zeros, rows, out)
            .unwrap();
    });
}

/// Every way to store codes with every group.
fn places() -> impl Iterator<Item = (IntegerCodes, Group)> {
    PLACES
        .into_iter()
        .flat_map(|codes| GROUPS.map(|group| (codes, group)))
}

/// With zero points and without; packed ones of whole tensors are not known.
fn check_both(name: &str, device: &Device, layout: &IntegerLayout) {
    check(name, device, layout, true);
    if layout.codes == IntegerCodes::Bytes || layout.group != Group::Tensor {
        check(name, device, layout, false);
    }
}

#[test]
fn every_layout_as_formats_decodes_it() {
    for (name, device) in drivers::all() {
        for (codes, group) in places() {
            for scales in SCALES {
                let layout = IntegerLayout {
                    codes,
                    columns: COLUMNS,
                    group,
                    scales,
                    head_rows: 0,
                };
                check_both(&name, &device, &layout);
            }
        }
    }
}

#[test]
fn halves_of_heads_are_interleaved() {
    for (name, device) in drivers::all() {
        for (codes, group) in places() {
            let layout = IntegerLayout {
                codes,
                columns: COLUMNS,
                group,
                scales: Dtype::Bf16,
                head_rows: HEAD_ROWS,
            };
            check_both(&name, &device, &layout);
        }
    }
}
