//! `config.json` of a Nemotron-H checkpoint, parsed once into sizes that need no re-checking.
//!
//! Enters: the JSON as the checkpoint has it. Leaves: [`NemotronHConfig`]. Knows no tensors.

use nemoconv_formats::checkpoint::Checkpoint;
use serde_json::Value;

use super::hybrid_pattern::{BlockKind, HybridPattern};
use crate::error::{Error, Fault};

/// Sizes of the network. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are the config's")]
pub struct NemotronHConfig {
    pub pattern: HybridPattern,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: Option<usize>,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub mamba_num_heads: usize,
    pub mamba_head_dim: usize,
    pub n_groups: usize,
    pub ssm_state_size: usize,
    pub conv_kernel: usize,
    /// `rms_norm_eps`, else `norm_eps`.
    pub rms_norm_eps: Option<f32>,
    /// `layer_norm_epsilon`, else the RMS epsilon: the runtime requires one.
    pub layer_norm_epsilon: f32,
    pub rope_theta: Option<f32>,
    pub tie_word_embeddings: bool,
    pub time_step: TimeStep,
    /// Present when the pattern has MoE blocks.
    pub moe: Option<MoeConfig>,
    /// `num_nextn_predict_layers`: multi-token-prediction heads.
    pub nextn_predict_layers: usize,
}

/// Bounds of the Mamba-2 time step after softplus.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimeStep {
    /// `time_step_limit`: the bounds the model was trained with.
    pub limit: (f32, f32),
    /// `time_step_min`: an initialisation range that transformers' chunked path takes for a lower bound.
    pub min: f32,
}

impl TimeStep {
    /// No bounds: what llama.cpp computes, and the default of the family.
    pub const UNLIMITED: Self = Self {
        limit: (0.0, f32::INFINITY),
        min: 0.001,
    };

    fn parse(fields: &Fields) -> Result<Self, Fault> {
        let min = fields.float(&["time_step_min"])?;
        let limit = match fields.json.get("time_step_limit") {
            None | Some(Value::Null) => Self::UNLIMITED.limit,
            Some(Value::Array(bounds)) if bounds.len() == 2 => {
                let bound = |value| bound(value).ok_or_else(|| time_step_fault(value));
                (bound(&bounds[0])?, bound(&bounds[1])?)
            }
            Some(other) => return Err(time_step_fault(other)),
        };
        if limit.0 > limit.1 {
            return Err(time_step_fault(&fields.json["time_step_limit"]));
        }
        Ok(Self {
            limit,
            min: min.unwrap_or(Self::UNLIMITED.min),
        })
    }
}

/// A number, or infinity in one of its spellings: `Infinity`, or `{"__float__": "Infinity"}` as transformers 5 writes.
fn bound(value: &Value) -> Option<f32> {
    let word = value.get("__float__").unwrap_or(value);
    match word.as_str() {
        Some("Infinity" | "inf") => Some(f32::INFINITY),
        Some("-Infinity" | "-inf") => Some(f32::NEG_INFINITY),
        Some(_) => None,
        None => word.as_f64().map(|number| number as f32),
    }
}

fn time_step_fault(found: &Value) -> Fault {
    Fault::new(format!(
        "`time_step_limit` must be two numbers, the smaller first, found {found}"
    ))
}

/// Sizes of the MoE blocks.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are the config's")]
pub struct MoeConfig {
    pub n_routed_experts: usize,
    pub num_experts_per_tok: usize,
    pub n_group: usize,
    pub topk_group: Option<usize>,
    pub moe_intermediate_size: usize,
    pub moe_shared_expert_intermediate_size: usize,
    pub n_shared_experts: usize,
    pub norm_topk_prob: bool,
    pub routed_scaling_factor: f32,
    pub moe_latent_size: Option<usize>,
}

/// ggml's compile-time maximum of blocks (`LLAMA_MAX_LAYERS`).
const MAX_BLOCKS: usize = 512;
/// llama.cpp's compile-time maximum of experts (`LLAMA_MAX_EXPERTS`), rounded up for newer releases.
const MAX_EXPERTS: usize = 4096;
/// No width in the field is near this; keeps products of two sizes far from overflow.
const MAX_SIZE: u64 = 1 << 28;

