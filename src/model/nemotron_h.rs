//! The Nemotron-H architecture as a table: both spellings of every tensor, its shape, its role.
//!
//! Enters: sizes. Leaves: the tensors that the checkpoint must hold and what each becomes in GGUF. A
//! second hybrid is one more file like this. Knows no bytes and no quantization.
//!
//! Source: llama.cpp b11434, architectures `nemotron_h` and `nemotron_h_moe`.

use super::config::NemotronHConfig;
use super::hybrid_pattern::BlockKind;

/// The bias of the convolution, after `blk.N.`.
pub const CONVOLUTION_BIAS: &str = "ssm_conv1d.bias";
/// The bias of the time step, after `blk.N.`.
pub const TIME_STEP_BIAS: &str = "ssm_dt.bias";

/// Whether what `ssm_in` gives is added to this tensor, after the convolution or as it is.
pub fn is_bias_behind_ssm_in(name: &str) -> bool {
    name.ends_with(CONVOLUTION_BIAS) || name.ends_with(TIME_STEP_BIAS)
}

/// A symbolic size, so that shapes are written once and widening knows which axes grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// 1.
    One,
    /// Rows of the embedding.
    Vocab,
    /// Width of the residual stream.
    Hidden,
    /// Input of the multi-token-prediction projection: embedding beside hidden state.
    TwoHidden,
    /// Rows of `in_proj`: z, x, B, C, dt.
    InProj,
    /// Channels of the convolution: x, B, C.
    Conv,
    /// Taps of the convolution.
    Kernel,
    /// Mamba-2 heads.
    MambaHeads,
    /// Mamba-2 heads x head dim.
    Inner,
    /// Groups of B, C and the gated norm.
    Groups,
    /// `Inner / Groups`.
    InnerPerGroup,
    /// Query heads x head dim.
    Query,
    /// Key-value heads x head dim.
    KeyValue,
    /// Width of a dense MLP.
    Intermediate,
    /// Routed experts.
    Experts,
    /// What an expert reads and writes: the latent width, or the hidden width without one.
    ExpertInput,
    /// Width of one routed expert.
    ExpertIntermediate,
    /// Width of the shared expert.
    SharedIntermediate,
    /// Width of the latent space of a latent MoE.
    Latent,
}

/// The widths that exact widening may enlarge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`, 0 without dense MLPs.
    pub intermediate: usize,
    /// `moe_intermediate_size`, 0 without experts.
    pub expert_intermediate: usize,
    /// `moe_shared_expert_intermediate_size`, 0 without experts.
    pub shared_intermediate: usize,
    /// `moe_latent_size`, 0 without a latent space.
    pub latent: usize,
}

impl Widths {
    /// The widths of the checkpoint.
    pub fn of(config: &NemotronHConfig) -> Self {
        let moe = config.moe.as_ref();
        let has_mlp = config.pattern.has(BlockKind::Mlp);
        Self {
            hidden: config.hidden_size,
            intermediate: config.intermediate_size.filter(|_| has_mlp).unwrap_or(0),
            expert_intermediate: moe.map_or(0, |moe| moe.moe_intermediate_size),
            shared_intermediate: moe.map_or(0, |moe| moe.moe_shared_expert_intermediate_size),
            latent: moe.and_then(|moe| moe.moe_latent_size).unwrap_or(0),
        }
    }
}

impl Dim {
    /// The size, with the five changeable widths taken from `widths`.
    pub fn size(self, config: &NemotronHConfig, widths: &Widths) -> usize {
        match self {
            Self::One => 1,
            Self::Vocab => config.vocab_size,
            Self::Hidden => widths.hidden,
            Self::TwoHidden => 2 * widths.hidden,
            Self::InProj => config.inner_size() + config.conv_dim() + config.mamba_num_heads,
            Self::Conv => config.conv_dim(),
            Self::Kernel => config.conv_kernel,
            Self::MambaHeads => config.mamba_num_heads,
            Self::Inner => config.inner_size(),
            Self::Groups => config.n_groups,
            Self::InnerPerGroup => config.inner_size() / config.n_groups,
            Self::Query => config.num_attention_heads * config.head_dim,
            Self::KeyValue => config.num_key_value_heads * config.head_dim,
            Self::Intermediate => widths.intermediate,
            Self::Experts => config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts),
            Self::ExpertInput if widths.latent > 0 => widths.latent,
            Self::ExpertInput => widths.hidden,
            Self::ExpertIntermediate => widths.expert_intermediate,
            Self::SharedIntermediate => widths.shared_intermediate,
            Self::Latent => widths.latent,
        }
    }
}

