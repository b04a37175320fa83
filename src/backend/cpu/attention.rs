//! Causal grouped-query attention without positions: `softmax(q k^T / sqrt(head_dim)) v`.

use std::ops::Range;

use rayon::prelude::*;

use super::elementwise::{dot, exp, round_to_f16};
use super::kernels::Isa;
use super::multiversion::multiversion;
use super::shared_rows::SharedRows;
use crate::backend::{AttentionArithmetic, AttentionShape, KeyValues, Segment};

/// Query rows of one task.
const PART_ROWS: usize = 16;

/// Gives `[rows, heads * head_dim]` and appends keys and values to the caches.
pub fn attention(
    isa: Isa,
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    shape: AttentionShape,
    segments: &mut [Segment<'_, KeyValues<Vec<f32>>>],
) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let cache_width = shape.key_value_heads * shape.head_dim;
    for segment in segments.iter_mut() {
        let part = segment.rows.start * cache_width..segment.rows.end * cache_width;
        append(
            &mut segment.state.keys,
            &keys[part.clone()],
            shape.arithmetic,
        );
        append(&mut segment.state.values, &values[part], shape.arithmetic);
    }
    let mut out = vec![0.0; query.len()];
    let shared = SharedRows::new(&mut out, width);
    let mut tasks = Vec::new();
    for segment in segments.iter() {
        for first in segment.rows.clone().step_by(PART_ROWS) {
            let rows = first..(first + PART_ROWS).min(segment.rows.end);
            tasks.extend((0..shape.key_value_heads).map(|head| (segment, rows.clone(), head)));
        }
    }
    let group = shape.heads / shape.key_value_heads;
    tasks
        .into_par_iter()
        .for_each_init(Vec::new, |scores, (segment, rows, kv_head)| {
            for row in rows {
                let seen = segment.position + row - segment.rows.start + 1;
                for head in kv_head * group..(kv_head + 1) * group {
                    let q = &query[row * width + head * shape.head_dim..][..shape.head_dim];
                    // SAFETY: a head of a row is written by this task alone.
                    let out = unsafe { shared.part(row, head * shape.head_dim, shape.head_dim) };
                    let cache = Cache {
                        of: &*segment.state,
                        width: cache_width,
                        first: kv_head * shape.head_dim,
                    };
                    match shape.arithmetic {
                        AttentionArithmetic::F32 => attend(isa, &cache, q, seen, scores, out),
                        AttentionArithmetic::F16 => {
                            attend_f16(isa, &cache, q, seen, scores, out);
                        }
                    }
                }
            }
        });
    out
}

fn append(cache: &mut Vec<f32>, rows: &[f32], arithmetic: AttentionArithmetic) {
    match arithmetic {
        AttentionArithmetic::F32 => cache.extend_from_slice(rows),
        AttentionArithmetic::F16 => cache.extend(rows.iter().map(|x| round_to_f16(*x))),
    }
}