impl NemotronHConfig {
    /// Reads `config.json` beside the weights: the whole of it, and the sizes.
    ///
    /// # Errors
    /// It is not there, cannot be read, or as [`Self::parse`].
    pub fn open(checkpoint: &Checkpoint) -> Result<(Value, Self), Error> {
        const NAME: &str = "config.json";
        let absent = || {
            let fault = Fault::new("there is no config.json beside the weights");
            let fault = fault.in_file(checkpoint.folder());
            Error::Model(fault.hint("point to a complete model folder"))
        };
        let json = checkpoint.read_json(NAME)?.ok_or_else(absent)?;
        let of_file = |fault: Fault| Error::Model(fault.in_file(checkpoint.folder().join(NAME)));
        let config = Self::parse(&json).map_err(of_file)?;
        Ok((json, config))
    }

    /// Reads the sizes out of `config.json`.
    ///
    /// # Errors
    /// The first field that is missing, of the wrong type or out of range.
    pub fn parse(json: &Value) -> Result<Self, Fault> {
        check_model_type(json)?;
        let fields = Fields { json };
        let pattern = parse_pattern(json)?;
        if pattern.kinds().len() > MAX_BLOCKS {
            return Err(Fault::new(format!(
                "{} blocks, the runtime's limit is {MAX_BLOCKS}",
                pattern.kinds().len()
            )));
        }
        let moe = pattern
            .has(BlockKind::Moe)
            .then(|| MoeConfig::parse(&fields))
            .transpose()?;
        if moe.is_some() && pattern.has(BlockKind::Mlp) {
            return Err(
                Fault::new("the pattern mixes dense MLP (-) and MoE (E) blocks")
                    .hint("no GGUF architecture of llama.cpp can express such a model"),
            );
        }
        check_block_count(&fields, &pattern)?;
        fields.size(&["max_position_embeddings"])?;
        let rms_norm_eps = fields.positive(&["rms_norm_eps", "norm_eps"])?;
        let layer_norm_epsilon = fields
            .positive(&["layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"])?
            .or(rms_norm_eps)
            .ok_or_else(|| missing("layer_norm_epsilon"))?;
        let nextn = fields.size(&["num_nextn_predict_layers"])?.unwrap_or(0);
        let config = Self {
            vocab_size: fields.required(&["vocab_size"])?,
            hidden_size: fields.required(&["hidden_size"])?,
            intermediate_size: fields.size(&["intermediate_size"])?,
            num_attention_heads: fields.required(&["num_attention_heads"])?,
            num_key_value_heads: fields.required(&["num_key_value_heads"])?,
            head_dim: fields.required(&["head_dim", "attention_head_dim"])?,
            mamba_num_heads: fields.required(&["mamba_num_heads", "num_heads"])?,
            mamba_head_dim: fields.required(&["mamba_head_dim"])?,
            n_groups: fields.required(&["n_groups", "mamba_n_groups", "num_groups"])?,
            ssm_state_size: fields.required(&[
                "ssm_state_size",
                "state_size",
                "mamba_state_size",
            ])?,
            conv_kernel: fields.required(&[
                "conv_kernel",
                "mamba_conv_kernel",
                "d_conv",
                "mamba_d_conv",
            ])?,
            rms_norm_eps,
            layer_norm_epsilon,
            rope_theta: fields.float(&["rope_theta"])?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            time_step: TimeStep::parse(&fields)?,
            nextn_predict_layers: if moe.is_some() { nextn } else { 0 },
            moe,
            pattern,
        };
        config.check_consistency()?;
        Ok(config)
    }

    /// `d_inner`: width of the Mamba-2 state inputs, heads x head dim (never `expand`).
    pub fn inner_size(&self) -> usize {
        self.mamba_num_heads * self.mamba_head_dim
    }

    /// Channels of the convolution: x, B and C.
    pub fn conv_dim(&self) -> usize {
        self.inner_size() + 2 * self.n_groups * self.ssm_state_size
    }

    /// The epsilon of every norm: block norms, gated norm, final norm.
    pub fn norm_epsilon(&self) -> f32 {
        self.layer_norm_epsilon
    }

    /// Whether the sizes fit each other.
    pub(crate) fn check_consistency(&self) -> Result<(), Fault> {
        let check = |ok: bool, what: String| if ok { Ok(()) } else { Err(Fault::new(what)) };
        check(
            self.inner_size().is_multiple_of(self.n_groups),
            format!(
                "inner size {} is not a multiple of n_groups {}",
                self.inner_size(),
                self.n_groups
            ),
        )?;
        check(
            self.num_attention_heads
                .is_multiple_of(self.num_key_value_heads),
            format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ),
        )?;
        check(
            self.intermediate_size.is_some() || !self.pattern.has(BlockKind::Mlp),
            "`intermediate_size` is missing although the pattern has MLP blocks".into(),
        )?;
        check(
            self.nextn_predict_layers <= 1,
            format!(
                "num_nextn_predict_layers is {}, at most 1 is known",
                self.nextn_predict_layers
            ),
        )
    }
}

