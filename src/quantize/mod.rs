//! Choosing scales and codes: f32 rows in, ggml blocks out.
//!
//! Enters: rows, a target type, column importance. Leaves: packed blocks and what did not fit.

mod affine;
mod affine_block;
pub mod feedback;
mod float;
pub mod form;
pub mod input_scale;
pub mod integer;
mod iq4_nl;
mod iq4_xs;
pub mod lanes;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod searched_block;
mod small_block;
mod super_block;
mod symmetric;
mod symmetric_block;
mod tq1_0;
mod tq2_0;

use std::ops::AddAssign;

use crate::formats::GgmlType;
use searched_block::SearchedType;
use small_block::PlainType;

/// How many scales, or for F16 and BF16 elements, are too large for their type and became infinite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "infinite scales make a file useless"]
pub struct ScaleOverflow(pub u64);

impl AddAssign for ScaleOverflow {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

/// Whether [`quantize_rows`] knows the type.
pub fn can_quantize(ty: GgmlType) -> bool {
    use GgmlType::*;
    matches!(
        ty,
        F32 | F16
            | BF16
            | Q4_0
            | Q4_1
            | Q5_0
            | Q5_1
            | Q8_0
            | MXFP4
            | TQ1_0
            | TQ2_0
            | Q2_K
            | Q3_K
            | Q4_K
            | Q5_K
            | Q6_K
            | IQ4_NL
            | IQ4_XS
    )
}

/// Whether codes are chosen: false for floats, whose values have one nearest each.
pub fn is_searched(ty: GgmlType) -> bool {
    !matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
}

/// Quantizes whole rows; every row gives the same bytes alone and together with others.
///
/// `rows`: `[n, row_len]`, row-major; `importance`: `[row_len]`, how much an error in each column counts
/// (used by the types whose scales are searched); `out`: exactly the bytes of n rows. NaN and infinities
/// give unspecified codes in their block.
///
/// # Panics
/// If the lengths do not belong together or the type cannot be quantized to (see [`can_quantize`]).
pub fn quantize_rows(
    ty: GgmlType,
    row_len: usize,
    rows: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    assert!(
        row_len > 0 && rows.len().is_multiple_of(row_len),
        "rows of {row_len} elements"
    );
    assert!(
        row_len.is_multiple_of(ty.block_elements()),
        "rows of whole {ty} blocks"
    );
    assert_eq!(
        ty.bytes_for(rows.len() as u64),
        Some(out.len() as u64),
        "bytes of the {ty} rows"
    );
    assert!(
        importance.is_none_or(|values| values.len() == row_len),
        "an importance per column"
    );
    match ty {
        GgmlType::F32 => float::f32(rows, out),
        GgmlType::F16 => float::f16(rows, out),
        GgmlType::BF16 => float::bf16(rows, out),
        GgmlType::Q4_0 => plain_or_searched::<q4_0::Q4_0>(row_len, rows, importance, out),
        GgmlType::Q4_1 => plain_or_searched::<q4_1::Q4_1>(row_len, rows, importance, out),
        GgmlType::Q5_0 => plain_or_searched::<q5_0::Q5_0>(row_len, rows, importance, out),
        GgmlType::Q5_1 => plain_or_searched::<q5_1::Q5_1>(row_len, rows, importance, out),
        GgmlType::Q8_0 => small_block::quantize::<q8_0::Q8_0, _>(rows, out),
        GgmlType::IQ4_NL => {
            searched_block::quantize::<iq4_nl::IQ4NL>(row_len, rows, importance, out)
        }
        GgmlType::MXFP4 => small_block::quantize::<mxfp4::MXFP4, _>(rows, out),
        GgmlType::TQ1_0 => small_block::quantize::<tq1_0::TQ1_0, _>(rows, out),
        GgmlType::TQ2_0 => small_block::quantize::<tq2_0::TQ2_0, _>(rows, out),
        GgmlType::Q2_K => super_block::quantize::<q2_k::Q2_K>(rows, row_len, importance, out),
        GgmlType::Q3_K => super_block::quantize::<q3_k::Q3_K>(rows, row_len, importance, out),
        GgmlType::Q4_K => super_block::quantize::<q4_k::Q4_K>(rows, row_len, importance, out),
        GgmlType::Q5_K => super_block::quantize::<q5_k::Q5_K>(rows, row_len, importance, out),
        GgmlType::Q6_K => super_block::quantize::<q6_k::Q6_K>(rows, row_len, importance, out),
        GgmlType::IQ4_XS => super_block::quantize::<iq4_xs::IQ4_XS>(rows, row_len, importance, out),
        _ => panic!("{ty} cannot be quantized to"),
    }
}

/// Without importance the scale follows from the extremes, as in ggml; with it, it is searched.
fn plain_or_searched<T: PlainType<32> + SearchedType>(
    row_len: usize,
    rows: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    match importance {
        None => small_block::quantize::<T, 32>(rows, out),
        Some(_) => searched_block::quantize::<T>(row_len, rows, importance, out),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, marker::PhantomData};

    use half::f16;
    use pulp::{Scalar, WithSimd};
    use safetensors::SafeTensors;

    use super::*;
    use crate::formats::block::dequantize;

    const REFERENCE: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fixtures/reference/quantize/quantize.safetensors"
    );

