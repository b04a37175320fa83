//! Convolution, scan, attention: several sequences in a batch, one of them without rows, in two pieces.

use std::ops::Range;

use nemoconv::backend::{
    AttentionArithmetic, AttentionShape, Backend, KeyValues, Machine, MachineBuffer, ScanShape,
    ScanWeights, Segment,
};
use nemoconv_device::{AttentionLayout, ConvLayout, ScanLayout};

use super::reference::{self, Advanced, F16_SUMS, RECURRENT, check, numbers};
use super::{on_each, upload};

/// Rows of each sequence of a batch.
const SEQUENCES: [usize; 3] = [70, 0, 13];
/// Where each is cut in two: the first parts are a batch, then the second ones.
const CUTS: [usize; 3] = [66, 0, 0];

/// Rows of sequences one after the other.
fn ranges(lengths: [usize; 3]) -> [Range<usize>; 3] {
    let mut first = 0;
    lengths.map(|len| {
        first += len;
        first - len..first
    })
}

/// Which rows of all sequences are in either batch, sequence by sequence.
fn batches() -> [[Range<usize>; 3]; 2] {
    let all = ranges(SEQUENCES);
    let cut = |sequence: usize| all[sequence].start + CUTS[sequence];
    [
        [0, 1, 2].map(|sequence| all[sequence].start..cut(sequence)),
        [0, 1, 2].map(|sequence| cut(sequence)..all[sequence].end),
    ]
}

/// Rows of a batch.
fn rows_of(values: &[f32], width: usize, batch: &[Range<usize>; 3]) -> Vec<f32> {
    let rows = batch
        .iter()
        .map(|rows| &values[rows.start * width..rows.end * width]);
    rows.collect::<Vec<_>>().concat()
}

