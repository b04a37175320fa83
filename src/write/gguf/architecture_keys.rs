//! Keys of the network's sizes, in the stock converter's order and types.
//!
//! Enters: a [`Plan`]. Leaves: entries of [`Metadata`]. Reads no files.

use nemoconv_formats::gguf::{Array, Metadata, Value};

use crate::model::config::{MoeConfig, NemotronHConfig};
use crate::model::hybrid_pattern::BlockKind;
use crate::plan::Plan;

/// The converter's constant for this architecture, whatever the config says: there are no positions.
const CONTEXT_LENGTH: u32 = 1 << 20;
/// Version of the block formats (`GGML_QNT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;

/// `nemotron_h`, or `nemotron_h_moe` with experts.
pub fn architecture(config: &NemotronHConfig) -> &'static str {
    if config.moe.is_some() {
        "nemotron_h_moe"
    } else {
        "nemotron_h"
    }
}

/// Appends the sizes, the file type and what widening changed.
///
/// Source: llama.cpp b11434 `conversion/base.py`, `conversion/granite.py`, `conversion/nemotron.py`.
pub fn architecture_keys(plan: &Plan, metadata: &mut Metadata) {
    let config = &plan.config;
    let arch = architecture(config);
    let mut set = |key: &str, value: Value| metadata.set(format!("{arch}.{key}"), value);
    let head_dim = u32_of(config.head_dim);

    set("block_count", u32_of(plan.block_count()));
    set("context_length", CONTEXT_LENGTH.into());
    set("embedding_length", u32_of(plan.widening.to.hidden));
    set("feed_forward_length", feed_forward_lengths(plan));
    set("attention.head_count", u32_of(config.num_attention_heads));
    set("attention.head_count_kv", key_value_heads(plan));
    if let Some(theta) = config.rope_theta {
        set("rope.freq_base", theta.into());
    }
    if let Some(eps) = config.rms_norm_eps {
        set("attention.layer_norm_rms_epsilon", eps.into());
    }
    set(
        "attention.layer_norm_epsilon",
        config.layer_norm_epsilon.into(),
    );
    if let Some(moe) = &config.moe {
        routing_keys(moe, &mut set);
    }
    metadata.set("general.file_type", plan.file_type.id());

    let mut set = |key: &str, value: Value| metadata.set(format!("{arch}.{key}"), value);
    set("vocab_size", u32_of(config.vocab_size));
    // The converter divides the widths and ignores head_dim; the runtime does not use the value.
    set(
        "rope.dimension_count",
        u32_of(config.hidden_size / config.num_attention_heads),
    );
    set("ssm.conv_kernel", u32_of(config.conv_kernel));
    set("ssm.state_size", u32_of(config.ssm_state_size));
    set("ssm.group_count", u32_of(config.n_groups));
    set("ssm.inner_size", u32_of(config.inner_size()));
    set("ssm.time_step_rank", u32_of(config.mamba_num_heads));
    set("rope.scaling.finetuned", false.into());
    set("attention.key_length", head_dim.clone());
    set("attention.value_length", head_dim);
    if let Some(moe) = &config.moe {
        expert_keys(moe, plan, &mut set);
    }
    metadata.set("general.quantization_version", QUANTIZATION_VERSION);
    for (field, from, _) in plan.widening.changes() {
        metadata.set(format!("nemoconv.widened_from.{field}"), u32_of(from));
    }
}

fn routing_keys(moe: &MoeConfig, set: &mut impl FnMut(&str, Value)) {
    set("expert_count", u32_of(moe.n_routed_experts));
    set("expert_used_count", u32_of(moe.num_experts_per_tok));
    set("expert_group_count", u32_of(moe.n_group));
    if let Some(groups) = moe.topk_group {
        set("expert_group_used_count", u32_of(groups));
    }
}

fn expert_keys(moe: &MoeConfig, plan: &Plan, set: &mut impl FnMut(&str, Value)) {
    let widths = plan.widening.to;
    set(
        "expert_feed_forward_length",
        u32_of(widths.expert_intermediate),
    );
    set(
        "expert_shared_feed_forward_length",
        u32_of(widths.shared_intermediate),
    );
    set("expert_shared_count", u32_of(moe.n_shared_experts));
    set("expert_weights_norm", moe.norm_topk_prob.into());
    set("expert_weights_scale", moe.routed_scaling_factor.into());
    if widths.latent > 0 {
        set("moe_latent_size", u32_of(widths.latent));
    }
    if plan.with_mtp {
        set(
            "nextn_predict_layers",
            u32_of(plan.config.nextn_predict_layers),
        );
    }
}

/// Per block: the MLP or expert width, 0 where there is none.
fn feed_forward_lengths(plan: &Plan) -> Value {
    let widths = plan.widening.to;
    per_block(plan, |kind| match kind {
        BlockKind::Mlp => widths.intermediate,
        BlockKind::Moe => widths.expert_intermediate,
        BlockKind::Mamba | BlockKind::Attention => 0,
    })
}

/// Per block: key-value heads, 0 where there is no attention.
fn key_value_heads(plan: &Plan) -> Value {
    let heads = plan.config.num_key_value_heads;
    per_block(plan, |kind| {
        if kind == BlockKind::Attention {
            heads
        } else {
            0
        }
    })
}

/// A multi-token-prediction block is both attention and MoE.
fn per_block(plan: &Plan, length: impl Fn(BlockKind) -> usize) -> Value {
    let kinds = plan.config.pattern.kinds().iter().map(|kind| length(*kind));
    let mtp = plan
        .with_mtp
        .then(|| length(BlockKind::Attention).max(length(BlockKind::Moe)));
    Value::Array(Array::I32(
        kinds.chain(mtp).map(|length| length as i32).collect(),
    ))
}

/// Config sizes are capped far below 2^32.
fn u32_of(size: usize) -> Value {
    Value::U32(size as u32)
}