/// What happens to the values on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueRule {
    /// Nothing.
    Copy,
    /// `-exp(x)` in f32: `A_log` becomes A.
    NegExp,
    /// Rows of each query head interleaved: source row `a d/2 + j` goes to `2 j + a`.
    InterleaveQueryHeads,
    /// The same for each key head.
    InterleaveKeyHeads,
}

/// Whether a tensor takes the type asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Always F32: norms, biases, router, convolution, SSM parameters.
    F32,
    /// The type asked for.
    OutType,
}

/// How a tensor meets the residual stream; decides the factor that exact widening gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// It reads normalised values, or does not touch the stream.
    Apart,
    /// It writes to the stream.
    Writes,
    /// It is the weight of a norm over the stream.
    Norm,
    /// It is the norm before a head whose weights are those of a tensor that writes to the stream.
    NormOfTiedHead,
}

/// Whether the checkpoint must hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Missing is an error.
    Required,
    /// Written if there.
    Optional,
    /// Written as zeros if missing: the runtime's graph adds it unconditionally.
    ZerosIfMissing,
}

/// One row of the table.
#[derive(Debug)]
pub struct TensorRule {
    /// Name inside its block as the hub spells it; `{}` stands for the expert.
    pub source: &'static str,
    /// Name inside its block in GGUF.
    pub name: &'static str,
    /// Shape in the checkpoint, `[out_features, in_features]` for matrices.
    pub shape: &'static [Dim],
    /// Shape in GGUF where it is not the checkpoint's, slowest first.
    pub reshape: Option<&'static [Dim]>,
    /// What happens to the values.
    pub value: ValueRule,
    /// Whether it takes the type asked for.
    pub storage: Storage,
    /// How it meets the residual stream.
    pub stream: Stream,
    /// Whether it must be there.
    pub presence: Presence,
}

impl TensorRule {
    const fn new(source: &'static str, name: &'static str, shape: &'static [Dim]) -> Self {
        Self {
            source,
            name,
            shape,
            reshape: None,
            value: ValueRule::Copy,
            storage: Storage::F32,
            stream: Stream::Apart,
            presence: Presence::Required,
        }
    }

    const fn reshaped(mut self, shape: &'static [Dim]) -> Self {
        self.reshape = Some(shape);
        self
    }

    const fn value(mut self, value: ValueRule) -> Self {
        self.value = value;
        self
    }

    const fn out_type(mut self) -> Self {
        self.storage = Storage::OutType;
        self
    }

    const fn writes(mut self) -> Self {
        self.stream = Stream::Writes;
        self
    }

    const fn norm(mut self) -> Self {
        self.stream = Stream::Norm;
        self
    }

    const fn optional(mut self) -> Self {
        self.presence = Presence::Optional;
        self
    }

    const fn zeros_if_missing(mut self) -> Self {
        self.presence = Presence::ZerosIfMissing;
        self
    }

    /// Whether one GGUF tensor stacks this tensor of every expert.
    pub fn is_stacked(&self) -> bool {
        self.source.contains("{}")
    }
}

/// Matrices of a block that read its normed stream, as stems of GGUF names; the router, which is never rounded, aside.
pub fn stream_readers(kind: BlockKind, config: &NemotronHConfig) -> &'static [&'static str] {
    let moe = config.moe.as_ref();
    let is_latent = moe.is_some_and(|moe| moe.moe_latent_size.is_some());
    match kind {
        BlockKind::Mamba => &["ssm_in"],
        BlockKind::Attention => &["attn_q", "attn_k", "attn_v"],
        BlockKind::Mlp => &["ffn_up"],
        BlockKind::Moe if is_latent => &["ffn_latent_down", "ffn_up_shexp"],
        BlockKind::Moe => &["ffn_up_exps", "ffn_up_shexp"],
    }
}

use Dim::*;

const EMBEDDINGS: TensorRule =
    TensorRule::new("embeddings.weight", "token_embd.weight", &[Vocab, Hidden])
        .out_type()
        .writes();
const FINAL_NORM: TensorRule =
    TensorRule::new("norm_f.weight", "output_norm.weight", &[Hidden]).norm();
const HEAD: TensorRule =
    TensorRule::new("lm_head.weight", "output.weight", &[Vocab, Hidden]).out_type();
/// A head tied to the embedding may be absent.
const TIED_HEAD: TensorRule = TensorRule::new("lm_head.weight", "output.weight", &[Vocab, Hidden])
    .out_type()
    .optional();

