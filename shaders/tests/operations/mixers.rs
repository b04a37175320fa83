//! Convolution, scan, attention: in pieces, of several sequences in a batch.

use std::ops::Range;

use nemoconv_device::{Array, AttentionLayout, ConvLayout, Device, ScanLayout};

use crate::drivers::all;
use crate::{check, numbers};

/// Recurrences add up what each step loses.
const RECURRENT: f64 = 1e-5;

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
            stride,
            first,
            channels,
            ..
        } = layout;
        let (input, weight, bias) = (
            numbers(rows * stride, 1),
            numbers(channels * taps, 2),
            numbers(channels, 3),
        );
        let before = numbers((taps - 1) * channels, 4);
        let x = |row: isize, c: usize| match usize::try_from(row) {
            Ok(row) => f64::from(input[row * stride + first + c]),
            Err(_) => f64::from(before[(row + taps as isize - 1) as usize * channels + c]),
        };
        let mut expected = Vec::new();
        for row in 0..rows as isize {
            for c in 0..channels {
                let sum: f64 = (0..taps)
                    .map(|tap| {
                        f64::from(weight[c * taps + tap])
                            * x(row + 1 + tap as isize - taps as isize, c)
                    })
                    .sum::<f64>()
                    + f64::from(bias[c]);
                expected.push(sum / (1.0 + (-sum).exp()));
            }
        }
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
            check(
                &name,
                &device.download(&out, 0..out.len()).unwrap(),
                &expected,
                RECURRENT,
            );
            let last = device.download(&state, 0..state.len()).unwrap();
            let kept: Vec<f64> = (rows as isize - 3..rows as isize)
                .flat_map(|row| (0..channels).map(move |c| (row, c)))
                .map(|(row, c)| x(row, c))
                .collect();
            check(&name, &last, &kept, 0.0);
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
        let mut state: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
        let mut expected = Vec::new();
        for row in 0..rows {
            let at = |c: usize| f64::from(xbc[row * width + c]);
            for head in 0..heads {
                let raw =
                    f64::from(dt[(row + 1) * dt_stride - heads + head]) + f64::from(bias[head]);
                let step = raw.exp().ln_1p().clamp(0.0, 1.5);
                let group = head / (heads / groups);
                for channel in 0..head_dim {
                    let x = at(head * head_dim + channel);
                    let mut y = f64::from(d[head]) * x;
                    for n in 0..state_size {
                        let s = &mut state[(head * state_size + n) * head_dim + channel];
                        *s = *s * (step * f64::from(a[head])).exp()
                            + step * x * at(inner + group * state_size + n);
                        y += *s * at(inner + (groups + group) * state_size + n);
                    }
                    expected.push(y);
                }
            }
        }
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
            check(
                &name,
                &device.download(&out, 0..out.len()).unwrap(),
                &expected,
                RECURRENT,
            );
            let found_state = device.download(&found_state, 0..state.len()).unwrap();
            check(&name, &found_state, &state, RECURRENT);
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
            for row in 0..rows {
                for head in 0..heads {
                    let q = (first_row + row) * width + head * head_dim;
                    let own = head / (heads / key_value_heads) * head_dim;
                    let weights: Vec<f64> = (0..=position + row)
                        .map(|at| {
                            let dot: f64 = (0..head_dim)
                                .map(|c| {
                                    f64::from(query[q + c]) * f64::from(keys[at * cache + own + c])
                                })
                                .sum();
                            (dot / (head_dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    for c in 0..head_dim {
                        let sum: f64 = weights
                            .iter()
                            .enumerate()
                            .map(|(at, weight)| weight * f64::from(values[at * cache + own + c]))
                            .sum();
                        expected.push(sum / total);
                    }
                }
            }
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
            // Sums that are rounded to F16 a hundred times.
            let tolerance = if is_f16 { 2e-2 } else { RECURRENT };
            check(&name, &found, &expected, tolerance);
        }
    }
}
