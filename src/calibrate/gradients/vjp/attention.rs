//! Backwards through causal grouped-query attention.
//!
//! With `p = softmax(s)`, `s_j = q . k_j / sqrt(head_dim)` and `o = sum_j p_j v_j`: `dv_j = p_j do`, `dp_j = do . v_j`,
//! `ds_j = p_j (dp_j - sum_i p_i dp_i)`, `dq = sum_j ds_j k_j / sqrt(head_dim)`, `dk_j = ds_j q / sqrt(head_dim)`.

use std::ops::Range;

use super::Assembly;
use crate::backend::AttentionShape;
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::multiversion::multiversion;
use crate::backend::cpu::{dot, exp};
use crate::parallel;

/// Gradients at the inputs.
#[derive(Debug)]
pub struct AttentionGradient {
    /// `[rows, heads * head_dim]`.
    pub query: Vec<f32>,
    /// `[rows, key_value_heads * head_dim]`.
    pub keys: Vec<f32>,
    /// The same.
    pub values: Vec<f32>,
}

/// Inputs of attention, as [`crate::backend::Backend::attention`] takes them, and the gradient at its output.
pub struct Attention<'a> {
    /// `[rows, heads * head_dim]`.
    pub query: &'a [f32],
    /// `[rows, key_value_heads * head_dim]`.
    pub keys: &'a [f32],
    /// The same.
    pub values: &'a [f32],
    /// Sizes.
    pub shape: AttentionShape,
    /// `[rows, heads * head_dim]`.
    pub gradient: &'a [f32],
}

/// The gradients at queries, keys and values.
pub fn attention(inputs: &Attention, sequences: &[Range<usize>]) -> AttentionGradient {
    let shape = inputs.shape;
    let (width, cache_width) = (inputs.width(), inputs.cache_width());
    let rows = inputs.query.len() / width;
    let items = sequences.iter().flat_map(|rows| {
        let heads = 0..shape.heads;
        heads.map(move |head| (rows.clone(), head))
    });
    let items: Vec<_> = items.collect();
    let isa = Isa::detect();
    let found = parallel::map(&items, |(rows, head)| {
        attend(isa, inputs, rows.clone(), *head)
    });
    let mut query = Assembly::new(rows, width);
    let mut keys = Assembly::new(rows, cache_width);
    let mut values = Assembly::new(rows, cache_width);
    for ((rows, head), found) in items.into_iter().zip(found) {
        let shared = inputs.key_value_head(head) * shape.head_dim;
        query.add(
            rows.start,
            head * shape.head_dim,
            &found.query,
            shape.head_dim,
        );
        keys.add(rows.start, shared, &found.keys, shape.head_dim);
        values.add(rows.start, shared, &found.values, shape.head_dim);
    }
    AttentionGradient {
        query: query.values,
        keys: keys.values,
        values: values.values,
    }
}

multiversion! {
    fn attend(inputs: &Attention<'_>, rows: Range<usize>, head: usize) -> AttentionGradient = Attention::head;
}

impl Attention<'_> {
    fn width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn cache_width(&self) -> usize {
        self.shape.key_value_heads * self.shape.head_dim
    }

    fn key_value_head(&self, head: usize) -> usize {
        head / (self.shape.heads / self.shape.key_value_heads)
    }

    /// One query head of one sequence, `[tokens, head_dim]` each.
    #[inline(always)]
    fn head(&self, rows: Range<usize>, head: usize) -> AttentionGradient {
        let head_dim = self.shape.head_dim;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let own = |row: usize| row * self.width() + head * head_dim;
        let shared = |row: usize| row * self.cache_width() + self.key_value_head(head) * head_dim;
        let key = |at: usize| &self.keys[shared(rows.start + at)..][..head_dim];
        let value = |at: usize| &self.values[shared(rows.start + at)..][..head_dim];
        let zeros = vec![0.0; rows.len() * head_dim];
        let mut out = AttentionGradient {
            query: zeros.clone(),
            keys: zeros.clone(),
            values: zeros,
        };
        for (t, row) in rows.clone().enumerate() {
            let q = &self.query[own(row)..][..head_dim];
            let gradient = &self.gradient[own(row)..][..head_dim];
            let shares = shares((0..=t).map(|at| dot(q, key(at)) * scale));
            let slopes: Vec<f32> = (0..=t).map(|at| dot(gradient, value(at))).collect();
            let mean = dot(&shares, &slopes);
            let at_query = &mut out.query[t * head_dim..][..head_dim];
            for (at, (share, slope)) in shares.iter().zip(&slopes).enumerate() {
                let at_score = share * (slope - mean) * scale;
                let part = at * head_dim..(at + 1) * head_dim;
                add(at_query, at_score, key(at));
                add(&mut out.keys[part.clone()], at_score, q);
                add(&mut out.values[part], *share, gradient);
            }
        }
        out
    }
}

/// Softmax.
#[inline(always)]
fn shares(scores: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut shares: Vec<f32> = scores.collect();
    let max = shares.iter().fold(f32::NEG_INFINITY, |a, x| a.max(*x));
    shares
        .iter_mut()
        .for_each(|score| *score = exp(*score - max));
    let total: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= total);
    shares
}

#[inline(always)]
fn add(sums: &mut [f32], factor: f32, values: &[f32]) {
    let sums = sums.iter_mut().zip(values);
    sums.for_each(|(sum, value)| *sum += factor * value);
}

#[cfg(test)]
mod tests {
    use super::super::differences::{check, values, widened};
    use super::*;
    use crate::backend::AttentionArithmetic;

    const SHAPE: AttentionShape = AttentionShape {
        heads: 4,
        key_value_heads: 2,
        head_dim: 6,
        arithmetic: AttentionArithmetic::F32,
    };
    const SEQUENCES: [Range<usize>; 2] = [0..2, 2..9];

    fn loss(query: &[f64], keys: &[f64], values: &[f64], gradient: &[f32]) -> f64 {
        let dim = SHAPE.head_dim;
        let mut sum = 0.0;
        for (sequence, head) in SEQUENCES
            .iter()
            .flat_map(|rows| (0..4).map(move |head| (rows, head)))
        {
            for row in sequence.clone() {
                let own = (row * 4 + head) * dim;
                let shared = |at: usize| (at * 2 + head / 2) * dim;
                let along = |at: usize, c: usize| query[own + c] * keys[shared(at) + c];
                let score = |at| (0..dim).map(|c| along(at, c)).sum::<f64>() / 6_f64.sqrt();
                let weights = (sequence.start..=row).map(|at| (at, f64::exp(score(at))));
                let weights: Vec<(usize, f64)> = weights.collect();
                let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
                for (at, weight) in weights {
                    let outside = |c: usize| values[shared(at) + c] * f64::from(gradient[own + c]);
                    sum += weight / total * (0..dim).map(outside).sum::<f64>();
                }
            }
        }
        sum
    }

    #[test]
    fn heads_share_keys_and_see_no_future() {
        let (query, gradient) = (values(9 * 24, 1), values(9 * 24, 2));
        let (keys, contents) = (values(9 * 12, 3), values(9 * 12, 4));
        let inputs = Attention {
            query: &query,
            keys: &keys,
            values: &contents,
            shape: SHAPE,
            gradient: &gradient,
        };
        let found = attention(&inputs, &SEQUENCES);
        let (q, k, v) = (widened(&query), widened(&keys), widened(&contents));
        check(&query, &found.query, |q| loss(q, &k, &v, &gradient));
        check(&keys, &found.keys, |k| loss(&q, k, &v, &gradient));
        check(&contents, &found.values, |v| loss(&q, &k, v, &gradient));
    }
}
