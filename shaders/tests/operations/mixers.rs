//! Convolution, scan, attention: in pieces, of several sequences in a batch.

use std::ops::Range;

use nemoconv_device::{Array, AttentionLayout, ConvLayout, Device, ScanLayout};

use super::reference::{self, F16_SUMS, RECURRENT};
use crate::drivers::all;
use crate::{check, numbers};

fn pieces(device: &Device, lens: &[usize], mut run: impl FnMut(&Device, Range<usize>)) {
    let mut first = 0;
    for len in lens {
        run(device, first..first + len);
        first += len;
    }
}

#[test]
fn convolutions() {
    let (rows, taps) = (11, 4);
    for (name, device) in all() {
        let layout = ConvLayout {
            stride: 90,
            first: 7,
            channels: 77,
            taps,
        };
        let ConvLayout {
            stride, channels, ..
        } = layout;
        let (input, weight, bias) = (
            numbers(rows * stride, 1),
            numbers(channels * taps, 2),
            numbers(channels, 3),
        );
        let before = numbers((taps - 1) * channels, 4);
        let sources = [&input[..], &before, &weight, &bias];
        let expected = reference::conv1d_silu(layout, sources);
        for lens in [&[11][..], &[1, 1, 2, 7], &[5, 0, 6]] {
            let [input, weight, bias] =
                [&input, &weight, &bias].map(|values| device.upload(values).unwrap());
            let mut state = device.upload(&before).unwrap();
            let mut out = device.zeros(rows * channels).unwrap();
            pieces(&device, lens, |device, rows| {
                device
                    .conv1d_silu(layout, rows, &input, &mut state, &weight, &bias, &mut out)
                    .unwrap();
            });
            let found = device.download_all(&out).unwrap();
            check(&name, &found, &expected.out, RECURRENT);
            let last = device.download_all(&state).unwrap();
            check(&name, &last, &expected.state, 0.0);
        }
    }
}

#[test]
fn scans() {
    let layout = ScanLayout {
        heads: 6,
        head_dim: 20,
        groups: 3,
        state_size: 13,
        dt_stride: 9,
        time_step: (0.0, 1.5),
    };
    let rows = 9;
    let ScanLayout {
        heads,
        head_dim,
        groups,
        state_size,
        dt_stride,
        ..
    } = layout;
    let inner = heads * head_dim;
    let width = inner + 2 * groups * state_size;
    for (name, device) in all() {
        let xbc = numbers(rows * width, 1);
        let dt = numbers(rows * dt_stride, 2);
        let a: Vec<f32> = numbers(heads, 3).iter().map(|x| -x.abs() - 0.1).collect();
        let (d, bias) = (numbers(heads, 4), numbers(heads, 5));
        let before = numbers(inner * state_size, 6);
        let sources = [&xbc[..], &dt, &a, &d, &bias, &before];
        let expected = reference::selective_scan(layout, sources);
        for lens in [&[9][..], &[1, 3, 5]] {
            let inputs = [&xbc, &dt, &a, &d, &bias].map(|values| device.upload(values).unwrap());
            let mut found_state = device.upload(&before).unwrap();
            let mut out = device.zeros(rows * inner).unwrap();
            pieces(&device, lens, |device, rows| {
                let inputs: [&Array; 5] = inputs.each_ref();
                device
                    .selective_scan(layout, rows, inputs, &mut found_state, &mut out)
                    .unwrap();
            });
            let found = device.download_all(&out).unwrap();
            check(&name, &found, &expected.out, RECURRENT);
            let found = device.download_all(&found_state).unwrap();
            check(&name, &found, &expected.state, RECURRENT);
        }
    }
}

#[test]
fn attention_of_a_long_past() {
    for (name, device) in all() {
        for (heads, key_value_heads, head_dim, is_f16) in [
            (4, 2, 16, false),
            (3, 3, 70, false),
            (2, 1, 256, false),
            (4, 2, 16, true),
        ] {
            let layout = AttentionLayout {
                heads,
                key_value_heads,
                head_dim,
                is_f16,
            };
            let (first_row, rows, position) = (2, 5, 130);
            let (width, cache) = (heads * head_dim, key_value_heads * head_dim);
            let positions = position + rows;
            let query = numbers((first_row + rows) * width, 1);
            let (keys, values) = (numbers(positions * cache, 2), numbers(positions * cache, 3));
            let mut expected = vec![0.0; first_row * width];
            let sources = [&query[first_row * width..], &keys, &values];
            expected.extend(reference::attention(layout, position, sources));
            let inputs = [&query, &keys, &values].map(|values| device.upload(values).unwrap());
            let mut out = device.zeros(query.len()).unwrap();
            let inputs: [&Array; 3] = inputs.each_ref();
            device
                .attention(
                    layout,
                    first_row..first_row + rows,
                    position,
                    inputs,
                    &mut out,
                )
                .unwrap();
            let found = device.download(&out, 0..out.len()).unwrap();
            let tolerance = if is_f16 { F16_SUMS } else { RECURRENT };
            check(&name, &found, &expected, tolerance);
        }
    }
}