    /// The largest error of a weight (half a step, and what rounding the scale to f16 adds), relative to the largest magnitude in its block; types not listed
    /// have a test of their own.
    const TOLERANCES: [(GgmlType, f32); 11] = [
        (GgmlType::F32, 0.0),
        (GgmlType::F16, 1.0 / 2048.0),
        (GgmlType::BF16, 1.0 / 256.0),
        (GgmlType::Q8_0, 1.13 / 254.0),
        (GgmlType::Q5_1, 1.2 / 31.0),
        (GgmlType::Q5_0, 1.05 / 16.0),
        (GgmlType::Q4_1, 1.2 / 15.0),
        (GgmlType::Q4_0, 1.05 / 8.0),
        (GgmlType::MXFP4, 0.25),
        (GgmlType::TQ1_0, 0.501),
        (GgmlType::TQ2_0, 0.501),
    ];

    /// Half the distance of f16 subnormals, times the largest code.
    const SUBNORMAL: f32 = 127.0 / (1 << 25) as f32;

    struct Reference(Vec<u8>);

    impl Reference {
        fn open() -> Self {
            Self(fs::read(REFERENCE).unwrap())
        }

        fn bytes(&self, name: &str) -> Option<Vec<u8>> {
            let tensors = SafeTensors::deserialize(&self.0).unwrap();
            tensors
                .tensor(name)
                .ok()
                .map(|tensor| tensor.data().to_vec())
        }

        fn floats(&self, name: &str) -> Vec<f32> {
            let bytes = self.bytes(name).unwrap();
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect()
        }
    }

    fn types() -> impl Iterator<Item = GgmlType> {
        GgmlType::all().filter(|ty| can_quantize(*ty))
    }

    fn quantized(
        ty: GgmlType,
        row_len: usize,
        rows: &[f32],
        importance: Option<&[f32]>,
    ) -> (Vec<u8>, u64) {
        let mut out = vec![0xaa; ty.bytes_for(rows.len() as u64).unwrap() as usize];
        let overflow = quantize_rows(ty, row_len, rows, importance, &mut out);
        (out, overflow.0)
    }

