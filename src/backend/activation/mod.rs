//! How a runtime takes the input of a matrix product: as it is, rounded, or quantized on the fly.
//!
//! Enters: f32 rows. Leaves: the same rows as the runtime would see them. Knows no weights.

mod floats;

use half::{bf16, f16};
use nemoconv_formats::GgmlType;

use floats::{E2M1_MAX, E4M3_MAX, e2m1, e4m3};

/// What becomes of the activations before they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// Nothing: f32.
    None,
    /// Rounded to BF16.
    Bf16,
    /// Rounded to F16.
    F16,
    /// 8 bit per block of 32, scale in F16 (ggml's Q8_0).
    Q8_0,
    /// As [`Self::Q8_0`], with the sum of the block in F16 beside it (ggml's Q8_1); for types with a minimum.
    Q8_1,
    /// 8 bit per block of 256, scale in F32, the largest magnitude at -127 (ggml's Q8_K).
    Q8K,
    /// 8 bit symmetric with one F32 scale per token: dynamic W8A8 and W4A8 of packed safetensors.
    TokenInt8,
    /// 8 bit symmetric with this scale for every token: static W8A8.
    StaticInt8(f32),
    /// F8_E4M3 with one F32 scale per token: dynamic FP8.
    TokenFloat8,
    /// F8_E4M3 with this scale for every token: static FP8.
    StaticFloat8(f32),
    /// F8_E4M3 with one F32 scale per so many consecutive values: FP8 whose weights have block scales.
    GroupFloat8(usize),
    /// E2M1 with an F8_E4M3 scale per 16 values, in units of this: NVFP4.
    Nvfp4(f32),
}

/// Elements of a block of [`Activation::Q8_0`] and [`Activation::Q8_1`].
pub const Q8_0_BLOCK: usize = 32;
/// Elements of a block of [`Activation::Q8K`].
pub const Q8_K_BLOCK: usize = 256;
/// Elements of a block of [`Activation::Nvfp4`].
pub const NVFP4_BLOCK: usize = 16;

impl Activation {
    /// What llama.cpp's CPU and integer GPU kernels do for a weight type.
    ///
    /// Source: ggml b11434, `vec_dot_type` of each type in `ggml-cpu.c`.
    pub fn of_runtime(ty: GgmlType) -> Self {
        use GgmlType as T;
        match ty {
            T::BF16 => Self::Bf16,
            T::F16 => Self::F16,
            T::Q4_0 | T::Q5_0 | T::Q8_0 | T::IQ4_NL | T::MXFP4 | T::NVFP4 | T::Q1_0 | T::Q2_0 => {
                Self::Q8_0
            }
            T::Q4_1 | T::Q5_1 => Self::Q8_1,
            T::Q2_K | T::Q3_K | T::Q4_K | T::Q5_K | T::Q6_K | T::IQ4_XS | T::TQ1_0 | T::TQ2_0 => {
                Self::Q8K
            }
            _ => Self::None,
        }
    }

    /// Whether rows of this length can be taken so.
    pub fn fits(self, columns: usize) -> bool {
        match self {
            Self::Q8_0 | Self::Q8_1 => columns.is_multiple_of(Q8_0_BLOCK),
            Self::Q8K => columns.is_multiple_of(Q8_K_BLOCK),
            Self::GroupFloat8(group) => columns.is_multiple_of(group),
            Self::Nvfp4(_) => columns.is_multiple_of(NVFP4_BLOCK),
            _ => true,
        }
    }

    /// Replaces a row by what the runtime sees of it.
    ///
    /// The F16 sums of [`Self::Q8_1`] are not part of the row; see [`block_q8_1_sum`].
    #[inline(always)]
    pub fn round_trip(self, row: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Bf16 => row
                .iter_mut()
                .for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            Self::F16 => row.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            Self::Q8_0 | Self::Q8_1 => {
                for block in row.chunks_mut(Q8_0_BLOCK) {
                    let mut codes = [0; Q8_0_BLOCK];
                    let d = quantize_q8_0(block, &mut codes[..block.len()]).to_f32();
                    block
                        .iter_mut()
                        .zip(codes)
                        .for_each(|(x, code)| *x = d * f32::from(code));
                }
            }
            Self::Q8K => {
                for block in row.chunks_mut(Q8_K_BLOCK) {
                    let mut codes = [0; Q8_K_BLOCK];
                    let d = quantize_q8_k(block, &mut codes[..block.len()]);
                    block
                        .iter_mut()
                        .zip(codes)
                        .for_each(|(x, code)| *x = d * f32::from(code));
                }
            }
            Self::TokenInt8 => {
                let scale = max_magnitude(row) / 127.0;
                round_to_scale(row, scale);
            }
            Self::StaticInt8(scale) => round_to_scale(row, scale),
            Self::TokenFloat8 => round_to_float8(row, max_magnitude(row) / E4M3_MAX),
            Self::StaticFloat8(scale) => round_to_float8(row, scale),
            Self::GroupFloat8(group) => row
                .chunks_mut(group)
                .for_each(|block| round_to_float8(block, max_magnitude(block) / E4M3_MAX)),
            Self::Nvfp4(unit) => row
                .chunks_mut(NVFP4_BLOCK)
                .for_each(|block| round_to_nvfp4(block, unit)),
        }
    }
}

/// Compared as integers: compilers turn that into vectors, and a NaN is larger than every number.
#[inline(always)]
fn max_magnitude(values: &[f32]) -> f32 {
    let bits = values.iter().map(|x| x.to_bits() & 0x7fff_ffff);
    f32::from_bits(bits.fold(0, u32::max))
}

