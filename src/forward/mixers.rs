//! The four kinds of blocks: Mamba-2, attention, MLP, MoE. Each maps the normed stream to what is added to it.

use super::linear::{Linear, required};
use super::numerics::Numerics;
use super::observer::Observer;
use super::state::{BlockState, State};
use crate::artifact::StoredModel;
use crate::backend::{
    AttentionShape, Backend, KeyValues, RouteShape, ScanShape, ScanWeights, Segment,
};
use crate::error::Result;
use crate::model::config::{MoeConfig, NemotronHConfig};
use crate::model::hybrid_pattern::BlockKind;

/// A sequence's rows in the batch and its state.
pub struct Turn<'a, B: Backend> {
    /// Rows of the batch.
    pub rows: std::ops::Range<usize>,
    /// Advanced by the run.
    pub state: &'a mut State<B>,
}

/// What a mixer is given besides its weights.
pub struct Pass<'p, 'a, B: Backend> {
    /// The machine.
    pub backend: &'p B,
    /// Which block this is.
    pub block: usize,
    /// Rows of the batch.
    pub rows: usize,
    /// The sequences.
    pub turns: &'p mut [Turn<'a, B>],
    /// Who looks on.
    pub observer: &'p mut dyn Observer<B>,
}

impl<B: Backend> Pass<'_, '_, B> {
    fn apply(&mut self, linear: &Linear<B>, input: &B::Buffer) -> Result<B::Buffer> {
        linear.apply(self.backend, input, self.rows, self.observer)
    }

    /// One part of every sequence's state of this block.
    fn segments<'s, T>(
        &'s mut self,
        part: impl Fn(&'s mut BlockState<B>) -> Option<&'s mut T>,
    ) -> Vec<Segment<'s, T>> {
        let block = self.block;
        let turns = self.turns.iter_mut();
        turns
            .filter_map(|turn| {
                Some(Segment {
                    rows: turn.rows.clone(),
                    position: turn.state.position,
                    state: part(&mut turn.state.blocks[block])?,
                })
            })
            .collect()
    }
}

/// The mixer of one block.
pub enum Mixer<B: Backend> {
    /// `M`
    Mamba(Box<Mamba2<B>>),
    /// `*`
    Attention(Box<Attention<B>>),
    /// `-`
    Mlp(Mlp<B>),
    /// `E`
    Moe(Box<Moe<B>>),
}

impl<B: Backend> Mixer<B> {
    /// Opens the weights of block `block`.
    pub fn open(
        backend: &B,
        model: &StoredModel,
        block: usize,
        kind: BlockKind,
        numerics: &Numerics,
    ) -> Result<Self> {
        let weights = BlockWeights {
            backend,
            model,
            block,
            numerics,
        };
        Ok(match kind {
            BlockKind::Mamba => Self::Mamba(Box::new(Mamba2::open(&weights)?)),
            BlockKind::Attention => Self::Attention(Box::new(Attention::open(&weights)?)),
            BlockKind::Mlp => Self::Mlp(Mlp::open(&weights, "ffn_up", "ffn_down")?),
            BlockKind::Moe => Self::Moe(Box::new(Moe::open(&weights)?)),
        })
    }

    /// `[rows, hidden]` to `[rows, hidden]`.
    pub fn run(&self, pass: Pass<'_, '_, B>, input: &B::Buffer) -> Result<B::Buffer> {
        match self {
            Self::Mamba(mixer) => mixer.run(pass, input),
            Self::Attention(mixer) => mixer.run(pass, input),
            Self::Mlp(mixer) => mixer.run(pass.backend, input, pass.rows, pass.observer),
            Self::Moe(mixer) => mixer.run(pass, input),
        }
    }
}

/// Where the weights of a block come from.
struct BlockWeights<'a, B> {
    backend: &'a B,
    model: &'a StoredModel,
    block: usize,
    numerics: &'a Numerics,
}

impl<B: Backend> BlockWeights<'_, B> {
    fn linear(&self, name: &str) -> Result<Linear<B>> {
        let stem = format!("blk.{}.{name}", self.block);
        Linear::open(self.backend, self.model, &stem, self.numerics)
    }

    fn vector(&self, name: &str) -> Result<B::Buffer> {
        let name = format!("blk.{}.{name}", self.block);
        self.backend.vector(required(self.model, &name)?)
    }

    fn config(&self) -> &NemotronHConfig {
        self.model.config()
    }
}

