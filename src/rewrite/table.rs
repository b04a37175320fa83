//! What the rewrites make of each tensor: one flat table, by GGUF name.

use std::borrow::Cow;

use super::Rewrites;
use super::map::AxisMap;
use super::space::Space;
use super::spaces::FINAL_NORM;
use crate::model::config::NemotronHConfig;

/// What becomes of a tensor.
#[derive(Debug)]
pub enum Change<'a> {
    /// Nothing.
    Nothing,
    /// Other values altogether: a folded norm.
    Replaced(Vec<f64>),
    /// A matrix `[rows, columns]`.
    Matrix {
        /// Of its rows.
        rows: AxisMap<'a>,
        /// Of its columns.
        columns: Columns<'a>,
    },
    /// A vector over the rows of a matrix: a bias, a norm, a convolution's bias.
    Vector(AxisMap<'a>),
}

/// What becomes of the columns.
#[derive(Debug)]
pub enum Columns<'a> {
    /// They are mapped.
    Mapped(AxisMap<'a>),
    /// They read the normed stream: the weight of this norm comes first.
    Reader {
        /// GGUF name of the norm, without `.weight`.
        norm: String,
        /// What follows.
        map: AxisMap<'a>,
    },
}

/// Block and part of `blk.3.ssm_in.weight`.
fn split(name: &str) -> Option<(usize, &str)> {
    let (block, part) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((block.parse().ok()?, part))
}

impl Rewrites {
    /// What becomes of one matrix of a tensor. Rewrites and config must fit ([`Rewrites::check`]).
    pub(super) fn change<'a>(
        &'a self,
        config: &NemotronHConfig,
        name: &str,
        matrix: usize,
    ) -> Change<'a> {
        match (name, split(name)) {
            _ if self.is_none() => Change::Nothing,
            ("token_embd.weight", _) => mapped(AxisMap::default(), self.stream()),
            ("output.weight", _) => self.reader(AxisMap::default(), FINAL_NORM),
            ("output_norm.weight", _) => self.norm(FINAL_NORM),
            (_, Some((block, part))) if block < config.pattern.kinds().len() => {
                let of_block = OfBlock {
                    rewrites: self,
                    config,
                    block,
                };
                of_block.change(part, matrix)
            }
            _ => Change::Nothing,
        }
    }

    /// Rotation of an axis that is the residual stream.
    fn stream(&self) -> AxisMap<'_> {
        AxisMap {
            mix: self.rotation.as_ref(),
            ..AxisMap::default()
        }
    }

    /// A folded norm: `1 / scale`.
    fn norm(&self, name: &str) -> Change<'_> {
        let Some(space) = self.space(name) else {
            return Change::Nothing;
        };
        Change::Replaced(match &space.scale {
            Some(scale) => scale.iter().map(|s| 1.0 / s).collect(),
            None => vec![1.0; space.width],
        })
    }

    /// A reader of the stream behind a norm.
    fn reader<'a>(&'a self, rows: AxisMap<'a>, norm: &str) -> Change<'a> {
        let Some(space) = self.space(norm) else {
            return mapped(rows, AxisMap::default());
        };
        let map = AxisMap {
            mix: self.rotation.as_ref(),
            after: space.scale.as_deref().map(Cow::Borrowed),
            ..AxisMap::default()
        };
        let norm = norm.to_owned();
        Change::Matrix {
            rows,
            columns: Columns::Reader { norm, map },
        }
    }
}

fn mapped<'a>(rows: AxisMap<'a>, columns: AxisMap<'a>) -> Change<'a> {
    Change::Matrix {
        rows,
        columns: Columns::Mapped(columns),
    }
}

struct OfBlock<'a, 'c> {
    rewrites: &'a Rewrites,
    config: &'c NemotronHConfig,
    block: usize,
}