impl MoeConfig {
    fn parse(fields: &Fields) -> Result<Self, Fault> {
        let config = Self {
            n_routed_experts: fields.required(&["n_routed_experts"])?,
            num_experts_per_tok: fields.required(&["num_experts_per_tok"])?,
            n_group: fields.size(&["n_group"])?.unwrap_or(1),
            topk_group: fields.size(&["topk_group"])?,
            moe_intermediate_size: fields.required(&["moe_intermediate_size"])?,
            moe_shared_expert_intermediate_size: fields
                .required(&["moe_shared_expert_intermediate_size"])?,
            n_shared_experts: fields.size(&["n_shared_experts"])?.unwrap_or(1),
            norm_topk_prob: fields.flag("norm_topk_prob")?.unwrap_or(true),
            routed_scaling_factor: fields.float(&["routed_scaling_factor"])?.unwrap_or(1.0),
            moe_latent_size: fields.size(&["moe_latent_size"])?,
        };
        config.check_consistency()?;
        Ok(config)
    }

    /// Whether the sizes fit each other.
    pub(crate) fn check_consistency(&self) -> Result<(), Fault> {
        if self.n_routed_experts > MAX_EXPERTS {
            return Err(Fault::new(format!(
                "n_routed_experts is {}, the limit is {MAX_EXPERTS}",
                self.n_routed_experts
            )));
        }
        if self.num_experts_per_tok > self.n_routed_experts {
            return Err(Fault::new(format!(
                "num_experts_per_tok {} exceeds n_routed_experts {}",
                self.num_experts_per_tok, self.n_routed_experts
            )));
        }
        let groups = self.n_group.max(1);
        if !self.n_routed_experts.is_multiple_of(groups) {
            return Err(Fault::new(format!(
                "n_routed_experts {} is not a multiple of n_group {groups}",
                self.n_routed_experts
            )));
        }
        Ok(())
    }
}

/// Whether the config is of a model this library converts.
fn check_model_type(json: &Value) -> Result<(), Fault> {
    let model_type = json.get("model_type").and_then(Value::as_str);
    let architecture = json.pointer("/architectures/0").and_then(Value::as_str);
    if let Some(found) = model_type.filter(|found| *found != "nemotron_h") {
        return Err(another_architecture(format!(
            "`model_type` must be nemotron_h, found {found}"
        )));
    }
    let known = model_type.is_some() || architecture == Some("NemotronHForCausalLM");
    if known && architecture.is_none_or(|name| name == "NemotronHForCausalLM") {
        return Ok(());
    }
    let found = architecture.or(model_type).unwrap_or("nothing");
    Err(another_architecture(format!(
        "`architectures` must be NemotronHForCausalLM, found {found}"
    )))
}

fn another_architecture(what: String) -> Fault {
    Fault::new(what).hint("this converter knows Nemotron-H hybrids only (dense, MoE, latent MoE)")
}

/// A count of blocks, where there is one, is that of the pattern.
fn check_block_count(fields: &Fields, pattern: &HybridPattern) -> Result<(), Fault> {
    let expected = pattern.kinds().len();
    match fields.size(&["num_hidden_layers"])? {
        Some(found) if found != expected => Err(Fault::new(format!(
            "`num_hidden_layers` must be the {expected} blocks of the pattern, found {found}"
        ))),
        _ => Ok(()),
    }
}

fn parse_pattern(json: &Value) -> Result<HybridPattern, Fault> {
    let value = ["hybrid_override_pattern", "layers_block_type"]
        .iter()
        .find_map(|key| json.get(key).filter(|value| !value.is_null()))
        .ok_or_else(|| missing("hybrid_override_pattern"))?;
    HybridPattern::parse(value).map_err(Fault::new)
}

fn missing(field: &str) -> Fault {
    Fault::new(format!("`{field}` is missing"))
}

/// Typed look-up by alternative names.
struct Fields<'a> {
    json: &'a Value,
}

impl<'a> Fields<'a> {
    fn find(&self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names
            .iter()
            .find_map(|name| Some((*name, self.json.get(name).filter(|v| !v.is_null())?)))
    }

