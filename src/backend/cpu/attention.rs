//! Causal grouped-query attention without positions: `softmax(q k^T / sqrt(head_dim)) v`.

use std::ops::Range;

use super::elementwise::{LANES, dot, exp, round_to_f16};
use super::kernels::{self, Isa};
use super::multiversion::multiversion;
use super::shared_rows::SharedRows;
use crate::backend::{AttentionArithmetic, AttentionShape, KeyValues, Segment};
use crate::parallel;

/// Query rows of one task.
const PART_ROWS: usize = 16;
/// Heads of rows that share the keys and values that they read.
const TILE: usize = 8;

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
    let rounded: Vec<f32>;
    let query = match shape.arithmetic {
        AttentionArithmetic::F32 => query,
        AttentionArithmetic::F16 => {
            rounded = query.iter().map(|x| round_to_f16(*x)).collect();
            &rounded
        }
    };
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
    parallel::for_each(tasks, |(segment, rows, kv_head)| {
        let scratch = &mut Vec::new();
        let cache = Cache {
            of: &*segment.state,
            width: cache_width,
            first: kv_head * shape.head_dim,
        };
        let heads = kv_head * group..(kv_head + 1) * group;
        let places = rows.flat_map(|row| heads.clone().map(move |head| (row, head)));
        let queries = places.map(|(row, head)| Query {
            values: &query[row * width + head * shape.head_dim..][..shape.head_dim],
            seen: segment.position + row - segment.rows.start + 1,
            // SAFETY: a head of a row is written by this task alone.
            out: unsafe { shared.part(row, head * shape.head_dim, shape.head_dim) },
        });
        let mut queries: Vec<Query<'_>> = queries.collect();
        match shape.arithmetic {
            AttentionArithmetic::F32 => cache.attend(isa, &mut queries, scratch),
            AttentionArithmetic::F16 => {
                for query in &mut queries {
                    attend_f16(isa, &cache, isa, query, scratch);
                }
            }
        }
    });
    out
}

/// A head of a row.
struct Query<'a> {
    /// `[head_dim]`
    values: &'a [f32],
    /// How many positions it looks at.
    seen: usize,
    /// `[head_dim]`, zeros.
    out: &'a mut [f32],
}

fn append(cache: &mut Vec<f32>, rows: &[f32], arithmetic: AttentionArithmetic) {
    match arithmetic {
        AttentionArithmetic::F32 => cache.extend_from_slice(rows),
        AttentionArithmetic::F16 => cache.extend(rows.iter().map(|x| round_to_f16(*x))),
    }
}

multiversion! {
    fn attend_tile(cache: &Cache<'_>, of: Isa, queries: &mut [Query<'_>; TILE], scores: &mut Vec<f32>) = Cache::tile::<TILE>;
}

multiversion! {
    fn attend_one(cache: &Cache<'_>, of: Isa, queries: &mut [Query<'_>; 1], scores: &mut Vec<f32>) = Cache::tile::<1>;
}