impl<'a> OfBlock<'a, '_> {
    fn space(&self, producer: &str) -> Option<&'a Space> {
        self.rewrites
            .space(&format!("blk.{}.{producer}", self.block))
    }

    fn producer(&self, name: &str) -> AxisMap<'a> {
        self.space(name)
            .map(|space| space.producer(0))
            .unwrap_or_default()
    }

    fn consumer(&self, name: &str, matrix: usize) -> AxisMap<'a> {
        let space = self.space(name);
        space
            .map(|space| space.consumer(matrix))
            .unwrap_or_default()
    }

    fn up(&self, name: &str, matrix: usize) -> AxisMap<'a> {
        let space = self.space(name);
        let map = space.map(|space| space.producer_before_relu2(matrix));
        map.unwrap_or_default()
    }

    fn reader(&self, rows: AxisMap<'a>) -> Change<'a> {
        let norm = format!("blk.{}.attn_norm", self.block);
        self.rewrites.reader(rows, &norm)
    }

    fn writer(&self, columns: AxisMap<'a>) -> Change<'a> {
        mapped(self.rewrites.stream(), columns)
    }

    fn change(&self, part: &str, matrix: usize) -> Change<'a> {
        let has_latent = self
            .config
            .moe
            .as_ref()
            .is_some_and(|moe| moe.moe_latent_size.is_some());
        let none = AxisMap::default;
        match part {
            "attn_norm.weight" => self.rewrites.norm(&format!("blk.{}.attn_norm", self.block)),
            "ssm_in.weight" => self.reader(self.channel_rows(2, self.in_proj_rows())),
            "ssm_conv1d.weight" => mapped(self.channel_rows(1, self.config.conv_dim()), none()),
            "ssm_conv1d.bias" => Change::Vector(self.channel_rows(1, self.config.conv_dim())),
            "ssm_norm.weight" => Change::Vector(self.producer("ssm_norm")),
            "ssm_out.weight" => self.writer(self.consumer("ssm_norm", 0)),
            "attn_q.weight" => self.reader(self.queries()),
            "attn_q.bias" => Change::Vector(self.queries()),
            "attn_k.weight" => self.reader(self.producer("attn_k")),
            "attn_k.bias" => Change::Vector(self.producer("attn_k")),
            "attn_v.weight" => self.reader(self.producer("attn_v")),
            "attn_v.bias" => Change::Vector(self.producer("attn_v")),
            "attn_output.weight" => self.writer(self.attention_output()),
            "ffn_gate_inp.weight" => self.reader(none()),
            "ffn_up.weight" => self.reader(self.up("ffn_up", 0)),
            "ffn_up.bias" => Change::Vector(self.up("ffn_up", 0)),
            "ffn_down.weight" => self.writer(self.consumer("ffn_up", 0)),
            "attn_output.bias" | "ffn_down.bias" => mapped(none(), self.rewrites.stream()),
            "ffn_up_shexp.weight" => self.reader(self.up("ffn_up_shexp", 0)),
            "ffn_down_shexp.weight" => self.writer(self.consumer("ffn_up_shexp", 0)),
            "ffn_latent_down.weight" => self.reader(self.producer("ffn_latent_down")),
            "ffn_latent_up.weight" => self.writer(self.consumer("ffn_down_exps", 0)),
            "ffn_up_exps.weight" if has_latent => {
                let columns = self.consumer("ffn_latent_down", 0);
                mapped(self.up("ffn_up_exps", matrix), columns)
            }
            "ffn_up_exps.weight" => self.reader(self.up("ffn_up_exps", matrix)),
            "ffn_down_exps.weight" if has_latent => {
                let columns = self.consumer("ffn_up_exps", matrix);
                mapped(self.producer("ffn_down_exps"), columns)
            }
            "ffn_down_exps.weight" => self.writer(self.consumer("ffn_up_exps", matrix)),
            _ => Change::Nothing,
        }
    }

    fn in_proj_rows(&self) -> usize {
        self.config.inner_size() + self.config.conv_dim() + self.config.mamba_num_heads
    }

    /// The order of the channels of the heads in `rows` rows that begin with `times` sets of channels: z and x of the
    /// projection, x of the convolution.
    fn channel_rows(&self, times: u32, rows: usize) -> AxisMap<'a> {
        let Some(order) = self.space("ssm_norm").and_then(|space| space.order_of(0)) else {
            return AxisMap::default();
        };
        let inner = order.len() as u32;
        let channels =
            (0..times).flat_map(|set| order.iter().map(move |index| set * inner + index));
        let order = channels.chain(times * inner..rows as u32).collect();
        AxisMap {
            order: Some(order),
            ..AxisMap::default()
        }
    }

    fn query_heads_per_key(&self) -> usize {
        self.config.num_attention_heads / self.config.num_key_value_heads
    }

    /// Queries take what keys give.
    fn queries(&self) -> AxisMap<'a> {
        let times = self.query_heads_per_key();
        let scale = self
            .space("attn_k")
            .and_then(|space| space.repeated_scale(self.config.head_dim, times));
        AxisMap {
            before: scale.map(Cow::Owned),
            ..AxisMap::default()
        }
    }

    fn attention_output(&self) -> AxisMap<'a> {
        let Some(space) = self.space("attn_v") else {
            return AxisMap::default();
        };
        let scale = space.repeated_scale(self.config.head_dim, self.query_heads_per_key());
        AxisMap {
            before: scale.map(Cow::Owned),
            mix: space.rotation.as_deref(),
            ..AxisMap::default()
        }
    }
}
