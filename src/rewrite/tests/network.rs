//! The network in f64, as plainly as it can be written: what rewrites must leave as it is.

use std::collections::BTreeMap;

use crate::artifact::StoredModel;
use crate::model::config::{MoeConfig, NemotronHConfig};
use crate::model::hybrid_pattern::BlockKind;
use crate::rewrite::model::Rewritten;
use crate::rewrite::{ChannelStatistics, RewriteStatistics, Rewrites};

type Rows = Vec<Vec<f64>>;

/// All tensors in f64: matrices of rows.
#[derive(Clone)]
pub struct Network {
    pub config: NemotronHConfig,
    pub tensors: BTreeMap<String, Vec<Rows>>,
}

impl Network {
    /// The network of a model after rewrites.
    pub fn new(stored: &StoredModel, rewrites: &Rewrites) -> Self {
        let view = Rewritten {
            stored,
            rewrites,
            mixer: None,
        };
        let tensors = stored.tensors().iter().map(|tensor| {
            let all: Vec<usize> = (0..tensor.rows).collect();
            let matrix = |matrix| -> Rows {
                let values = view.rows(&tensor.name, matrix, &all, |x| x).unwrap();
                values.chunks(tensor.columns).map(<[f64]>::to_vec).collect()
            };
            (
                tensor.name.clone(),
                (0..tensor.matrices).map(matrix).collect(),
            )
        });
        Self {
            config: stored.config().clone(),
            tensors: tensors.collect(),
        }
    }

    /// Logits of every token, and what was seen on the way.
    pub fn run(&self, tokens: &[usize]) -> (Rows, Seen) {
        let mut seen = Seen::default();
        let embedding = &self.tensors["token_embd.weight"][0];
        let mut stream: Rows = tokens
            .iter()
            .map(|token| embedding[*token].clone())
            .collect();
        for (block, kind) in self.config.pattern.kinds().to_vec().into_iter().enumerate() {
            seen.residual(block, &stream, self.eps());
            let mut of_block = Block {
                network: self,
                prefix: format!("blk.{block}."),
                seen: &mut seen,
            };
            let normed = of_block.normed(&stream);
            let mixed = match kind {
                BlockKind::Mamba => of_block.mamba(&normed),
                BlockKind::Attention => of_block.attention(&normed),
                BlockKind::Mlp => of_block.mlp("ffn_up", "ffn_down", 0, &normed),
                BlockKind::Moe => of_block.moe(&normed),
            };
            for (row, mixed) in stream.iter_mut().zip(mixed) {
                row.iter_mut().zip(mixed).for_each(|(x, y)| *x += y);
            }
        }
        seen.residual(self.config.pattern.kinds().len(), &stream, self.eps());
        let weight = &self.tensors["output_norm.weight"][0][0];
        let head = self
            .tensors
            .get("output.weight")
            .map_or(embedding, |head| &head[0]);
        let logits = stream.iter().map(|row| {
            let normed = times(&rms(row, self.eps()), weight);
            head.iter().map(|row| dot(row, &normed)).collect()
        });
        (logits.collect(), seen)
    }

    fn eps(&self) -> f64 {
        f64::from(self.config.norm_epsilon())
    }
}

/// Second moments and inputs, summed.
#[derive(Default)]
pub struct Seen {
    residual: Vec<(Vec<f64>, f64)>,
    inputs: BTreeMap<String, Vec<Sums>>,
}

/// Squares, largest magnitudes and rows of one input.
type Sums = (Vec<f64>, Vec<f32>, f64);

impl Seen {
    fn residual(&mut self, block: usize, stream: &Rows, eps: f64) {
        let size = stream[0].len();
        self.residual
            .resize(block + 1, (vec![0.0; size * size], 0.0));
        let (sums, count) = &mut self.residual[block];
        for row in stream.iter().map(|row| rms(row, eps)) {
            let products = row.iter().flat_map(|a| row.iter().map(move |b| a * b));
            sums.iter_mut().zip(products).for_each(|(sum, x)| *sum += x);
            *count += 1.0;
        }
    }

    fn input(&mut self, name: &str, matrix: usize, matrices: usize, row: &[f64]) {
        let empty = (vec![0.0; row.len()], vec![0.0; row.len()], 0.0);
        let all = self
            .inputs
            .entry(name.to_owned())
            .or_insert_with(|| vec![empty; matrices]);
        let (sums, max, count) = &mut all[matrix];
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        max.iter_mut()
            .zip(row)
            .for_each(|(max, x)| *max = max.max(x.abs() as f32));
        *count += 1.0;
    }