    fn size(&self, names: &[&'static str]) -> Result<Option<usize>, Fault> {
        let Some((name, value)) = self.find(names) else {
            return Ok(None);
        };
        let size = value.as_u64().filter(|size| *size <= MAX_SIZE);
        size.map(|size| Some(size as usize)).ok_or_else(|| {
            Fault::new(format!(
                "`{name}` must be an integer from 0 to {MAX_SIZE}, found {value}"
            ))
        })
    }

    /// A size that must be there and positive.
    fn required(&self, names: &[&'static str]) -> Result<usize, Fault> {
        match self.size(names)? {
            Some(0) => Err(Fault::new(format!("`{}` must not be 0", names[0]))),
            Some(size) => Ok(size),
            None => Err(missing(names[0])),
        }
    }

    fn float(&self, names: &[&'static str]) -> Result<Option<f32>, Fault> {
        let Some((name, value)) = self.find(names) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|number| number.is_finite());
        number
            .map(|number| Some(number as f32))
            .ok_or_else(|| Fault::new(format!("`{name}` must be a finite number, found {value}")))
    }

    /// A number above zero.
    fn positive(&self, names: &[&'static str]) -> Result<Option<f32>, Fault> {
        match (self.float(names)?, self.find(names)) {
            (Some(number), Some((name, found))) if number <= 0.0 => Err(Fault::new(format!(
                "`{name}` must be above 0, found {found}"
            ))),
            (number, _) => Ok(number),
        }
    }

    fn flag(&self, name: &'static str) -> Result<Option<bool>, Fault> {
        let Some((name, value)) = self.find(&[name]) else {
            return Ok(None);
        };
        let flag = value.as_bool();
        flag.map(Some)
            .ok_or_else(|| Fault::new(format!("`{name}` must be true or false, found {value}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn dense() -> Value {
        json!({
            "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
            "hybrid_override_pattern": "M-*", "vocab_size": 64, "hidden_size": 32,
            "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
            "ssm_state_size": 8, "conv_kernel": 4, "layer_norm_epsilon": 1e-5
        })
    }

    fn rejects(field: &str, value: Value, expected: &str) {
        let mut json = dense();
        json[field] = value;
        let fault = NemotronHConfig::parse(&json).unwrap_err();
        assert!(fault.what.contains(expected), "{field}: {}", fault.what);
    }

    #[test]
    fn sizes_come_from_heads_not_from_expand() {
        let mut json = dense();
        json["expand"] = json!(99);
        let config = NemotronHConfig::parse(&json).unwrap();
        assert_eq!((config.inner_size(), config.conv_dim()), (64, 96));
        assert_eq!(config.moe, None);
    }

    #[test]
    fn a_dense_pattern_stays_dense_whatever_moe_defaults_the_config_carries() {
        let mut json = dense();
        json["num_experts_per_tok"] = json!(2);
        json["num_nextn_predict_layers"] = json!(1);
        let config = NemotronHConfig::parse(&json).unwrap();
        assert_eq!((config.moe, config.nextn_predict_layers), (None, 0));
    }

    #[test]
    fn faults_name_the_field() {
        rejects("hidden_size", json!(null), "`hidden_size` is missing");
        rejects("hidden_size", json!(0), "must not be 0");
        rejects("hidden_size", json!(-4), "found -4");
        rejects("hidden_size", json!(u64::MAX), "must be an integer");
        rejects("n_groups", json!(3), "not a multiple of n_groups");
        rejects(
            "num_key_value_heads",
            json!(3),
            "not a multiple of num_key_value_heads",
        );
        rejects("intermediate_size", json!(null), "MLP blocks");
        rejects("layer_norm_epsilon", json!("Infinity"), "finite number");
        rejects(
            "layer_norm_epsilon",
            json!(-1e-5),
            "must be above 0, found -0.00001",
        );
        rejects("rms_norm_eps", json!(0), "must be above 0, found 0");
        rejects(
            "num_hidden_layers",
            json!(4),
            "the 3 blocks of the pattern, found 4",
        );
        rejects("max_position_embeddings", json!(-1), "found -1");
        rejects(
            "time_step_limit",
            json!([1, 0]),
            "the smaller first, found [1,0]",
        );
        rejects(
            "model_type",
            json!("llama"),
            "`model_type` must be nemotron_h, found llama",
        );
        rejects(
            "architectures",
            json!(["LlamaForCausalLM"]),
            "LlamaForCausalLM",
        );
        rejects("hybrid_override_pattern", json!("MX"), "`X`");
        rejects(
            "hybrid_override_pattern",
            json!("ME"),
            "`n_routed_experts` is missing",
        );
    }
}
