//! Sizes of the network out of GGUF keys: the inverse of the writer's architecture keys.
//!
//! Enters: metadata and tensor shapes. Leaves: [`NemotronHConfig`]. Reads no weights.
//!
//! Source: llama.cpp b11434, keys of `nemotron_h` and `nemotron_h_moe`.

use nemoconv_formats::gguf::{Array, Metadata, Value};

use super::StoredTensor;
use crate::error::Fault;
use crate::model::config::{MoeConfig, NemotronHConfig, TimeStep};
use crate::model::hybrid_pattern::{BlockKind, HybridPattern};

type Parsed<T> = Result<T, Fault>;

/// Reads the sizes.
///
/// # Errors
/// Another architecture, a key that is missing, of a wrong type or out of range.
pub fn parse(metadata: &Metadata, tensors: &[StoredTensor]) -> Parsed<NemotronHConfig> {
    let keys = Keys::new(metadata)?;
    let nextn = keys.size("nextn_predict_layers")?.unwrap_or(0);
    let blocks = keys.required("block_count")?.saturating_sub(nextn);
    let key_value_heads = keys.per_block("attention.head_count_kv", blocks)?;
    let feed_forward = keys.per_block("feed_forward_length", blocks)?;
    let kind = |(heads, width): (&usize, &usize)| match (*heads, *width) {
        (1.., _) => BlockKind::Attention,
        (0, 1..) if keys.is_moe() => BlockKind::Moe,
        (0, 1..) => BlockKind::Mlp,
        (0, 0) => BlockKind::Mamba,
    };
    let kinds: Vec<_> = key_value_heads
        .iter()
        .zip(&feed_forward)
        .map(kind)
        .collect();
    let pattern = HybridPattern::from_kinds(kinds).map_err(Fault::new)?;
    let heads = keys.required("ssm.time_step_rank")?;
    let inner = keys.required("ssm.inner_size")?;
    if !inner.is_multiple_of(heads) {
        return Err(Fault::new(format!(
            "ssm.inner_size {inner} is not a multiple of ssm.time_step_rank {heads}"
        )));
    }
    let embedding = tensors.iter().find(|t| t.name == "token_embd.weight");
    let rows = embedding.map_or(0, |tensor| tensor.rows);
    let moe = keys.is_moe().then(|| moe(&keys)).transpose()?;
    let config = NemotronHConfig {
        vocab_size: rows,
        hidden_size: keys.required("embedding_length")?,
        intermediate_size: feed_forward.iter().copied().find(|width| *width > 0),
        num_attention_heads: keys
            .per_block("attention.head_count", blocks)?
            .into_iter()
            .max()
            .unwrap_or(1),
        num_key_value_heads: key_value_heads
            .into_iter()
            .max()
            .filter(|heads| *heads > 0)
            .unwrap_or(1),
        head_dim: keys.required("attention.key_length")?,
        mamba_num_heads: heads,
        mamba_head_dim: inner / heads,
        n_groups: keys.required("ssm.group_count")?,
        ssm_state_size: keys.required("ssm.state_size")?,
        conv_kernel: keys.required("ssm.conv_kernel")?,
        rms_norm_eps: keys.float("attention.layer_norm_rms_epsilon")?,
        layer_norm_epsilon: keys
            .float("attention.layer_norm_epsilon")?
            .ok_or_else(|| keys.missing("attention.layer_norm_epsilon"))?,
        rope_theta: keys.float("rope.freq_base")?,
        tie_word_embeddings: !tensors.iter().any(|t| t.name == "output.weight"),
        time_step: TimeStep::UNLIMITED,
        nextn_predict_layers: 0,
        moe,
        pattern,
    };
    config.check_consistency()?;
    Ok(config)
}