    fn dequantized(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_elements()];
        dequantize(ty, bytes, &mut out).unwrap();
        out
    }

    /// Rows of 512 that are normal, heavy-tailed, of one sign, and tiny beside large.
    fn samples() -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        (0..4 * 512)
            .map(|i| match (i / 512, normal()) {
                (0, x) => 0.02 * x,
                (1, x) => 0.02 * x * x * x,
                (2, x) => x.abs(),
                (_, x) => x * if i % 64 < 32 { 1e-3 } else { 10.0 },
            })
            .collect()
    }

    fn importance() -> Vec<f32> {
        (0..512)
            .map(|i| 1.0 + (i * 37 % 101) as f32 / 10.0)
            .collect()
    }

    /// Weighted squared error; `e` is the energy in the weight of an error.
    fn error(x: &[f32], y: &[f32], importance: Option<&[f32]>, e: impl Fn(usize) -> f64) -> f64 {
        let columns = importance.map_or(1, <[f32]>::len);
        let weight = |i: usize, x: f64| match importance {
            None => x * x,
            Some(importance) => f64::from(importance[i % columns]) * (e(i) + x * x).sqrt(),
        };
        let pairs = x.iter().zip(y).map(|(x, y)| (f64::from(*x), f64::from(*y)));
        pairs
            .enumerate()
            .map(|(i, (x, y))| weight(i, x) * (x - y) * (x - y))
            .sum()
    }

    fn mean_square(x: &[f32]) -> f64 {
        x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64
    }

    /// The error that the type minimizes over rows of 512.
    fn error_of(ty: GgmlType, x: &[f32], bytes: &[u8], importance: Option<&[f32]>) -> f64 {
        let y = dequantized(ty, bytes);
        error(x, &y, importance, |i| match ty {
            GgmlType::IQ4_NL => 2.0 * mean_square(&x[i / 32 * 32..][..32]),
            _ => mean_square(&x[i / 512 * 512..][..512]),
        })
    }

    #[test]
    fn extremes_give_the_bytes_of_ggml() {
        let reference = Reference::open();
        let rows = reference.floats("exact");
        let mut compared = 0;
        for ty in types() {
            let Some(expected) = reference.bytes(&format!("{ty}.exact")) else {
                continue;
            };
            let (bytes, overflow) = quantized(ty, 1024, &rows, None);
            let blocks = bytes
                .chunks(ty.block_bytes())
                .zip(expected.chunks(ty.block_bytes()));
            for (block, (ours, theirs)) in blocks.enumerate() {
                let x = &rows[block * ty.block_elements()..][..ty.block_elements()];
                assert_eq!(ours, theirs, "{ty} block {block}: {x:?}");
            }
            assert_eq!(overflow, 0, "{ty}");
            compared += 1;
        }
        assert_eq!(compared, 10);
    }

    #[test]
    fn searches_beat_ggml() {
        let reference = Reference::open();
        let (rows, importance) = (reference.floats("searched"), reference.floats("importance"));
        let check = |ty: GgmlType, kind: &str, importance: Option<&[f32]>| {
            let expected = reference.bytes(&format!("{ty}.{kind}")).unwrap();
            let (bytes, _) = quantized(ty, 512, &rows, importance);
            let ours = error_of(ty, &rows, &bytes, importance);
            let theirs = error_of(ty, &rows, &expected, importance);
            assert!(ours < theirs, "{ty} {kind}: {ours} and {theirs}");
            // Four rows of one kind are a tensor.
            let tensor_bytes = bytes.len() / 3;
            let bytes = bytes
                .chunks(tensor_bytes)
                .zip(expected.chunks(tensor_bytes));
            for (tensor, (x, (ours, theirs))) in rows.chunks(4 * 512).zip(bytes).enumerate() {
                let ours = error_of(ty, x, ours, importance);
                let theirs = error_of(ty, x, theirs, importance);
                assert!(
                    ours < theirs * 1.001,
                    "{ty} {kind} tensor {tensor}: {ours} and {theirs}"
                );
            }
        };
        for ty in [
            GgmlType::Q4_0,
            GgmlType::Q4_1,
            GgmlType::Q5_0,
            GgmlType::Q5_1,
        ] {
            check(ty, "weighted", Some(&importance));
        }
        check(GgmlType::IQ4_NL, "plain", None);
        check(GgmlType::IQ4_NL, "weighted", Some(&importance));
    }

    /// Every f16 scale in reach, each with the nearest values, in f64.
    #[test]
    fn searches_come_close_to_every_scale_there_is() {
        let symmetric: [(GgmlType, Vec<f64>); 3] = [
            (GgmlType::Q4_0, (-8..8).map(f64::from).collect()),
            (GgmlType::Q5_0, (-16..16).map(f64::from).collect()),
            (
                GgmlType::IQ4_NL,
                crate::formats::block::IQ4_NL_VALUES.map(f64::from).to_vec(),
            ),
        ];
        let (rows, importance) = (&samples()[..1024], importance());
        for (ty, values) in symmetric {
            let (bytes, _) = quantized(ty, 512, rows, Some(&importance));
            let ours = error_of(ty, rows, &bytes, Some(&importance));
            let mut best = vec![0.0f32; rows.len()];
            for (block, (x, best)) in rows.chunks(32).zip(best.chunks_mut(32)).enumerate() {
                let e = match ty {
                    GgmlType::IQ4_NL => 2.0 * mean_square(x),
                    _ => mean_square(&rows[block / 16 * 512..][..512]),
                };
                let columns = &importance[block % 16 * 32..][..32];
                let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                let last = values.iter().fold(0.0f64, |a, v| a.max(v.abs()));
                let top = f16::from_f64(f64::from(largest) / last * 2.0).to_bits();
                let scales = (top.saturating_sub(2500)..=top).flat_map(|bits| {
                    let d = f16::from_bits(bits).to_f64();
                    [d, -d]
                });
                let rounded = |d: f64| -> Vec<f32> {
                    x.iter()
                        .map(|x| {
                            let distance = |v: &f64| (v * d - f64::from(*x)).abs();
                            let nearest = values
                                .iter()
                                .min_by(|a, b| distance(a).total_cmp(&distance(b)));
                            (nearest.unwrap() * d) as f32
                        })
                        .collect()
                };
                let error_of = |y: &Vec<f32>| error(x, y, Some(columns), |_| e);
                let nearest = scales
                    .map(rounded)
                    .min_by(|a, b| error_of(a).total_cmp(&error_of(b)))
                    .unwrap();
                best.copy_from_slice(&nearest);
            }
            let least = error(rows, &best, Some(&importance), |i| match ty {
                GgmlType::IQ4_NL => 2.0 * mean_square(&rows[i / 32 * 32..][..32]),
                _ => mean_square(&rows[i / 512 * 512..][..512]),
            });
            assert!(
                ours < 1.03 * least && ours > 0.999 * least,
                "{ty}: {ours}, at least {least}"
            );
        }
    }

    #[test]
    fn errors_stay_within_half_a_step() {
        let rows = samples();
        for (ty, tolerance) in TOLERANCES {
            let (bytes, overflow) = quantized(ty, 512, &rows, None);
            assert_eq!(overflow, 0, "{ty}");
            let y = dequantized(ty, &bytes);
            let block = ty.block_elements();
            for (x, y) in rows.chunks(block).zip(y.chunks(block)) {
                let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                let bound = tolerance * largest + SUBNORMAL;
                for (x, y) in x.iter().zip(y) {
                    assert!(
                        (x - y).abs() <= bound,
                        "{ty}: {x} became {y}, largest {largest}"
                    );
                }
            }
        }
    }

    #[test]
    fn rows_give_the_same_bytes_alone_and_together() {
        let (rows, importance) = (samples(), importance());
        for ty in types() {
            for importance in [None, Some(&importance[..])] {
                let (together, _) = quantized(ty, 512, &rows, importance);
                let alone = rows
                    .chunks(512)
                    .flat_map(|row| quantized(ty, 512, row, importance).0);
                assert!(alone.eq(together.iter().copied()), "{ty}");
            }
        }
    }

    #[test]
    fn every_cpu_gives_the_same_bytes() {
        fn plain<T: PlainType<N>, const N: usize>(rows: &[f32]) {
            let mut expected = vec![0u8; rows.len() / N * size_of::<T::Block>()];
            let mut out = expected.clone();
            let _ = small_block::quantize::<T, N>(rows, &mut expected);
            let blocks = bytemuck::cast_slice_mut(&mut out);
            let _ = small_block::Run::<T, N> { rows, out: blocks }.with_simd(Scalar);
            assert_eq!(out, expected);
        }
        fn searched<T: SearchedType>(rows: &[f32], importance: Option<&[f32]>) {
            let mut expected = vec![0u8; rows.len() / 32 * size_of::<T::Block>()];
            let mut out = expected.clone();
            let _ = searched_block::quantize::<T>(512, rows, importance, &mut expected);
            let blocks = bytemuck::cast_slice_mut(&mut out);
            let run = searched_block::Run::<T> {
                row_len: 512,
                rows,
                importance,
                out: blocks,
                ty: PhantomData,
            };
            let _ = run.with_simd(Scalar);
            assert_eq!(out, expected);
        }
        let (rows, importance) = (samples(), importance());
        plain::<q4_0::Q4_0, 32>(&rows);
        plain::<q4_1::Q4_1, 32>(&rows);
        plain::<q5_0::Q5_0, 32>(&rows);
        plain::<q5_1::Q5_1, 32>(&rows);
        plain::<q8_0::Q8_0, 32>(&rows);
        plain::<mxfp4::MXFP4, 32>(&rows);
        plain::<tq1_0::TQ1_0, 256>(&rows);
        plain::<tq2_0::TQ2_0, 256>(&rows);
        searched::<iq4_nl::IQ4NL>(&rows, None);
        searched::<iq4_nl::IQ4NL>(&rows, Some(&importance));
        searched::<q4_0::Q4_0>(&rows, Some(&importance));
        searched::<q4_1::Q4_1>(&rows, Some(&importance));
        searched::<q5_0::Q5_0>(&rows, Some(&importance));
        searched::<q5_1::Q5_1>(&rows, Some(&importance));
    }

    #[test]
    fn zeros_stay_zeros() {
        for ty in types() {
            for importance in [None, Some(&[0.0f32; 512][..])] {
                let (bytes, overflow) = quantized(ty, 512, &[0.0; 1024], importance);
                assert_eq!(overflow, 0, "{ty}");
                assert!(dequantized(ty, &bytes).iter().all(|y| *y == 0.0), "{ty}");
            }
        }
    }

    #[test]
    fn values_at_the_ends_of_f32_do_no_harm() {
        let ends = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            1e-45,
            -1e-40,
            1.0,
        ];
        let mut rows = samples();
        for (i, x) in rows.iter_mut().step_by(5).enumerate() {
            *x = ends[i / 7 % 8];
        }
        let mut strange = importance();
        for (i, value) in strange.iter_mut().step_by(3).enumerate() {
            *value = ends[i % 8];
        }
        for ty in types() {
            for importance in [None, Some(&strange[..])] {
                let (bytes, _) = quantized(ty, 512, &rows, importance);
                let again = quantized(ty, 512, &rows, importance).0;
                assert_eq!(bytes, again, "{ty}");
            }
        }
    }

    #[test]
    fn scales_beyond_f16_are_counted() {
        let mut rows = vec![0.5; 512];
        // Two blocks of 32, one of 256.
        rows[3] = 1e7;
        rows[40] = -2e7;
        let check = |ty: GgmlType, plain: u64, weighted: u64| {
            assert_eq!(quantized(ty, 512, &rows, None).1, plain, "{ty}");
            assert_eq!(
                quantized(ty, 512, &rows, Some(&importance())).1,
                weighted,
                "{ty} with importance"
            );
        };
        check(GgmlType::F32, 0, 0);
        check(GgmlType::BF16, 0, 0);
        check(GgmlType::F16, 2, 2);
        check(GgmlType::Q8_0, 2, 2);
        check(GgmlType::Q5_0, 2, 2);
        check(GgmlType::Q4_0, 2, 2);
        // Scale and, where the extreme is negative, offset; the search also moves the other offset out.
        check(GgmlType::Q4_1, 3, 4);
        check(GgmlType::Q5_1, 3, 4);
        check(GgmlType::IQ4_NL, 2, 2);
        check(GgmlType::MXFP4, 0, 0);
        check(GgmlType::TQ1_0, 1, 1);
        check(GgmlType::TQ2_0, 1, 1);
        rows[3] = 65519.0;
        rows[40] = f32::MAX;
        let check = |ty, expected| assert_eq!(quantized(ty, 512, &rows, None).1, expected, "{ty}");
        check(GgmlType::F16, 1);
        check(GgmlType::BF16, 1);
        check(GgmlType::Q8_0, 1);
    }
}