/// The scale above the scales of an NVFP4 matrix, one value for each of a stack; no checkpoint has it under a name of its own.
pub static SECOND_SCALE: TensorRule = TensorRule::new("", "scale", &[One]);

const BLOCK_NORM: TensorRule = TensorRule::new("norm.weight", "attn_norm.weight", &[Hidden]).norm();

const MAMBA: &[TensorRule] = &[
    TensorRule::new("mixer.in_proj.weight", "ssm_in.weight", &[InProj, Hidden]).out_type(),
    TensorRule::new(
        "mixer.conv1d.weight",
        "ssm_conv1d.weight",
        &[Conv, One, Kernel],
    )
    .reshaped(&[Conv, Kernel]),
    TensorRule::new("mixer.conv1d.bias", "ssm_conv1d.bias", &[Conv]).zeros_if_missing(),
    TensorRule::new("mixer.dt_bias", "ssm_dt.bias", &[MambaHeads]),
    TensorRule::new("mixer.A_log", "ssm_a", &[MambaHeads])
        .reshaped(&[MambaHeads, One])
        .value(ValueRule::NegExp),
    TensorRule::new("mixer.D", "ssm_d", &[MambaHeads]).reshaped(&[MambaHeads, One]),
    TensorRule::new("mixer.norm.weight", "ssm_norm.weight", &[Inner])
        .reshaped(&[Groups, InnerPerGroup]),
    TensorRule::new("mixer.out_proj.weight", "ssm_out.weight", &[Hidden, Inner])
        .out_type()
        .writes(),
];

const ATTENTION: &[TensorRule] = &[
    TensorRule::new("mixer.q_proj.weight", "attn_q.weight", &[Query, Hidden])
        .out_type()
        .value(ValueRule::InterleaveQueryHeads),
    TensorRule::new("mixer.q_proj.bias", "attn_q.bias", &[Query])
        .value(ValueRule::InterleaveQueryHeads)
        .optional(),
    TensorRule::new("mixer.k_proj.weight", "attn_k.weight", &[KeyValue, Hidden])
        .out_type()
        .value(ValueRule::InterleaveKeyHeads),
    TensorRule::new("mixer.k_proj.bias", "attn_k.bias", &[KeyValue])
        .value(ValueRule::InterleaveKeyHeads)
        .optional(),
    TensorRule::new("mixer.v_proj.weight", "attn_v.weight", &[KeyValue, Hidden]).out_type(),
    TensorRule::new("mixer.v_proj.bias", "attn_v.bias", &[KeyValue]).optional(),
    TensorRule::new(
        "mixer.o_proj.weight",
        "attn_output.weight",
        &[Hidden, Query],
    )
    .out_type()
    .writes(),
    TensorRule::new("mixer.o_proj.bias", "attn_output.bias", &[Hidden])
        .writes()
        .optional(),
];

const MLP: &[TensorRule] = &[
    TensorRule::new(
        "mixer.up_proj.weight",
        "ffn_up.weight",
        &[Intermediate, Hidden],
    )
    .out_type(),
    TensorRule::new("mixer.up_proj.bias", "ffn_up.bias", &[Intermediate]).optional(),
    TensorRule::new(
        "mixer.down_proj.weight",
        "ffn_down.weight",
        &[Hidden, Intermediate],
    )
    .out_type()
    .writes(),
    TensorRule::new("mixer.down_proj.bias", "ffn_down.bias", &[Hidden])
        .writes()
        .optional(),
];

const ROUTER: &[TensorRule] = &[
    TensorRule::new(
        "mixer.gate.weight",
        "ffn_gate_inp.weight",
        &[Experts, Hidden],
    ),
    TensorRule::new(
        "mixer.gate.e_score_correction_bias",
        "exp_probs_b.bias",
        &[Experts],
    ),
];

const SHARED_EXPERT: &[TensorRule] = &[
    TensorRule::new(
        "mixer.shared_experts.up_proj.weight",
        "ffn_up_shexp.weight",
        &[SharedIntermediate, Hidden],
    )
    .out_type(),
    TensorRule::new(
        "mixer.shared_experts.down_proj.weight",
        "ffn_down_shexp.weight",
        &[Hidden, SharedIntermediate],
    )
    .out_type()
    .writes(),
];

/// Experts that read and write the residual stream themselves.
const EXPERTS: &[TensorRule] = &[
    EXPERT_UP,
    TensorRule::new(
        "mixer.experts.{}.down_proj.weight",
        "ffn_down_exps.weight",
        EXPERT_DOWN_SHAPE,
    )
    .out_type()
    .writes(),
];