/// Runs both batches: what they give for all rows, sequence by sequence.
fn in_two<S>(
    machine: &Machine,
    width: usize,
    states: &mut [S; 3],
    run: impl Fn(&[Range<usize>; 3], &mut [Segment<'_, S>]) -> MachineBuffer,
) -> Vec<f32> {
    let mut out = vec![0.0; SEQUENCES.iter().sum::<usize>() * width];
    for (batch, position) in batches().iter().zip([[0; 3], CUTS]) {
        let places = ranges(batch.each_ref().map(Range::len));
        let mut segments: Vec<_> = states
            .iter_mut()
            .zip(places.clone())
            .zip(position)
            .map(|((state, rows), position)| Segment {
                rows,
                position,
                state,
            })
            .collect();
        let found = machine.download_all(run(batch, &mut segments)).unwrap();
        for (from, to) in places.into_iter().zip(batch) {
            let part = &found[from.start * width..from.end * width];
            out[to.start * width..to.end * width].copy_from_slice(part);
        }
    }
    out
}

/// A recurrence of `width` values per row in two pieces, against what is expected of each sequence alone.
fn check_recurrence(
    (name, machine): (&str, &Machine),
    width: usize,
    before: &[Vec<f32>; 3],
    run: impl Fn(&[Range<usize>; 3], &mut [Segment<'_, MachineBuffer>]) -> MachineBuffer,
    expected: impl Fn(Range<usize>, &[f32]) -> Advanced,
) {
    let mut states = before.each_ref().map(|state| upload(machine, state));
    let out = in_two(machine, width, &mut states, run);
    for ((rows, before), state) in ranges(SEQUENCES).into_iter().zip(before).zip(states) {
        let expected = expected(rows.clone(), before);
        let out = &out[rows.start * width..rows.end * width];
        check(name, out, &expected.out, RECURRENT);
        let state = machine.download_all(state).unwrap();
        check(name, &state, &expected.state, RECURRENT);
    }
}

fn states(len: usize) -> [Vec<f32>; 3] {
    [10, 11, 12].map(|seed| numbers(len, seed))
}

#[test]
fn convolutions() {
    on_each(|name, machine| {
        for (stride, first, channels, taps) in [(90, 7, 77, 4), (3, 1, 2, 3), (1, 0, 1, 2)] {
            let layout = ConvLayout {
                stride,
                first,
                channels,
                taps,
            };
            for odd in [0.5, f32::NAN] {
                let mut input = numbers(83 * stride, 1);
                input[5 * stride + first] = odd;
                let mut before = states((taps - 1) * channels);
                before[2][channels - 1] = odd;
                let (weight, bias) = (numbers(channels * taps, 2), numbers(channels, 3));
                let [on_weight, on_bias] = [&weight, &bias].map(|x| upload(machine, x));
                let run = |batch: &_, segments: &mut [Segment<'_, _>]| {
                    let input = upload(machine, &rows_of(&input, stride, batch));
                    let (weight, bias) = (&on_weight, &on_bias);
                    let out = machine.conv1d_silu(&input, stride, first, weight, bias, segments);
                    out.unwrap()
                };
                let case = format!("{name}, {layout:?}, {odd}");
                let expected = |rows: Range<usize>, before: &[f32]| {
                    let input = &input[rows.start * stride..rows.end * stride];
                    reference::conv1d_silu(layout, [input, before, &weight, &bias])
                };
                check_recurrence((&case, machine), channels, &before, run, expected);
            }
        }
    });
}

/// Heads, channels of a head, groups, length of a state, length of a row of time steps.
const SCANS: [[usize; 5]; 3] = [[6, 20, 3, 13, 9], [2, 83, 1, 130, 2], [1, 1, 1, 1, 1]];

#[test]
fn scans() {
    on_each(|name, machine| {
        for [heads, head_dim, groups, state_size, dt_stride] in SCANS {
            let shape = ScanShape {
                heads,
                head_dim,
                groups,
                state_size,
                time_step: (0.01, 1.5),
            };
            let layout = ScanLayout {
                heads,
                head_dim,
                groups,
                state_size,
                dt_stride,
                time_step: shape.time_step,
            };
            let (width, inner) = (shape.conv_dim(), shape.inner());
            // None; a channel, B, C and the time step of a head in rows of a piece, a state.
            for which in 0..6 {
                let mut xbc = numbers(83 * width, 1);
                let mut dt = numbers(83 * dt_stride, 2);
                let mut before = states(shape.state_len());
                let row = 68;
                match which {
                    0 => {}
                    1 => xbc[row * width] = f32::NAN,
                    2 => xbc[row * width + inner] = f32::NAN,
                    3 => xbc[(row + 1) * width - 1] = f32::NAN,
                    4 => dt[(row + 1) * dt_stride - 1] = f32::NAN,
                    _ => before[2][shape.state_len() / 2] = f32::NAN,
                }
                let a: Vec<f32> = numbers(heads, 3).iter().map(|x| -x.abs() - 0.1).collect();
                let (d, dt_bias) = (numbers(heads, 4), numbers(heads, 5));
                let per_head = [&a, &d, &dt_bias].map(|values| upload(machine, values));
                let run = |batch: &_, segments: &mut [Segment<'_, _>]| {
                    let xbc = upload(machine, &rows_of(&xbc, width, batch));
                    let dt = upload(machine, &rows_of(&dt, dt_stride, batch));
                    let [a, d, dt_bias] = &per_head;
                    let weights = ScanWeights { a, d, dt_bias };
                    let out =
                        machine.selective_scan(&xbc, &dt, dt_stride, weights, shape, segments);
                    out.unwrap()
                };
                let case = format!("{name}, {layout:?}, NaN {which}");
                let expected = |rows: Range<usize>, before: &[f32]| {
                    let xbc = &xbc[rows.start * width..rows.end * width];
                    let dt = &dt[rows.start * dt_stride..rows.end * dt_stride];
                    reference::selective_scan(layout, [xbc, dt, &a, &d, &dt_bias, before])
                };
                check_recurrence((&case, machine), inner, &before, run, expected);
            }
        }
    });
}

/// Heads, key-value heads, channels of a head; the last are more than devices have a kernel for.
const HEADS: [[usize; 3]; 5] = [
    [4, 2, 16],
    [3, 3, 70],
    [6, 2, 40],
    [2, 1, 256],
    [2, 1, AttentionLayout::MAX_HEAD_DIM + 5],
];

#[test]
fn attention() {
    on_each(|name, machine| {
        for [heads, key_value_heads, head_dim] in HEADS {
            let layout = AttentionLayout {
                heads,
                key_value_heads,
                head_dim,
                is_f16: false,
            };
            for (arithmetic, tolerance) in [
                (AttentionArithmetic::F32, RECURRENT),
                (AttentionArithmetic::F16, F16_SUMS),
            ] {
                let shape = AttentionShape {
                    heads,
                    key_value_heads,
                    head_dim,
                    arithmetic,
                };
                // In a query, a key, a value; in none. Runtimes that sum in F16 have a share for an infinite score.
                let cases = [(0, f32::NAN), (1, f32::NAN), (2, f32::NAN), (3, 0.0)];
                let infinite =
                    (arithmetic == AttentionArithmetic::F32).then_some((1, f32::INFINITY));
                for (which, odd) in cases.into_iter().chain(infinite) {
                    let width = heads * head_dim;
                    let cached = key_value_heads * head_dim;
                    let mut inputs = [(width, 1), (cached, 2), (cached, 3)]
                        .map(|(width, seed)| numbers(83 * width, seed));
                    if let Some(input) = inputs.get_mut(which) {
                        let row = input.len() / 83;
                        input[67 * row + row / 2] = odd;
                    }
                    let out = attend(machine, shape, &inputs);
                    for rows in ranges(SEQUENCES) {
                        let sources = [width, cached, cached];
                        let part =
                            |i: usize| &inputs[i][rows.start * sources[i]..rows.end * sources[i]];
                        let expected = reference::attention(layout, 0, [0, 1, 2].map(part));
                        let found = &out[rows.start * width..rows.end * width];
                        let case = format!("{name}, {shape:?}, {odd} in {which}");
                        check(&case, found, &expected, tolerance);
                    }
                }
            }
        }
    });
}

/// Attention of all sequences in two pieces.
fn attend(machine: &Machine, shape: AttentionShape, inputs: &[Vec<f32>; 3]) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let cached = shape.key_value_heads * shape.head_dim;
    let mut caches = [(); 3].map(|()| KeyValues {
        keys: upload(machine, &[]),
        values: upload(machine, &[]),
    });
    let out = in_two(machine, width, &mut caches, |batch, segments| {
        let [query, keys, values] = [(0, width), (1, cached), (2, cached)]
            .map(|(which, width)| upload(machine, &rows_of(&inputs[which], width, batch)));
        let out = machine.attention(&query, &keys, &values, shape, segments);
        out.unwrap()
    });
    for (rows, cache) in ranges(SEQUENCES).into_iter().zip(caches) {
        assert_eq!(machine.len(&cache.keys), rows.len() * cached);
        assert_eq!(machine.len(&cache.values), rows.len() * cached);
    }
    out
}