multiversion! {
    fn attend(cache: &Cache<'_>, q: &[f32], seen: usize, scores: &mut Vec<f32>, out: &mut [f32]) = Cache::attend;
}

multiversion! {
    fn attend_f16(cache: &Cache<'_>, q: &[f32], seen: usize, rounded: &mut Vec<f32>, out: &mut [f32]) = Cache::attend_f16;
}

/// One key-value head of a cache.
struct Cache<'a> {
    of: &'a KeyValues<Vec<f32>>,
    width: usize,
    first: usize,
}

impl Cache<'_> {
    /// Where the head of position `at` is.
    #[inline(always)]
    fn row(&self, at: usize, head_dim: usize) -> Range<usize> {
        let begin = at * self.width + self.first;
        begin..begin + head_dim
    }

    /// One pass over the positions, as flash attention makes it: what was summed is scaled down whenever a larger score
    /// comes. Every sum is rounded to F16.
    ///
    /// Source: ggml b11434, `ggml_compute_forward_flash_attn_ext_f16` on CPU, per row of queries.
    #[inline(always)]
    fn attend_f16(&self, q: &[f32], seen: usize, rounded: &mut Vec<f32>, out: &mut [f32]) {
        let scale = 1.0 / (q.len() as f32).sqrt();
        rounded.clear();
        rounded.extend(q.iter().map(|x| round_to_f16(*x)));
        let (mut total, mut max) = (0.0_f32, f32::NEG_INFINITY);
        for at in 0..seen {
            let row = self.row(at, q.len());
            let score = dot(rounded, &self.of.keys[row.clone()]) * scale;
            let mut weight = 1.0;
            if score > max {
                let shrink = exp(max - score);
                max = score;
                total *= shrink;
                out.iter_mut()
                    .for_each(|out| *out = round_to_f16(*out * shrink));
            } else {
                weight = exp(score - max);
            }
            total += weight;
            for (out, v) in out.iter_mut().zip(&self.of.values[row]) {
                *out = round_to_f16(*out + weight * v);
            }
        }
        out.iter_mut().for_each(|out| *out /= total);
    }

    #[inline(always)]
    fn attend(&self, q: &[f32], seen: usize, scores: &mut Vec<f32>, out: &mut [f32]) {
        let scale = 1.0 / (q.len() as f32).sqrt();
        let row = |at: usize| self.row(at, q.len());
        scores.clear();
        let mut max = f32::NEG_INFINITY;
        for at in 0..seen {
            let score = dot(q, &self.of.keys[row(at)]) * scale;
            max = if score > max { score } else { max };
            scores.push(score);
        }
        scores
            .iter_mut()
            .for_each(|score| *score = exp(*score - max));
        let total: f32 = scores.iter().sum();
        for (at, score) in scores.iter().enumerate() {
            let weight = score / total;
            let value = &self.of.values[row(at)];
            out.iter_mut()
                .zip(value)
                .for_each(|(out, v)| *out += weight * v);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape {
        heads: 4,
        key_value_heads: 2,
        head_dim: 6,
        arithmetic: AttentionArithmetic::F32,
    };

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 29 + seed * 13) % 19) as f32 / 5.0 - 1.9)
            .collect()
    }

    fn run(pieces: &[usize], arithmetic: AttentionArithmetic) -> Vec<f32> {
        let shape = AttentionShape {
            arithmetic,
            ..SHAPE
        };
        let mut state = KeyValues::default();
        let (mut out, mut begin) = (Vec::new(), 0);
        let rows: usize = pieces.iter().sum();
        let (q, k, v) = (
            values(rows * 24, 1),
            values(rows * 12, 2),
            values(rows * 12, 3),
        );
        for &piece in pieces {
            let end = begin + piece;
            let segment = Segment {
                rows: 0..piece,
                position: begin,
                state: &mut state,
            };
            let part = |x: &[f32], width: usize| x[begin * width..end * width].to_vec();
            out.extend(attention(
                Isa::detect(),
                &part(&q, 24),
                &part(&k, 12),
                &part(&v, 12),
                shape,
                &mut [segment],
            ));
            begin = end;
        }
        out
    }

    #[test]
    fn it_is_a_weighted_mean_of_values() {
        let rows = 7;
        let (q, k, v) = (
            values(rows * 24, 1),
            values(rows * 12, 2),
            values(rows * 12, 3),
        );
        let found = run(&[rows], AttentionArithmetic::F32);
        for t in 0..rows {
            for head in 0..4 {
                let kv = head / 2;
                let score = |s: usize| {
                    let dot: f64 = (0..6)
                        .map(|i| {
                            f64::from(q[t * 24 + head * 6 + i]) * f64::from(k[s * 12 + kv * 6 + i])
                        })
                        .sum();
                    (dot / 6.0_f64.sqrt()).exp()
                };
                let total: f64 = (0..=t).map(score).sum();
                for i in 0..6 {
                    let expected: f64 = (0..=t)
                        .map(|s| score(s) / total * f64::from(v[s * 12 + kv * 6 + i]))
                        .sum();
                    let found = f64::from(found[t * 24 + head * 6 + i]);
                    assert!((found - expected).abs() < 1e-5, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn pieces_give_what_the_whole_gives() {
        for arithmetic in [AttentionArithmetic::F32, AttentionArithmetic::F16] {
            assert_eq!(run(&[3, 1, 1, 20], arithmetic), run(&[25], arithmetic));
        }
    }

    #[test]
    fn f16_is_near_and_not_the_same() {
        let (exact, f16) = (
            run(&[25], AttentionArithmetic::F32),
            run(&[25], AttentionArithmetic::F16),
        );
        let differences = exact.iter().zip(&f16).map(|(a, b)| (a - b).abs());
        let largest = differences.fold(0.0, f32::max);
        assert!(largest > 1e-5 && largest < 1e-2, "{largest}");
    }
}