/// Experts of a latent MoE, between two projections shared by all of them.
const LATENT_EXPERTS: &[TensorRule] = &[
    TensorRule::new(
        "mixer.fc1_latent_proj.weight",
        "ffn_latent_down.weight",
        &[Latent, Hidden],
    )
    .out_type(),
    EXPERT_UP,
    TensorRule::new(
        "mixer.experts.{}.down_proj.weight",
        "ffn_down_exps.weight",
        EXPERT_DOWN_SHAPE,
    )
    .out_type(),
    TensorRule::new(
        "mixer.fc2_latent_proj.weight",
        "ffn_latent_up.weight",
        &[Hidden, Latent],
    )
    .out_type()
    .writes(),
];

const EXPERT_UP: TensorRule = TensorRule::new(
    "mixer.experts.{}.up_proj.weight",
    "ffn_up_exps.weight",
    &[ExpertIntermediate, ExpertInput],
)
.out_type();
const EXPERT_DOWN_SHAPE: &[Dim] = &[ExpertInput, ExpertIntermediate];

/// First half of a multi-token-prediction block, `mtp.layers.0`.
const MTP_FUSION: &[TensorRule] = &[
    TensorRule::new("enorm.weight", "nextn.enorm.weight", &[Hidden]).norm(),
    TensorRule::new("hnorm.weight", "nextn.hnorm.weight", &[Hidden]).norm(),
    TensorRule::new(
        "eh_proj.weight",
        "nextn.eh_proj.weight",
        &[Hidden, TwoHidden],
    )
    .out_type()
    .writes(),
];

/// Second half, `mtp.layers.1`.
const MTP_HEAD: &[TensorRule] = &[
    TensorRule::new("norm.weight", "post_attention_norm.weight", &[Hidden]).norm(),
    TensorRule::new(
        "final_layernorm.weight",
        "nextn.shared_head_norm.weight",
        &[Hidden],
    )
    .norm(),
];

/// A tensor that GGUF will hold, with the names it comes from.
#[derive(Debug, Clone)]
pub struct ExpectedTensor {
    /// Its row of the table.
    pub rule: &'static TensorRule,
    /// Full GGUF name, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// Canonical source names ([`canonical_name`]): one, or one per expert.
    pub sources: Vec<String>,
    /// The name under which all experts may lie in one 3-D tensor instead.
    pub stacked_source: Option<String>,
}

/// Every tensor of the model in the order in which it is written.
pub fn expected_tensors(config: &NemotronHConfig, with_mtp: bool) -> Vec<ExpectedTensor> {
    let mut tensors = vec![at(&EMBEDDINGS, "", "", 0)];
    for (index, kind) in config.pattern.kinds().iter().enumerate() {
        let source = format!("layers.{index}.");
        block(&mut tensors, config, &source, index, &[&[BLOCK_NORM]]);
        block(
            &mut tensors,
            config,
            &source,
            index,
            rules_of(*kind, config),
        );
    }
    if with_mtp && config.nextn_predict_layers > 0 {
        let index = config.pattern.kinds().len();
        let first: &[&[TensorRule]] = &[&[BLOCK_NORM], MTP_FUSION, ATTENTION];
        block(&mut tensors, config, "mtp.layers.0.", index, first);
        block(&mut tensors, config, "mtp.layers.1.", index, &[MTP_HEAD]);
        block(
            &mut tensors,
            config,
            "mtp.layers.1.",
            index,
            rules_of(BlockKind::Moe, config),
        );
    }
    tensors.push(at(&FINAL_NORM, "", "", 0));
    let head = if config.tie_word_embeddings {
        &TIED_HEAD
    } else {
        &HEAD
    };
    tensors.push(at(head, "", "", 0));
    tensors
}

fn rules_of(kind: BlockKind, config: &NemotronHConfig) -> &'static [&'static [TensorRule]] {
    let latent = config
        .moe
        .as_ref()
        .is_some_and(|moe| moe.moe_latent_size.is_some());
    match kind {
        BlockKind::Mamba => &[MAMBA],
        BlockKind::Attention => &[ATTENTION],
        BlockKind::Mlp => &[MLP],
        BlockKind::Moe if latent => &[ROUTER, LATENT_EXPERTS, SHARED_EXPERT],
        BlockKind::Moe => &[ROUTER, EXPERTS, SHARED_EXPERT],
    }
}

fn block(
    tensors: &mut Vec<ExpectedTensor>,
    config: &NemotronHConfig,
    source: &str,
    index: usize,
    groups: &[&'static [TensorRule]],
) {
    let experts = config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts);
    let target = format!("blk.{index}.");
    for rule in groups.iter().flat_map(|group| group.iter()) {
        tensors.push(at(rule, source, &target, experts));
    }
}