/// Sizes of the scan of a model.
pub fn scan_shape(config: &NemotronHConfig, numerics: &Numerics) -> ScanShape {
    ScanShape {
        heads: config.mamba_num_heads,
        head_dim: config.mamba_head_dim,
        groups: config.n_groups,
        state_size: config.ssm_state_size,
        time_step: numerics.time_step(config.time_step),
    }
}

/// Mamba-2: projection to z, x, B, C, dt; convolution; scan; gated norm; projection.
///
/// Source: Mamba-2, arXiv:2405.21060; order and norm as in `NemotronHMamba2Mixer` of transformers.
pub struct Mamba2<B: Backend> {
    in_proj: Linear<B>,
    conv_weight: B::Buffer,
    conv_bias: B::Buffer,
    a: B::Buffer,
    d: B::Buffer,
    dt_bias: B::Buffer,
    norm: B::Buffer,
    out_proj: Linear<B>,
    shape: ScanShape,
    eps: f32,
}

impl<B: Backend> Mamba2<B> {
    fn open(weights: &BlockWeights<B>) -> Result<Self> {
        Ok(Self {
            in_proj: weights.linear("ssm_in")?,
            conv_weight: weights.vector("ssm_conv1d.weight")?,
            conv_bias: weights.vector("ssm_conv1d.bias")?,
            a: weights.vector("ssm_a")?,
            d: weights.vector("ssm_d")?,
            dt_bias: weights.vector("ssm_dt.bias")?,
            norm: weights.vector("ssm_norm.weight")?,
            out_proj: weights.linear("ssm_out")?,
            shape: scan_shape(weights.config(), weights.numerics),
            eps: weights.config().norm_epsilon(),
        })
    }

    fn run(&self, mut pass: Pass<'_, '_, B>, input: &B::Buffer) -> Result<B::Buffer> {
        let (backend, inner) = (pass.backend, self.shape.inner());
        let projected = pass.apply(&self.in_proj, input)?;
        let width = self.in_proj.out_features;
        let mut conv_states = pass.segments(|state| match state {
            BlockState::Mamba { conv, .. } => Some(conv),
            _ => None,
        });
        let xbc = backend.conv1d_silu(
            &projected,
            width,
            inner,
            &self.conv_weight,
            &self.conv_bias,
            &mut conv_states,
        )?;
        let mut ssm_states = pass.segments(|state| match state {
            BlockState::Mamba { ssm, .. } => Some(ssm),
            _ => None,
        });
        let weights = ScanWeights {
            a: &self.a,
            d: &self.d,
            dt_bias: &self.dt_bias,
        };
        let y = backend.selective_scan(
            &xbc,
            &projected,
            width,
            weights,
            self.shape,
            &mut ssm_states,
        )?;
        let gated = backend.gated_rms_norm(
            y,
            &projected,
            width,
            &self.norm,
            self.shape.groups,
            self.eps,
        )?;
        pass.apply(&self.out_proj, &gated)
    }
}

/// Grouped-query attention without positions.
pub struct Attention<B: Backend> {
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    output: Linear<B>,
    shape: AttentionShape,
}

impl<B: Backend> Attention<B> {
    fn open(weights: &BlockWeights<B>) -> Result<Self> {
        let config = weights.config();
        Ok(Self {
            query: weights.linear("attn_q")?,
            key: weights.linear("attn_k")?,
            value: weights.linear("attn_v")?,
            output: weights.linear("attn_output")?,
            shape: AttentionShape {
                heads: config.num_attention_heads,
                key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                arithmetic: weights.numerics.attention,
            },
        })
    }

    fn run(&self, mut pass: Pass<'_, '_, B>, input: &B::Buffer) -> Result<B::Buffer> {
        let backend = pass.backend;
        let query = pass.apply(&self.query, input)?;
        let keys = pass.apply(&self.key, input)?;
        let values = pass.apply(&self.value, input)?;
        let mut caches: Vec<Segment<'_, KeyValues<B::Buffer>>> =
            pass.segments(|state| match state {
                BlockState::Attention(cache) => Some(cache),
                _ => None,
            });
        let mixed = backend.attention(&query, &keys, &values, self.shape, &mut caches)?;
        pass.apply(&self.output, &mixed)
    }
}