fn moe(keys: &Keys) -> Parsed<MoeConfig> {
    let config = MoeConfig {
        n_routed_experts: keys.required("expert_count")?,
        num_experts_per_tok: keys.required("expert_used_count")?,
        n_group: keys.size("expert_group_count")?.unwrap_or(1).max(1),
        topk_group: keys.size("expert_group_used_count")?,
        moe_intermediate_size: keys.required("expert_feed_forward_length")?,
        moe_shared_expert_intermediate_size: keys.required("expert_shared_feed_forward_length")?,
        n_shared_experts: keys.size("expert_shared_count")?.unwrap_or(1),
        norm_topk_prob: keys.flag("expert_weights_norm")?.unwrap_or(false),
        // The runtime takes 0 and 1 for "no factor".
        routed_scaling_factor: keys
            .float("expert_weights_scale")?
            .filter(|scale| *scale != 0.0)
            .unwrap_or(1.0),
        moe_latent_size: keys.size("moe_latent_size")?.filter(|size| *size > 0),
    };
    config.check_consistency()?;
    Ok(config)
}

/// No size in the field is near this.
const MAX_SIZE: u64 = 1 << 28;

struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn new(metadata: &'a Metadata) -> Parsed<Self> {
        let Some(Value::String(architecture)) = metadata.get("general.architecture") else {
            return Err(Fault::new("key `general.architecture` is missing")
                .hint("this is not a GGUF model file"));
        };
        if !matches!(architecture.as_str(), "nemotron_h" | "nemotron_h_moe") {
            let what = format!(
                "architecture is `{architecture}`, expected `nemotron_h` or `nemotron_h_moe`"
            );
            return Err(Fault::new(what).hint("only Nemotron-H hybrids can be run"));
        }
        Ok(Self {
            metadata,
            architecture,
        })
    }

    fn is_moe(&self) -> bool {
        self.architecture == "nemotron_h_moe"
    }

    fn find(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&format!("{}.{key}", self.architecture))
    }

    fn missing(&self, key: &str) -> Fault {
        Fault::new(format!("key `{}.{key}` is missing", self.architecture))
    }

    fn wrong(&self, key: &str, expected: &str) -> Fault {
        Fault::new(format!(
            "key `{}.{key}` must be {expected}",
            self.architecture
        ))
    }

    fn size(&self, key: &str) -> Parsed<Option<usize>> {
        let Some(value) = self.find(key) else {
            return Ok(None);
        };
        integer(value)
            .map(Some)
            .ok_or_else(|| self.wrong(key, &format!("an integer from 0 to {MAX_SIZE}")))
    }

    fn required(&self, key: &str) -> Parsed<usize> {
        match self.size(key)? {
            Some(0) => Err(self.wrong(key, "positive")),
            Some(size) => Ok(size),
            None => Err(self.missing(key)),
        }
    }

    fn float(&self, key: &str) -> Parsed<Option<f32>> {
        match self.find(key) {
            None => Ok(None),
            Some(Value::F32(number)) if number.is_finite() => Ok(Some(*number)),
            Some(_) => Err(self.wrong(key, "a finite f32")),
        }
    }

    fn flag(&self, key: &str) -> Parsed<Option<bool>> {
        match self.find(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "a boolean")),
        }
    }

    /// One size per block: an array, or one number for all.
    fn per_block(&self, key: &str, blocks: usize) -> Parsed<Vec<usize>> {
        let value = self.find(key).ok_or_else(|| self.missing(key))?;
        let sizes: Option<Vec<usize>> = match value {
            Value::Array(Array::I32(sizes)) => {
                sizes.iter().map(|s| integer(&Value::I32(*s))).collect()
            }
            Value::Array(Array::U32(sizes)) => {
                sizes.iter().map(|s| integer(&Value::U32(*s))).collect()
            }
            single => integer(single).map(|size| vec![size; blocks]),
        };
        match sizes {
            Some(mut sizes) if sizes.len() >= blocks => {
                sizes.truncate(blocks);
                Ok(sizes)
            }
            _ => Err(self.wrong(key, &format!("a size, or one for each of {blocks} blocks"))),
        }
    }
}

fn integer(value: &Value) -> Option<usize> {
    let number = match *value {
        Value::U8(n) => u64::from(n),
        Value::U16(n) => u64::from(n),
        Value::U32(n) => u64::from(n),
        Value::U64(n) => n,
        Value::I32(n) => u64::try_from(n).ok()?,
        Value::I64(n) => u64::try_from(n).ok()?,
        _ => return None,
    };
    (number <= MAX_SIZE).then_some(number as usize)
}
