//! Products of inputs in Q8_1 with weights that have minima: against the sums of runtimes in f64.

use half::f16;
use nemoconv_device::{MatmulLayout, Rounding};
use nemoconv_formats::GgmlType;

use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

const BLOCK: usize = 32;
const TYPES: [GgmlType; 2] = [GgmlType::Q4_1, GgmlType::Q5_1];

/// A block of inputs: scale, its F16, the sum of codes, which are in F32 as runtimes find them.
struct Input {
    scale: f32,
    rounded: f64,
    codes: Vec<f64>,
}

impl Input {
    fn of(values: &[f32]) -> Self {
        let largest = values.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let code = |x: &f32| f64::from((x * inverse).round_ties_even());
        Self {
            scale,
            rounded: f16::from_f32(scale).to_f64(),
            codes: values.iter().map(code).collect(),
        }
    }

    fn sum_of_codes(&self) -> f64 {
        self.codes.iter().sum()
    }

    /// What Q8_1 keeps.
    fn sum(&self) -> f64 {
        f16::from_f32(self.scale * self.sum_of_codes() as f32).to_f64()
    }
}

/// Inputs with large sums, a block of zeros, one of equals, one that is small.
fn inputs(blocks: usize, seed: u64) -> Vec<f32> {
    let mut x: Vec<f32> = numbers(blocks * BLOCK, seed)
        .iter()
        .map(|x| x * 3.0 + 2.0)
        .collect();
    for (block, values) in x.chunks_exact_mut(BLOCK).enumerate() {
        match block % 11 {
            1 => values.fill(0.0),
            2 => values.fill(-1.7),
            3 => values.iter_mut().for_each(|x| *x *= 1e-6),
            _ => {}
        }
    }
    x
}

#[test]
fn remainders_of_sums() {
    for (name, device) in all() {
        for blocks in [1, 63, 65, 1000] {
            let x = inputs(blocks, 1);
            let expected: Vec<f64> = x
                .chunks_exact(BLOCK)
                .map(Input::of)
                .map(|input| input.sum() - input.rounded * input.sum_of_codes())
                .collect();
            let x = device.upload(&x).unwrap();
            let found = device.q8_1_remainders(&x).unwrap();
            let found = device.download_all(&found).unwrap();
            check(&name, &found, &expected, TOLERANCE);
        }
    }
}

/// Blocks with any codes, and scale and minimum of each.
fn weights(ty: GgmlType, blocks: usize, seed: u64) -> (Vec<u8>, Vec<[f16; 2]>) {
    let scales: Vec<[f16; 2]> = numbers(2 * blocks, seed)
        .as_chunks()
        .0
        .iter()
        .map(|[d, m]| [f16::from_f32(d / 20.0), f16::from_f32(*m)])
        .collect();
    let mut bytes = Vec::new();
    for (block, scales) in scales.iter().enumerate() {
        bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
        bytes.extend((4..ty.block_bytes()).map(|at| (block * 89 + at * 37) as u8));
    }
    (bytes, scales)
}

#[test]
fn minima_of_blocks() {
    for (name, device) in all() {
        for ty in TYPES {
            let (bytes, scales) = weights(ty, 300, 2);
            let bytes = device
                .upload_bytes(&[&[7, 7], &bytes[..]].concat())
                .unwrap();
            for (first, count) in [(0, 300), (1, 1), (43, 257), (5, 0)] {
                let mut out = device.upload(&vec![77.0; count + 1]).unwrap();
                let at = (2 + first * ty.block_bytes()) as u64;
                device
                    .block_minima(ty, &bytes, at, count, &mut out)
                    .unwrap();
                let found = device.download_all(&out).unwrap();
                let expected = scales[first..][..count].iter().map(|[_, m]| m.to_f64());
                let expected: Vec<f64> = expected.chain([77.0]).collect();
                check(&format!("{name} {ty}"), &found, &expected, 0.0);
            }
        }
    }
}

#[test]
fn products_with_minima() {
    let (rows, columns, blocks) = (5, 67, 9);
    let width = blocks * BLOCK;
    for (name, device) in all() {
        for ty in TYPES {
            let x = inputs(rows * blocks, 3);
            let (bytes, scales) = weights(ty, columns * blocks, 4);
            let input = device.upload(&x).unwrap();
            let bytes = device.upload_bytes(&bytes).unwrap();
            let mut decoded = device.zeros(columns * width).unwrap();
            device
                .dequantize(ty, &bytes, 0, columns * width, &mut decoded)
                .unwrap();
            let weights = device.download_all(&decoded).unwrap();
            let mut minima = device.zeros(columns * blocks).unwrap();
            device
                .block_minima(ty, &bytes, 0, columns * blocks, &mut minima)
                .unwrap();
            let rounded = device
                .round_activation(&input, width, Rounding::Q8_0)
                .unwrap();
            let remainders = device.q8_1_remainders(&input).unwrap();
            let mut out = device.zeros(rows * columns).unwrap();
            let layout = MatmulLayout::linear(rows, width, columns, 0, columns);
            device
                .matmul(&layout, &rounded, &decoded, &mut out)
                .unwrap();
            let layout = MatmulLayout {
                beta: 1.0,
                ..MatmulLayout::linear(rows, blocks, columns, 0, columns)
            };
            device
                .matmul(&layout, &remainders, &minima, &mut out)
                .unwrap();
            let found = device.download_all(&out).unwrap();

            let of_blocks: Vec<Input> = x.chunks_exact(BLOCK).map(Input::of).collect();
            let mut expected = Vec::new();
            for row in of_blocks.chunks_exact(blocks) {
                for column in 0..columns {
                    let block = |at: usize| {
                        let input = &row[at];
                        let place = column * blocks + at;
                        let minimum = scales[place][1].to_f64();
                        // Codes times the scale, without the minimum.
                        let weights = weights[place * BLOCK..][..BLOCK].iter();
                        let scaled = weights.map(|weight| f64::from(*weight) - minimum);
                        let dot: f64 = scaled.zip(&input.codes).map(|(w, code)| w * code).sum();
                        input.rounded * dot + minimum * input.sum()
                    };
                    expected.push((0..blocks).map(block).sum());
                }
            }
            check(&format!("{name} {ty}"), &found, &expected, TOLERANCE);
        }
    }
}