/// `down(relu(up x)^2)`: a dense MLP, a shared expert, or a stack of routed ones.
pub struct Mlp<B: Backend> {
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> Mlp<B> {
    fn open(weights: &BlockWeights<B>, up: &str, down: &str) -> Result<Self> {
        Ok(Self {
            up: weights.linear(up)?,
            down: weights.linear(down)?,
        })
    }

    fn run(
        &self,
        backend: &B,
        input: &B::Buffer,
        rows: usize,
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        self.run_matrix(backend, 0, input, rows, observer)
    }

    fn run_matrix(
        &self,
        backend: &B,
        matrix: usize,
        input: &B::Buffer,
        rows: usize,
        observer: &mut dyn Observer<B>,
    ) -> Result<B::Buffer> {
        let mut hidden = self
            .up
            .apply_matrix(backend, matrix, input, rows, observer)?;
        backend.relu_squared(&mut hidden)?;
        self.down
            .apply_matrix(backend, matrix, &hidden, rows, observer)
    }
}

/// Routed experts, in a latent space where the model has one, and a shared expert on the full width.
pub struct Moe<B: Backend> {
    router: Linear<B>,
    router_bias: B::Buffer,
    route: RouteShape,
    experts: Mlp<B>,
    latent: Option<(Linear<B>, Linear<B>)>,
    shared: Mlp<B>,
}

impl<B: Backend> Moe<B> {
    fn open(weights: &BlockWeights<B>) -> Result<Self> {
        let moe = weights.config().moe.as_ref();
        let latent = moe
            .and_then(|moe| moe.moe_latent_size)
            .map(|_| -> Result<_> {
                Ok((
                    weights.linear("ffn_latent_down")?,
                    weights.linear("ffn_latent_up")?,
                ))
            });
        Ok(Self {
            router: weights.linear("ffn_gate_inp")?,
            router_bias: weights.vector("exp_probs_b.bias")?,
            route: moe.map(route_shape).unwrap_or_default(),
            experts: Mlp::open(weights, "ffn_up_exps", "ffn_down_exps")?,
            latent: latent.transpose()?,
            shared: Mlp::open(weights, "ffn_up_shexp", "ffn_down_shexp")?,
        })
    }

    fn run(&self, mut pass: Pass<'_, '_, B>, input: &B::Buffer) -> Result<B::Buffer> {
        let backend = pass.backend;
        let logits = pass.apply(&self.router, input)?;
        let experts = match pass.observer.routing(pass.block) {
            Some(experts) => experts,
            None => backend.route(&logits, &self.router_bias, self.route)?,
        };
        pass.observer.experts(pass.block, &experts);
        let narrowed = match &self.latent {
            Some((down, _)) => Some(pass.apply(down, input)?),
            None => None,
        };
        let expert_input = narrowed.as_ref().unwrap_or(input);
        let width = self.experts.down.out_features;
        let mut sum = backend.zeros(pass.rows * width)?;
        for (expert, rows) in experts.iter().enumerate() {
            if rows.rows.is_empty() {
                continue;
            }
            let count = rows.rows.len();
            let gathered = backend.gather(expert_input, width, &rows.rows)?;
            let out = self
                .experts
                .run_matrix(backend, expert, &gathered, count, pass.observer)?;
            backend.scatter_add(&mut sum, width, &out, rows)?;
        }
        if let Some((_, up)) = &self.latent {
            sum = pass.apply(up, &sum)?;
        }
        let shared = self.shared.run(backend, input, pass.rows, pass.observer)?;
        backend.add(&mut sum, &shared)?;
        Ok(sum)
    }
}

/// How experts are chosen.
pub fn route_shape(moe: &MoeConfig) -> RouteShape {
    RouteShape {
        experts: moe.n_routed_experts,
        chosen: moe.num_experts_per_tok,
        groups: moe.n_group.max(1),
        chosen_groups: moe.topk_group.unwrap_or(1).clamp(1, moe.n_group.max(1)),
        normalize: moe.norm_topk_prob,
        scale: moe.routed_scaling_factor,
    }
}
