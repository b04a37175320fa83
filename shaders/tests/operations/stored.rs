//! Products with weights as they are stored: against the same of rounded operands in f64, and with a unit matrix, which
//! gives back what became of the inputs.

use half::{bf16, f16};
use nemoconv_device::{Packing, Rounding};
use nemoconv_formats::GgmlType;

use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

const TYPES: [(GgmlType, Rounding); 3] = [
    (GgmlType::BF16, Rounding::Bf16),
    (GgmlType::F16, Rounding::F16),
    (GgmlType::Q8_0, Rounding::Q8_0),
];

/// Bytes of weights, and what they stand for.
fn stored(ty: GgmlType, values: &[f32]) -> (Vec<u8>, Vec<f64>) {
    let mut bytes = Vec::new();
    let mut decoded = Vec::new();
    for block in values.chunks(ty.block_elements()) {
        match ty {
            GgmlType::BF16 => {
                let value = bf16::from_f32(block[0]);
                bytes.extend(value.to_le_bytes());
                decoded.push(value.to_f64());
            }
            GgmlType::F16 => {
                let value = f16::from_f32(block[0]);
                bytes.extend(value.to_le_bytes());
                decoded.push(value.to_f64());
            }
            _ => {
                let scale = f16::from_f32(1.0 / 64.0);
                bytes.extend(scale.to_le_bytes());
                for value in block {
                    let code = (value * 64.0) as i8;
                    bytes.extend(code.to_le_bytes());
                    decoded.push(f64::from(code) * scale.to_f64());
                }
            }
        }
    }
    (bytes, decoded)
}

#[test]
fn products_with_stored_weights() {
    for (name, device) in all() {
        for (ty, rounding) in TYPES {
            // Rows, columns, inner, values before the first weight.
            let sizes = match ty {
                GgmlType::Q8_0 => [
                    (1, 3, 32, 32),
                    (130, 5, 96, 0),
                    (3, 131, 256, 32),
                    (66, 33, 64, 64),
                    (2, 4, 0, 0),
                ],
                _ => [
                    (1, 3, 7, 1),
                    (130, 5, 33, 3),
                    (3, 131, 264, 0),
                    (66, 33, 40, 8),
                    (2, 4, 0, 0),
                ],
            };
            for (rows, columns, inner, before) in sizes {
                let x: Vec<f32> = numbers(rows * inner, 1).iter().map(|x| x * 3.0).collect();
                let (bytes, weights) = stored(ty, &numbers(before + columns * inner, 2));
                let first_byte = before / ty.block_elements() * ty.block_bytes();
                let x = device.upload(&x).unwrap();
                let bytes = device.upload_bytes(&bytes).unwrap();
                let packing = Packing::of(ty, rounding).unwrap();
                let rounded = device.round_activation(&x, inner, rounding).unwrap();
                let rounded = device.download_all(&rounded).unwrap();
                let (first_column, out_row) = (2, columns + 3);
                let untouched = numbers(rows * out_row, 3);
                let mut expected: Vec<f64> = untouched.iter().map(|x| f64::from(*x)).collect();
                for i in 0..rows {
                    for j in 0..columns {
                        let product =
                            |k| f64::from(rounded[i * inner + k]) * weights[before + j * inner + k];
                        expected[i * out_row + first_column + j] = (0..inner).map(product).sum();
                    }
                }
                let packed = device.pack(&x, rows, inner, packing).unwrap();
                let mut out = device.upload(&untouched).unwrap();
                let place = [first_column, out_row];
                device
                    .matmul_stored(&packed, &bytes, first_byte as u64, columns, place, &mut out)
                    .unwrap();
                let found = device.download_all(&out).unwrap();
                let case = format!("{name} {ty} {rows} {columns} {inner}");
                check(&case, &found, &expected, TOLERANCE);
            }
        }
    }
}

/// Bit for bit what `round_activation` gives, ties, subnormals and blocks of zeros among it.
#[test]
fn packed_inputs_are_rounded_ones() {
    for (name, device) in all() {
        for (ty, rounding) in TYPES {
            let (rows, width) = (5, 64);
            let mut x: Vec<f32> = numbers(rows * width, 4).iter().map(|x| x * 100.0).collect();
            x[32..64].fill(0.0);
            x[64..96].iter_mut().for_each(|x| *x *= 1e-7);
            x[96..100].copy_from_slice(&[63.5, 64.5, -127.0, 1.0 + 1.0 / 256.0]);
            let mut unit = vec![0.0; width * width];
            (0..width).for_each(|k| unit[k * width + k] = 1.0);
            let (bytes, weights) = stored(ty, &unit);
            assert!(weights[0] == 1.0);
            let x = device.upload(&x).unwrap();
            let bytes = device.upload_bytes(&bytes).unwrap();
            let packing = Packing::of(ty, rounding).unwrap();
            let packed = device.pack(&x, rows, width, packing).unwrap();
            let mut out = device.zeros(rows * width).unwrap();
            device
                .matmul_stored(&packed, &bytes, 0, width, [0, width], &mut out)
                .unwrap();
            let rounded = device.round_activation(&x, width, rounding).unwrap();
            let [found, expected] =
                [&out, &rounded].map(|values| device.download_all(values).unwrap());
            // Zeros have no sign after a sum.
            assert_eq!(found, expected, "{name} {ty}");
        }
    }
}

/// A NaN or an infinity stays what it is.
#[test]
fn packed_inputs_that_are_no_numbers() {
    for (name, device) in all() {
        for (ty, rounding) in TYPES {
            let width = 32;
            let mut x = numbers(3 * width, 5);
            // Not quiet, and in no bit that BF16 keeps.
            x[7] = f32::from_bits(0x7f80_0001);
            x[width + 3] = f32::INFINITY;
            let (bytes, _) = stored(ty, &vec![1.0; width]);
            let x = device.upload(&x).unwrap();
            let bytes = device.upload_bytes(&bytes).unwrap();
            let packing = Packing::of(ty, rounding).unwrap();
            let packed = device.pack(&x, 3, width, packing).unwrap();
            let mut out = device.zeros(3).unwrap();
            device
                .matmul_stored(&packed, &bytes, 0, 1, [0, 1], &mut out)
                .unwrap();
            let found = device.download_all(&out).unwrap();
            assert!(found[0].is_nan(), "{name} {ty}: {found:?}");
            assert!(
                !found[1].is_finite() && found[2].is_finite(),
                "{name} {ty}: {found:?}"
            );
        }
    }
}