/// The nearest integer from -128 to 127, ties to even: the last byte of the sum with 1.5 * 2^23.
#[inline(always)]
fn nearest_code(x: f32) -> i8 {
    (x + 12_582_912.0).to_bits() as i8
}

fn round_to_scale(row: &mut [f32], scale: f32) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    row.iter_mut()
        .for_each(|x| *x = (*x * inverse).round_ties_even().clamp(-128.0, 127.0) * scale);
}

/// Source: `quantize` of compressed-tensors 0.19 (`lifecycle/forward.py`), and of vLLM's FP8 kernels.
fn round_to_float8(row: &mut [f32], scale: f32) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    row.iter_mut().for_each(|x| *x = e4m3(*x * inverse) * scale);
}

/// The scale of a block is its largest magnitude over 6, in units of `unit` rounded to F8_E4M3.
///
/// Source: NVIDIA's NVFP4 as vLLM's `scaled_fp4_quant` computes it.
fn round_to_nvfp4(block: &mut [f32], unit: f32) {
    let scale = e4m3(max_magnitude(block) / E2M1_MAX / unit) * unit;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    block
        .iter_mut()
        .for_each(|x| *x = e2m1(*x * inverse) * scale);
}

/// Codes and scale of one block of 32.
///
/// Source: ggml `quantize_row_q8_0` (x86): scale is the largest magnitude over 127, codes round to even.
#[inline(always)]
pub fn quantize_q8_0(values: &[f32], codes: &mut [i8]) -> f16 {
    let (d, inverse) = scale_q8_0(values);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = nearest_code(x * inverse);
    }
    f16::from_f32(d)
}

#[inline(always)]
fn scale_q8_0(values: &[f32]) -> (f32, f32) {
    let max = max_magnitude(values);
    (max / 127.0, if max > 0.0 { 127.0 / max } else { 0.0 })
}

/// The F16 product of scale and sum of codes that Q8_1 keeps for types with a minimum.
///
/// Source: ggml `quantize_row_q8_1` (x86): the scale is not rounded before it is multiplied.
#[inline(always)]
pub fn block_q8_1_sum(values: &[f32], codes: &[i8]) -> f16 {
    let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
    f16::from_f32(scale_q8_0(values).0 * sum as f32)
}

/// Codes and scale of one block of 256.
///
/// Source: ggml `quantize_row_q8_K_ref`: the value of largest magnitude gets the code -127.
#[inline(always)]
pub fn quantize_q8_k(values: &[f32], codes: &mut [i8]) -> f32 {
    let max = max_magnitude(values);
    let is_extreme = |x: &&f32| x.abs() == max;
    let extreme = values.iter().find(is_extreme).copied().unwrap_or(max);
    if extreme == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -127.0 / extreme;
    for (code, x) in codes.iter_mut().zip(values) {
        *code = nearest_code(x * inverse);
    }
    1.0 / inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Vec<f32> {
        (0..256)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0)
            .collect()
    }

    #[test]
    fn errors_are_half_a_step_at_most() {
        let check = |activation: Activation, step: f32| {
            let mut seen = row();
            activation.round_trip(&mut seen);
            let worst = seen.iter().zip(row()).map(|(a, b)| (a - b).abs());
            let worst = worst.fold(0.0, f32::max);
            assert!(
                worst <= 0.51 * step && worst > 0.1 * step,
                "{activation:?} {worst}"
            );
        };
        let max = 50.0 / 7.0;
        check(Activation::Q8_0, max / 127.0);
        check(Activation::Q8K, max / 127.0);
        check(Activation::TokenInt8, max / 127.0);
        check(Activation::StaticInt8(0.1), 0.1);
        check(Activation::Bf16, 4.0 / 128.0);
    }

    #[test]
    fn zeros_stay_zeros() {
        for activation in [Activation::Q8_0, Activation::Q8K, Activation::TokenInt8] {
            let mut zeros = [0.0; 256];
            activation.round_trip(&mut zeros);
            assert_eq!(zeros, [0.0; 256]);
        }
    }

    #[test]
    fn the_largest_magnitude_of_a_q8_k_block_is_minus_127() {
        let mut codes = [0; 256];
        let d = quantize_q8_k(&row(), &mut codes);
        assert!(codes.contains(&-127) && !codes.contains(&-128), "{d}");
    }

    /// Values of compressed-tensors, with the script that made them.
    #[test]
    fn small_floats_are_those_of_the_library() {
        let path = nemoconv_fixtures::reference().join("float_inputs/values.safetensors");
        let file = std::fs::read(path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let tensor = tensors.tensor(name).unwrap();
            let bytes = tensor.data().as_chunks().0.iter();
            bytes.map(|bytes| f32::from_le_bytes(*bytes)).collect()
        };
        let global_scale = values("global_scale")[0];
        for (name, activation) in [
            ("token", Activation::TokenFloat8),
            ("group", Activation::GroupFloat8(128)),
            ("static", Activation::StaticFloat8(0.01)),
            ("nvfp4", Activation::Nvfp4(1.0 / global_scale)),
        ] {
            let mut found = values("input");
            found
                .chunks_mut(256)
                .for_each(|row| activation.round_trip(row));
            let expected = values(name);
            let is_other = |(a, b): &(&f32, &f32)| (*a - *b).abs() > 1e-6 * b.abs();
            let others = found.iter().zip(&expected).filter(is_other).count();
            // A quotient in another last bit may fall on the other side of a tie.
            assert!(others <= 1, "{name}: {others} of {} differ", found.len());
        }
    }
}
