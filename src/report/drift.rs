//! The figures of the logits level.
//!
//! Enters: what `validate::logits` accumulated. Leaves: plain numbers for the renderers. Computes nothing.

use serde::{Deserialize, Serialize};

/// A figure with its standard error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// One standard error.
    pub error: f64,
}

/// Order statistics, by linear interpolation between neighbours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distribution {
    /// Mean and its standard error.
    pub mean: Estimate,
    /// Smallest.
    pub min: f64,
    /// 0.1 %.
    pub p0_1: f64,
    /// 1 %.
    pub p1: f64,
    /// 5 %.
    pub p5: f64,
    /// 10 %.
    pub p10: f64,
    /// 25 %.
    pub p25: f64,
    /// 50 %.
    pub median: f64,
    /// 75 %.
    pub p75: f64,
    /// 90 %.
    pub p90: f64,
    /// 95 %.
    pub p95: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p99_9: f64,
    /// Largest.
    pub max: f64,
}

/// Counts between edges. Values below the first edge count into the first bin, above the last into the last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Histogram {
    /// One more than `counts`, rising by a constant factor.
    pub edges: Vec<f64>,
    /// Positions per bin.
    pub counts: Vec<u64>,
}

/// What a compact reference leaves open about the mean KL divergence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlBounds {
    /// The mean is at least this.
    pub lower: f64,
    /// The mean is at most this.
    pub upper: f64,
    /// Mean probability that the reference gives to tokens it did not keep.
    pub tail_mass: f64,
}

/// How far the predictions of the artifact are from those of the reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogitsDrift {
    /// Positions that count.
    pub positions: u64,
    /// Positions left out because a logit was not a number.
    pub non_finite_positions: u64,
    /// Chunks of the text.
    pub chunks: u64,
    /// Tokens of a chunk.
    pub context_tokens: u64,
    /// Rows of the output matrix.
    pub vocab_size: u64,
    /// KL(reference || artifact) per position, in nats.
    pub kl_divergence: Distribution,
    /// Set if the reference is compact; `kl_divergence` then lumps the tokens that were not kept.
    pub kl_bounds: Option<KlBounds>,
    /// KL divergence of the positions whose expert sets did not change.
    pub kl_unchanged_routing: Option<Estimate>,
    /// KL divergence of all positions.
    pub kl_histogram: Histogram,
    /// Share of positions whose most likely token is the same.
    pub top1_agreement: Estimate,
    /// Probability of the true token, artifact minus reference.
    pub delta_p: Distribution,
    /// Root of the mean square of `delta_p`.
    pub delta_p_rms: Estimate,
    /// llama.cpp's chunked perplexity of the artifact.
    pub perplexity: Estimate,
    /// The same of the reference.
    pub perplexity_reference: Estimate,
    /// Ratio of the two; its error takes their covariance into account.
    pub perplexity_ratio: Estimate,
    /// ln of the ratio.
    pub ln_perplexity_ratio: Estimate,
    /// Artifact minus reference.
    pub perplexity_difference: Estimate,
    /// Correlation of the two log-perplexities; `None` if either does not vary.
    pub correlation: Option<f64>,
    /// The same by position in the chunk.
    pub buckets: Vec<BucketDrift>,
}

/// Positions `from..to` of every chunk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketDrift {
    /// First position.
    pub from: u64,
    /// One past the last.
    pub to: u64,
    /// Positions that count.
    pub positions: u64,
    /// Mean KL divergence.
    pub kl_divergence: Estimate,
    /// 99 % of it.
    pub kl_p99: f64,
    /// Share of positions whose most likely token is the same.
    pub top1_agreement: Estimate,
    /// Perplexity of the artifact.
    pub perplexity: Estimate,
    /// Perplexity of the reference.
    pub perplexity_reference: Estimate,
    /// Ratio of the two.
    pub perplexity_ratio: Estimate,
}

/// How far the output of one block is from the reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerDrift {
    /// Index of the block.
    pub layer: usize,
    /// `mamba2`, `attention`, `mlp` or `moe`.
    pub kind: String,
    /// Tokens compared.
    pub tokens: u64,
    /// Tokens left out because a value was not a number.
    pub non_finite_tokens: u64,
    /// Mean over tokens of ||h - h_ref|| / ||h_ref||.
    pub relative_error: f64,
    /// Largest over tokens.
    pub max_relative_error: f64,
    /// For Mamba-2 blocks.
    pub state: Option<StateDrift>,
    /// For MoE blocks.
    pub experts: Option<ExpertDrift>,
}

/// Relative error of an SSM state, over time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateDrift {
    /// Tokens seen at each measurement, rising.
    pub times: Vec<u64>,
    /// Mean over heads and sequences at each time.
    pub relative_error: Vec<f64>,
    /// Number of heads.
    pub heads: usize,
    /// Heads whose error grows with time, the worst first.
    pub growing: Vec<HeadDrift>,
}

/// The state of one head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadDrift {
    /// Index of the head.
    pub head: usize,
    /// Mean over sequences, at the times of its layer.
    pub relative_error: Vec<f64>,
    /// Slope of log error against log time: 0 is steady, 1 grows with the length of the text.
    pub growth: f64,
}

/// How often the router decides otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertDrift {
    /// Tokens compared.
    pub tokens: u64,
    /// Share of tokens whose set of experts changes.
    pub changed_tokens: f64,
    /// Share of chosen experts that change.
    pub changed_experts: f64,
}

/// The measures of a comparison in which only rounding acts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseFloor {
    /// What was rounded, such as `BF16 rounding of the reference`.
    pub what: String,
    /// Drift of the predictions.
    pub logits: LogitsDrift,
    /// Drift of every block's output.
    pub layers: Vec<LayerDrift>,
}