multiversion! {
    fn attend_f16(cache: &Cache<'_>, of: Isa, query: &mut Query<'_>, scratch: &mut Vec<f32>) = Cache::attend_f16;
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

    /// Sums values in one pass over the positions, as flash attention does: what was summed is scaled down whenever a larger
    /// score comes. Every sum is rounded to F16.
    ///
    /// Source: ggml b11434, `ggml_compute_forward_flash_attn_ext_f16` on CPU, per row of queries.
    #[inline(always)]
    fn attend_f16(&self, isa: Isa, query: &mut Query<'_>, scratch: &mut Vec<f32>) {
        scratch.clear();
        scratch.resize(2 * query.seen, 0.0);
        let (scores, weights) = scratch.split_at_mut(query.seen);
        self.score(isa, query, |at, score| scores[at] = score);
        // All exponents are known before any value is summed: their loop becomes vectors.
        let mut max = f32::NEG_INFINITY;
        for (score, weight) in scores.iter().zip(&mut *weights) {
            *weight = if *score > max {
                max - score
            } else {
                score - max
            };
            max = if *score > max { *score } else { max };
        }
        weights.iter_mut().for_each(|weight| *weight = exp(*weight));
        let (mut total, mut max) = (0.0_f32, f32::NEG_INFINITY);
        for (at, (score, weight)) in scores.iter().zip(&*weights).enumerate() {
            let mut weight = *weight;
            if *score > max {
                max = *score;
                total *= weight;
                let sums = query.out.iter_mut();
                sums.for_each(|out| *out = round_to_f16(*out * weight));
                weight = 1.0;
            }
            total += weight;
            let values = &self.of.values[self.row(at, query.out.len())];
            for (out, v) in query.out.iter_mut().zip(values) {
                *out = round_to_f16(*out + weight * v);
            }
        }
        query.out.iter_mut().for_each(|out| *out /= total);
    }

    /// Queries in the order of what they see; each result depends on its own query alone.
    fn attend(&self, isa: Isa, queries: &mut [Query<'_>], scores: &mut Vec<f32>) {
        let (tiles, rest) = queries.as_chunks_mut::<TILE>();
        for tile in tiles {
            attend_tile(isa, self, isa, tile, scores);
        }
        for one in rest {
            attend_one(isa, self, isa, std::array::from_mut(one), scores);
        }
    }

    /// Positions that all queries see are taken for all of them at once.
    #[inline(always)]
    fn tile<const N: usize>(&self, isa: Isa, queries: &mut [Query<'_>; N], scores: &mut Vec<f32>) {
        let (common, most) = (queries[0].seen, queries[N - 1].seen);
        scores.clear();
        scores.resize(most * N, 0.0);
        let (scores, _) = scores.as_chunks_mut::<N>();
        for (n, query) in queries.iter().enumerate() {
            self.score(isa, query, |at, score| scores[at][n] = score);
        }
        let mut max = [f32::NEG_INFINITY; N];
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        for scores in &scores[..common] {
            for n in 0..N {
                max[n] = larger(scores[n], max[n]);
            }
        }
        for (n, query) in queries.iter().enumerate() {
            let own = scores[common..query.seen].iter();
            own.for_each(|scores| max[n] = larger(scores[n], max[n]));
        }
        for scores in scores.iter_mut() {
            for n in 0..N {
                scores[n] = exp(scores[n] - max[n]);
            }
        }
        let mut totals = [0.0_f32; N];
        for scores in &scores[..common] {
            for n in 0..N {
                totals[n] += scores[n];
            }
        }
        for (n, query) in queries.iter().enumerate() {
            let own = &scores[common..query.seen];
            own.iter().for_each(|scores| totals[n] += scores[n]);
        }
        for scores in scores.iter_mut() {
            for n in 0..N {
                scores[n] /= totals[n];
            }
        }
        self.sum_values(isa, queries, scores);
    }

    /// Scores of all positions that a query sees.
    #[inline(always)]
    fn score(&self, isa: Isa, query: &Query<'_>, mut put: impl FnMut(usize, f32)) {
        let (q, scale) = (query.values, 1.0 / (query.values.len() as f32).sqrt());
        let mut at = 0;
        while at + LANES <= query.seen {
            let keys = &self.of.keys[self.row(at, q.len()).start..];
            let Some(dots) = kernels::dots(isa, q, keys, self.width) else {
                break;
            };
            for (lane, dot) in dots.into_iter().enumerate() {
                put(at + lane, dot * scale);
            }
            at += LANES;
        }
        for at in at..query.seen {
            put(at, dot(q, &self.of.keys[self.row(at, q.len())]) * scale);
        }
    }

    /// Adds the values of all positions, weighted, in their order.
    #[inline(always)]
    fn sum_values<const N: usize>(
        &self,
        isa: Isa,
        queries: &mut [Query<'_>; N],
        weights: &[[f32; N]],
    ) {
        let (common, head_dim) = (queries[0].seen, queries[0].values.len());
        let mut begun = 0;
        while begun + LANES <= head_dim {
            let rows = &self.of.values[self.first + begun..];
            let Some(sums) = kernels::weighted_sums(isa, &weights[..common], rows, self.width)
            else {
                break;
            };
            for (query, sums) in queries.iter_mut().zip(&sums) {
                query.out[begun..begun + LANES].copy_from_slice(sums);
            }
            begun += LANES;
        }
        for (n, query) in queries.iter_mut().enumerate() {
            for (at, weights) in weights[..query.seen].iter().enumerate() {
                let first = if at < common { begun } else { 0 };
                let values = &self.of.values[self.row(at, head_dim)][first..];
                let pairs = query.out[first..].iter_mut().zip(values);
                pairs.for_each(|(out, v)| *out += weights[n] * v);
            }
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

    /// Heads wide enough for vectors, in groups that fill tiles together with rows.
    const WIDE: AttentionShape = AttentionShape {
        heads: 6,
        key_value_heads: 2,
        head_dim: 40,
        arithmetic: AttentionArithmetic::F32,
    };

    /// Heads of whole vectors, which scores have a kernel for.
    const VECTORS: AttentionShape = AttentionShape {
        head_dim: 48,
        ..WIDE
    };

    fn f16(shape: AttentionShape) -> AttentionShape {
        AttentionShape {
            arithmetic: AttentionArithmetic::F16,
            ..shape
        }
    }

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 29 + seed * 13) % 19) as f32 / 5.0 - 1.9)
            .collect()
    }

    fn run(isa: Isa, pieces: &[usize], shape: AttentionShape) -> Vec<f32> {
        let mut state = KeyValues::default();
        let (mut out, mut begin) = (Vec::new(), 0);
        let rows: usize = pieces.iter().sum();
        let wide = shape.heads * shape.head_dim;
        let narrow = shape.key_value_heads * shape.head_dim;
        let (q, k, v) = (
            values(rows * wide, 1),
            values(rows * narrow, 2),
            values(rows * narrow, 3),
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
                isa,
                &part(&q, wide),
                &part(&k, narrow),
                &part(&v, narrow),
                shape,
                &mut [segment],
            ));
            begin = end;
        }
        out
    }

    #[track_caller]
    fn check_mean(shape: AttentionShape) {
        let (rows, dim) = (37, shape.head_dim);
        let (wide, narrow) = (shape.heads * dim, shape.key_value_heads * dim);
        let (q, k, v) = (
            values(rows * wide, 1),
            values(rows * narrow, 2),
            values(rows * narrow, 3),
        );
        let found = run(Isa::detect(), &[rows], shape);
        for (t, head) in (0..rows).flat_map(|t| (0..shape.heads).map(move |head| (t, head))) {
            let kv = head / (shape.heads / shape.key_value_heads);
            let score = |s: usize| {
                let product = |i: usize| {
                    f64::from(q[t * wide + head * dim + i])
                        * f64::from(k[s * narrow + kv * dim + i])
                };
                ((0..dim).map(product).sum::<f64>() / (dim as f64).sqrt()).exp()
            };
            let total: f64 = (0..=t).map(score).sum();
            for i in 0..dim {
                let expected: f64 = (0..=t)
                    .map(|s| score(s) / total * f64::from(v[s * narrow + kv * dim + i]))
                    .sum();
                let found = f64::from(found[t * wide + head * dim + i]);
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }

    #[test]
    fn it_is_a_weighted_mean_of_values() {
        check_mean(SHAPE);
        check_mean(WIDE);
        check_mean(VECTORS);
    }

    #[test]
    fn pieces_give_what_the_whole_gives() {
        for (shape, isa) in [SHAPE, WIDE, VECTORS, f16(SHAPE), f16(VECTORS)]
            .iter()
            .flat_map(|shape| Isa::all().into_iter().map(|isa| (*shape, isa)))
        {
            let whole = run(isa, &[45], shape);
            assert_eq!(run(isa, &[3, 1, 1, 40], shape), whole);
            assert_eq!(run(isa, &[1; 45], shape), whole);
        }
    }

    #[test]
    fn vectors_of_any_width_give_the_same_bits() {
        for shape in [WIDE, VECTORS, f16(WIDE), f16(VECTORS)] {
            let all = Isa::all().into_iter();
            let all: Vec<_> = all.map(|isa| run(isa, &[45], shape)).collect();
            assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{shape:?}");
        }
    }

    #[test]
    fn f16_is_near_and_not_the_same() {
        for shape in [SHAPE, VECTORS] {
            let [exact, f16] = [shape, f16(shape)].map(|shape| run(Isa::detect(), &[25], shape));
            let differences = exact.iter().zip(&f16).map(|(a, b)| (a - b).abs());
            let largest = differences.fold(0.0, f32::max);
            assert!(largest > 1e-5 && largest < 1e-2, "{largest}");
        }
    }
}
