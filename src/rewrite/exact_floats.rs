//! Rewrites after which floats hold what they held: scales become powers of two, tensors that stay floats are left alone.
//!
//! Enters: chosen rewrites, the tensors that are not quantized. Leaves: rewrites that change those only by exact factors.
//! An artifact that keeps the checkpoint's BF16 can then store them without loss; norms become powers of two themselves.

use super::{Rewrites, Space};

impl Rewrites {
    /// Takes back what would round a tensor of `floats`, and rounds scales to powers of two. With a rotation of the stream
    /// every tensor changes, and nothing is done.
    pub(super) fn spare_floats(&mut self, floats: &[String]) {
        if self.rotation.is_some() {
            return;
        }
        let stays_float = |tensor: &String| floats.contains(tensor);
        self.spaces
            .retain(|producer, _| !matrices_around(producer).iter().any(stays_float));
        for (producer, space) in &mut self.spaces {
            // Rows before relu2 carry the square root of a scale.
            let step = if is_before_relu2(producer) { 2 } else { 1 };
            round_scales(space, step);
        }
    }
}

fn is_before_relu2(producer: &str) -> bool {
    producer.contains(".ffn_up")
}

/// The matrices whose rows or columns a space changes by more than their order; norms and convolution take powers of two.
fn matrices_around(producer: &str) -> Vec<String> {
    let Some((block, stem)) = producer
        .rsplit_once('.')
        .filter(|_| producer != super::spaces::FINAL_NORM)
    else {
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
fn round_scales(space: &mut Space, step: i32) {
    for scale in space.scale.iter_mut().flatten() {
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
    fn spaces_beside_floats_are_left_alone() {
        let mut rewrites = Rewrites::none();
        let scaled = |scale: f64| Space {
            scale: Some(vec![scale; 2]),
            ..Space::unchanged(1, 2)
        };
        for (producer, scale) in [
            ("blk.0.attn_norm", 3.0),
            ("blk.0.ssm_norm", 3.0),
            ("blk.1.attn_norm", 3.0),
            ("blk.1.ffn_up", 3.0),
            (super::super::spaces::FINAL_NORM, 3.0),
        ] {
            rewrites.spaces.insert(producer.into(), scaled(scale));
        }
        let floats = ["output.weight", "blk.0.ssm_in.weight"].map(String::from);
        rewrites.spare_floats(&floats);
        let left: Vec<_> = rewrites.spaces.keys().map(String::as_str).collect();
        assert_eq!(left, ["blk.0.ssm_norm", "blk.1.attn_norm", "blk.1.ffn_up"]);
        let scale = |producer: &str| rewrites.spaces[producer].scale.clone().unwrap()[0];
        assert_eq!(scale("blk.0.ssm_norm"), 4.0);
        assert_eq!(scale("blk.1.ffn_up"), 4.0);
    }
}