fn at(rule: &'static TensorRule, source: &str, target: &str, experts: usize) -> ExpectedTensor {
    let (sources, stacked_source) = if rule.is_stacked() {
        let one =
            |expert: usize| format!("{source}{}", rule.source.replace("{}", &expert.to_string()));
        let all = rule.source.replace(".{}", "");
        (
            (0..experts).map(one).collect(),
            Some(format!("{source}{all}")),
        )
    } else {
        (vec![format!("{source}{}", rule.source)], None)
    };
    ExpectedTensor {
        rule,
        name: format!("{target}{}", rule.name),
        sources,
        stacked_source,
    }
}

/// One spelling for the names of all releases: without `backbone.` or `model.`.
pub fn canonical_name(name: &str) -> String {
    let name = name.replace("language_model.", "");
    let name = ["backbone.", "model."]
        .iter()
        .find_map(|p| name.strip_prefix(p))
        .unwrap_or(&name);
    let name = match name {
        "embed_tokens.weight" | "embedding.weight" => "embeddings.weight",
        other => other,
    };
    let name = name.replace("e_score_correction.bias", "e_score_correction_bias");
    // A stack of all experts is a bare parameter in some releases.
    match name.strip_suffix("_proj") {
        Some(stem)
            if stem.ends_with("mixer.experts.up") || stem.ends_with("mixer.experts.down") =>
        {
            format!("{name}.weight")
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(pattern: &str, latent: bool) -> NemotronHConfig {
        let mut json = json!({
            "model_type": "nemotron_h", "hybrid_override_pattern": pattern, "vocab_size": 64,
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
            "n_groups": 2, "ssm_state_size": 8, "conv_kernel": 4, "layer_norm_epsilon": 1e-5,
            "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 24, "num_nextn_predict_layers": 1
        });
        if latent {
            json["moe_latent_size"] = json!(8);
        }
        NemotronHConfig::parse(&json).unwrap()
    }

    #[test]
    fn every_name_is_unique_on_both_sides() {
        for config in [
            config("M-*", false),
            config("ME*", false),
            config("ME*", true),
        ] {
            let tensors = expected_tensors(&config, true);
            let mut names: Vec<_> = tensors.iter().map(|t| t.name.clone()).collect();
            let mut sources: Vec<_> = tensors.iter().flat_map(|t| t.sources.clone()).collect();
            let counts = (names.len(), sources.len());
            names.sort();
            names.dedup();
            sources.sort();
            sources.dedup();
            assert_eq!(counts, (names.len(), sources.len()));
        }
    }

    #[test]
    fn experts_read_the_latent_space_where_there_is_one() {
        let config = config("E", true);
        assert_eq!(ExpertInput.size(&config, &Widths::of(&config)), 8);
        let names: Vec<_> = expected_tensors(&config, false)
            .into_iter()
            .map(|t| t.name)
            .collect();
        assert!(names.contains(&"blk.0.ffn_latent_down.weight".to_string()));
    }

    #[test]
    fn the_mtp_head_is_one_more_block() {
        let tensors = expected_tensors(&config("ME*", false), true);
        let find = |name: &str| {
            tensors
                .iter()
                .find(|t| t.name == name)
                .map(|t| t.sources[0].clone())
        };
        assert_eq!(
            find("blk.3.attn_norm.weight").unwrap(),
            "mtp.layers.0.norm.weight"
        );
        assert_eq!(
            find("blk.3.post_attention_norm.weight").unwrap(),
            "mtp.layers.1.norm.weight"
        );
        assert_eq!(
            find("blk.3.ffn_up_exps.weight").unwrap(),
            "mtp.layers.1.mixer.experts.0.up_proj.weight"
        );
    }

    #[test]
    fn releases_spell_names_differently() {
        let check = |name: &str, expected: &str| assert_eq!(canonical_name(name), expected);
        check("backbone.layers.0.norm.weight", "layers.0.norm.weight");
        check("model.layers.0.norm.weight", "layers.0.norm.weight");
        check("model.embeddings.weight", "embeddings.weight");
        check("lm_head.weight", "lm_head.weight");
        check(
            "layers.1.mixer.gate.e_score_correction.bias",
            "layers.1.mixer.gate.e_score_correction_bias",
        );
        check(
            "model.layers.1.mixer.experts.up_proj",
            "layers.1.mixer.experts.up_proj.weight",
        );
    }
}