    pub fn statistics(&self) -> RewriteStatistics {
        let mean = |sums: &[f64], count: f64| -> Vec<f64> {
            sums.iter().map(|sum| sum / count.max(1.0)).collect()
        };
        let input = |all: &Vec<Sums>| ChannelStatistics {
            mean_square: all
                .iter()
                .flat_map(|(sums, _, count)| mean(sums, *count))
                .collect(),
            max_abs: all.iter().flat_map(|(_, max, _)| max.clone()).collect(),
        };
        RewriteStatistics {
            residual: self
                .residual
                .iter()
                .map(|(sums, count)| mean(sums, *count).into())
                .collect(),
            inputs: self
                .inputs
                .iter()
                .map(|(name, all)| (name.clone(), input(all)))
                .collect(),
        }
    }
}

struct Block<'a> {
    network: &'a Network,
    prefix: String,
    seen: &'a mut Seen,
}

impl Block<'_> {
    fn tensor(&self, name: &str) -> &[Rows] {
        &self.network.tensors[&format!("{}{name}", self.prefix)]
    }

    fn vector(&self, name: &str) -> Vec<f64> {
        self.tensor(name)[0].concat()
    }

    fn config(&self) -> &NemotronHConfig {
        &self.network.config
    }

    fn normed(&self, stream: &Rows) -> Rows {
        let (weight, eps) = (self.vector("attn_norm.weight"), self.network.eps());
        stream
            .iter()
            .map(|row| times(&rms(row, eps), &weight))
            .collect()
    }

    fn linear(&mut self, name: &str, matrix: usize, rows: &Rows) -> Rows {
        let weight = format!("{}{name}.weight", self.prefix);
        let stack = &self.network.tensors[&weight];
        for row in rows {
            self.seen.input(&weight, matrix, stack.len(), row);
        }
        let bias = self
            .network
            .tensors
            .get(&format!("{}{name}.bias", self.prefix));
        let out = rows.iter().map(|row| {
            let products = stack[matrix].iter().enumerate();
            let bias = |index: usize| bias.map_or(0.0, |bias| bias[0].concat()[index]);
            products
                .map(|(index, w)| dot(w, row) + bias(index))
                .collect()
        });
        out.collect()
    }

    fn mamba(&mut self, input: &Rows) -> Rows {
        let config = self.config().clone();
        let (inner, conv, taps) = (config.inner_size(), config.conv_dim(), config.conv_kernel);
        let (heads, width) = (config.mamba_num_heads, config.mamba_head_dim);
        let (groups, states) = (config.n_groups, config.ssm_state_size);
        let projected = self.linear("ssm_in", 0, input);
        let (weight, bias) = (
            self.tensor("ssm_conv1d.weight")[0].clone(),
            self.vector("ssm_conv1d.bias"),
        );
        let (a, d, dt_bias) = (
            self.vector("ssm_a"),
            self.vector("ssm_d"),
            self.vector("ssm_dt.bias"),
        );
        let norm = self.vector("ssm_norm.weight");
        let mut state = vec![vec![vec![0.0; states]; width]; heads];
        let mut outputs = Vec::new();
        for token in 0..input.len() {
            let convolved: Vec<f64> = (0..conv)
                .map(|channel| {
                    let tap = |k: usize| match (token + k + 1).checked_sub(taps) {
                        Some(from) => weight[channel][k] * projected[from][inner + channel],
                        None => 0.0,
                    };
                    silu(bias[channel] + (0..taps).map(tap).sum::<f64>())
                })
                .collect();
            let row = &projected[token];
            let mut y = vec![0.0; inner];
            for head in 0..heads {
                let group = head / (heads / groups);
                let step = (row[inner + conv + head] + dt_bias[head]).exp().ln_1p();
                let b = &convolved[inner + group * states..][..states];
                let c = &convolved[inner + (groups + group) * states..][..states];
                for channel in 0..width {
                    let x = convolved[head * width + channel];
                    let state = &mut state[head][channel];
                    for (s, b) in state.iter_mut().zip(b) {
                        *s = (step * a[head]).exp() * *s + step * x * b;
                    }
                    y[head * width + channel] = dot(state, c) + d[head] * x;
                }
            }
            let gated: Vec<f64> = y.iter().zip(row).map(|(y, z)| y * silu(*z)).collect();
            let grouped = gated.chunks(inner / groups);
            let eps = self.network.eps();
            let grouped: Vec<f64> = grouped.flat_map(|group| rms(group, eps)).collect();
            outputs.push(times(&grouped, &norm));
        }
        self.linear("ssm_out", 0, &outputs)
    }

    fn attention(&mut self, input: &Rows) -> Rows {
        let config = self.config().clone();
        let (heads, size) = (config.num_attention_heads, config.head_dim);
        let group = heads / config.num_key_value_heads;
        let query = self.linear("attn_q", 0, input);
        let key = self.linear("attn_k", 0, input);
        let value = self.linear("attn_v", 0, input);
        let mixed = (0..input.len()).map(|token| {
            let heads = (0..heads).flat_map(|head| {
                let own = &query[token][head * size..][..size];
                let of =
                    |rows: &Rows, past: usize| rows[past][head / group * size..][..size].to_vec();
                let scores: Vec<f64> = (0..=token)
                    .map(|past| (dot(own, &of(&key, past)) / (size as f64).sqrt()).exp())
                    .collect();
                let total: f64 = scores.iter().sum();
                let mut out = vec![0.0; size];
                for (past, score) in scores.iter().enumerate() {
                    let value = of(&value, past);
                    out.iter_mut()
                        .zip(value)
                        .for_each(|(o, v)| *o += score / total * v);
                }
                out
            });
            heads.collect()
        });
        let mixed = mixed.collect();
        self.linear("attn_output", 0, &mixed)
    }

    fn mlp(&mut self, up: &str, down: &str, matrix: usize, input: &Rows) -> Rows {
        let mut hidden = self.linear(up, matrix, input);
        for x in hidden.iter_mut().flatten() {
            *x = x.max(0.0) * x.max(0.0);
        }
        self.linear(down, matrix, &hidden)
    }

    fn moe(&mut self, input: &Rows) -> Rows {
        let moe = self.config().moe.clone().unwrap();
        let scores = self.linear("ffn_gate_inp", 0, input);
        let bias = self.vector("exp_probs_b.bias");
        let narrow = match moe.moe_latent_size {
            Some(_) => self.linear("ffn_latent_down", 0, input),
            None => input.clone(),
        };
        let mut out = Vec::new();
        for (scores, row) in scores.iter().zip(&narrow) {
            let mut sum = vec![0.0; row.len()];
            for (expert, weight) in route(scores, &bias, &moe) {
                let one = vec![row.clone()];
                let made = self.mlp("ffn_up_exps", "ffn_down_exps", expert, &one);
                sum.iter_mut()
                    .zip(&made[0])
                    .for_each(|(s, y)| *s += weight * y);
            }
            out.push(sum);
        }
        if moe.moe_latent_size.is_some() {
            out = self.linear("ffn_latent_up", 0, &out);
        }
        let shared = self.mlp("ffn_up_shexp", "ffn_down_shexp", 0, input);
        let rows = out.into_iter().zip(shared);
        rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect())
            .collect()
    }
}

/// The chosen experts and their weights; one group.
fn route(scores: &[f64], bias: &[f64], moe: &MoeConfig) -> Vec<(usize, f64)> {
    let weights: Vec<f64> = scores.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let biased = |expert: &usize| weights[*expert] + bias[*expert];
    order.sort_by(|a, b| biased(b).total_cmp(&biased(a)));
    order.truncate(moe.num_experts_per_tok);
    let total: f64 = order.iter().map(|expert| weights[*expert]).sum();
    let scale = f64::from(moe.routed_scaling_factor) / total;
    order
        .iter()
        .map(|expert| (*expert, weights[*expert] * scale))
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn rms(row: &[f64], eps: f64) -> Vec<f64> {
    let norm = (dot(row, row) / row.len() as f64 + eps).sqrt();
    row.iter().map(|x| x / norm).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Largest difference of logits by the largest logit.
pub fn difference(a: &Rows, b: &Rows) -> f64 {
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let largest = a.iter().flatten().fold(0.0_f64, |max, x| max.max(x.abs()));
    pairs().fold(0.0_f64, |max, (a, b)| max.max((a - b).abs())) / largest
}
