//! Rewrites after which floats hold what they held: norms become short floats, tensors that stay floats are left alone.
//!
//! Enters: chosen rewrites, the model, the tensors that are not quantized. Leaves: rewrites after which every norm is a
//! number of eight significant bits, which BF16, F16 and F32 store without loss, and that change other floats by powers of
//! two only. What a norm gains by that its readers lose exactly, before they are quantized.

use super::Rewrites;
use super::spaces::FINAL_NORM;
use crate::artifact::StoredModel;
use crate::error::Result;

/// Bits of an F64's fraction that a number of eight significant bits has not.
const SPARE_BITS: u32 = 45;

impl Rewrites {
    /// Takes back what would round a tensor of `floats`, and moves scales to the nearest that round none. With a rotation of
    /// the stream every tensor changes, and nothing is done.
    ///
    /// # Errors
    /// A norm cannot be read.
    pub(super) fn spare_floats(&mut self, model: &StoredModel, floats: &[String]) -> Result<()> {
        if self.rotation.is_some() {
            return Ok(());
        }
        let stays_float = |tensor: &String| floats.contains(tensor);
        self.spaces
            .retain(|producer, _| !matrices_around(producer).iter().any(stays_float));
        for (producer, space) in &mut self.spaces {
            let Some(scales) = &mut space.scale else {
                continue;
            };
            match Sparing::of(model, producer)? {
                Sparing::Nothing => {}
                Sparing::PowersOf(step) => round_scales(scales, step),
                Sparing::FoldedNorm => scales.iter_mut().for_each(|s| *s = exact_scale(1.0, *s)),
                Sparing::Norm(weights) => {
                    let pairs = scales.iter_mut().zip(weights);
                    pairs.for_each(|(s, weight)| *s = exact_scale(weight, *s));
                }
            }
        }
        Ok(())
    }
}

/// What scales of a space must spare.
enum Sparing {
    /// Both sides are quantized.
    Nothing,
    /// A bias among the rows, or a router among the readers: a power of `2^step` changes them without loss.
    PowersOf(i32),
    /// A norm that becomes the scale's reciprocal.
    FoldedNorm,
    /// A norm that is divided by the scale.
    Norm(Vec<f32>),
}

impl Sparing {
    fn of(model: &StoredModel, producer: &str) -> Result<Self> {
        let values = |name: &str| -> Result<Option<Vec<f32>>> {
            let Some(tensor) = model.tensor(name) else {
                return Ok(None);
            };
            let mut values = vec![0.0; tensor.rows * tensor.columns];
            model.dequantize_rows(tensor, 0, 0, &mut Vec::new(), &mut values)?;
            Ok(Some(values))
        };
        let (block, stem) = producer.rsplit_once('.').unwrap_or(("", producer));
        let is_there = |name: &str| model.tensor(&format!("{block}.{name}")).is_some();
        Ok(match stem {
            "ssm_norm" => {
                values(&format!("{producer}.weight"))?.map_or(Self::PowersOf(1), Self::Norm)
            }
            FINAL_NORM => Self::FoldedNorm,
            "attn_norm" if is_there("ffn_gate_inp.weight") => Self::PowersOf(1),
            "attn_norm" => Self::FoldedNorm,
            // Before relu2 rows carry the square root of a scale.
            "ffn_up" if is_there("ffn_up.bias") => Self::PowersOf(2),
            "attn_k" if is_there("attn_k.bias") || is_there("attn_q.bias") => Self::PowersOf(1),
            "attn_v" if is_there("attn_v.bias") => Self::PowersOf(1),
            _ => Self::Nothing,
        })
    }
}

/// The scale nearest to `scale` by which `weight` becomes a short float.
fn exact_scale(weight: f32, scale: f64) -> f64 {
    let weight = f64::from(weight.abs());
    let short = nearest_short(weight / scale);
    if weight > 0.0 && short > 0.0 {
        weight / short
    } else {
        scale
    }
}

/// The nearest number of eight significant bits, ties to even; `x` is positive.
fn nearest_short(x: f64) -> f64 {
    let (bits, unit) = (x.to_bits(), 1_u64 << SPARE_BITS);
    let odd = bits >> SPARE_BITS & 1;
    f64::from_bits((bits + (unit / 2 - 1) + odd) & !(unit - 1))
}

/// The matrices whose rows or columns a space changes by more than their order.
fn matrices_around(producer: &str) -> Vec<String> {
    let Some((block, stem)) = producer.rsplit_once('.').filter(|_| producer != FINAL_NORM) else {
        return vec!["output.weight".into()];
    };
    let stems: &[&str] = match stem {
        "attn_norm" => &[
            "ssm_in",
            "attn_q",
            "attn_k",
            "attn_v",
            "ffn_up",
            "ffn_up_exps",
            "ffn_up_shexp",
            "ffn_latent_down",
        ],
        "ssm_norm" => &["ssm_out"],
        "attn_k" => &["attn_k", "attn_q"],
        "attn_v" => &["attn_v", "attn_output"],
        "ffn_up" => &["ffn_up", "ffn_down"],
        "ffn_up_exps" => &["ffn_up_exps", "ffn_down_exps"],
        "ffn_up_shexp" => &["ffn_up_shexp", "ffn_down_shexp"],
        "ffn_latent_down" => &["ffn_latent_down", "ffn_up_exps"],
        _ => &["ffn_down_exps", "ffn_latent_up"],
    };
    stems
        .iter()
        .map(|stem| format!("{block}.{stem}.weight"))
        .collect()
}

/// The nearest power of `2^step` by ratio.
fn round_scales(scales: &mut [f64], step: i32) {
    for scale in scales {
        *scale = nearest_power(*scale, step);
    }
}

/// `x` is normal and positive.
fn nearest_power(x: f64, step: i32) -> f64 {
    const BIAS: i32 = 1023;
    let exponent = (x.to_bits() >> 52) as i32 - BIAS;
    let below = exponent.div_euclid(step) * step;
    let power = |exponent: i32| f64::from_bits(((exponent + BIAS) as u64) << 52);
    let (low, high) = (power(below), power(below + step));
    // As far from one as from the other: their geometric mean.
    if x * x < low * high { low } else { high }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_nearest_by_ratio() {
        let check = |x: f64, step, expected: f64| assert_eq!(nearest_power(x, step), expected);
        check(1.0, 1, 1.0);
        check(1.41, 1, 1.0);
        check(1.42, 1, 2.0);
        check(0.3, 1, 0.25);
        check(1.9, 2, 1.0);
        check(2.1, 2, 4.0);
        check(0.51, 2, 1.0);
        check(0.49, 2, 0.25);
    }

    #[test]
    fn short_floats_have_eight_bits() {
        let check = |x: f64, expected: f64| assert_eq!(nearest_short(x), expected);
        check(1.0, 1.0);
        check(1.0 + 1.0 / 256.0, 1.0);
        check(1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0);
        check(1.999, 2.0);
        check(0.7, 179.0 / 256.0);
    }

    #[test]
    fn a_norm_divided_by_its_scale_is_short() {
        for (weight, scale) in [(1.0_f32, 0.3), (-3.7, 1.9), (0.02, 17.0)] {
            let exact = exact_scale(weight, scale);
            assert!((exact / scale - 1.0).abs() <= 1.0 / 256.0);
            let quotient = (f64::from(weight) / exact) as f32;
            assert_eq!(quotient.to_bits() & 0xffff, 0, "{weight} / {scale}");
        }
        assert_eq!(exact_scale(0.0, 0.3), 0.3);
    }
}
