//! How a runtime takes the input of a matrix product: as it is, rounded, or quantized on the fly.
//!
//! Enters: f32 rows. Leaves: the same rows as the runtime would see them. Knows no weights.

use half::{bf16, f16};
use nemoconv_formats::GgmlType;

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
}

/// Elements of a block of [`Activation::Q8_0`] and [`Activation::Q8_1`].
pub const Q8_0_BLOCK: usize = 32;
/// Elements of a block of [`Activation::Q8K`].
pub const Q8_K_BLOCK: usize = 256;

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
            _ => true,
        }
    }

    /// Replaces a row by what the runtime sees of it.
    ///
    /// The F16 sums of [`Self::Q8_1`] are not part of the row; see [`block_q8_1_sum`].
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
        }
    }
}

fn max_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, x| x.abs().max(max))
}

fn round_to_scale(row: &mut [f32], scale: f32) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    row.iter_mut()
        .for_each(|x| *x = (*x * inverse).round_ties_even().clamp(-128.0, 127.0) * scale);
}

/// Codes and scale of one block of 32.
///
/// Source: ggml `quantize_row_q8_0` (x86): scale is the largest magnitude over 127, codes round to even.
pub fn quantize_q8_0(values: &[f32], codes: &mut [i8]) -> f16 {
    let (d, inverse) = scale_q8_0(values);
    for (code, x) in codes.iter_mut().zip(values) {
        *code = (x * inverse).round_ties_even() as i8;
    }
    f16::from_f32(d)
}

fn scale_q8_0(values: &[f32]) -> (f32, f32) {
    let max = max_magnitude(values);
    (max / 127.0, if max > 0.0 { 127.0 / max } else { 0.0 })
}

/// The F16 product of scale and sum of codes that Q8_1 keeps for types with a minimum.
///
/// Source: ggml `quantize_row_q8_1` (x86): the scale is not rounded before it is multiplied.
pub fn block_q8_1_sum(values: &[f32], codes: &[i8]) -> f16 {
    let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
    f16::from_f32(scale_q8_0(values).0 * sum as f32)
}

/// Codes and scale of one block of 256.
///
/// Source: ggml `quantize_row_q8_K_ref`: the value of largest magnitude gets the code -127.
pub fn quantize_q8_k(values: &[f32], codes: &mut [i8]) -> f32 {
    let mut extreme = 0.0_f32;
    for &x in values {
        if x.abs() > extreme.abs() {
            extreme = x;
        }
    }
    if extreme == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -127.0 / extreme;
    for (code, x) in codes.iter_mut().zip(values) {
        *code = (x * inverse).round_ties_even().min(127.0) as i8;
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
}
