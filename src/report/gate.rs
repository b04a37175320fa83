//! Gates: limits that a release has to keep, from flags or from a reviewed YAML file.
//!
//! Enters: limits and a report. Leaves: one [`GateResult`] per limit. A figure that was not measured, or is not a
//! number, keeps no limit.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Finding, Rule, Severity, ValidationReport};
use crate::error::{Error, Fault, Result};
use crate::formats;

/// A gates file is a page, not a data set.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// The limits. Names are those of the flags without their dashes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Gates {
    /// Mean KL divergence, in nats.
    pub max_kld: Option<f64>,
    /// 99 % of the KL divergence.
    pub max_kld_p99: Option<f64>,
    /// Top-1 agreement, a share.
    pub min_top1: Option<f64>,
    /// Perplexity of the artifact over that of the reference.
    pub max_ppl_ratio: Option<f64>,
    /// Largest relative error of a layer's output.
    pub max_layer_error: Option<f64>,
    /// Largest relative error of an SSM state at its last measurement.
    pub max_state_drift: Option<f64>,
    /// Share of tokens whose expert set changes, in the worst layer.
    pub max_expert_changes: Option<f64>,
    /// Findings that fail; empty means errors.
    pub fail_on: Vec<FailOn>,
}

/// One of the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    /// [`Gates::max_kld`].
    MaxKld,
    /// [`Gates::max_kld_p99`].
    MaxKldP99,
    /// [`Gates::min_top1`].
    MinTop1,
    /// [`Gates::max_ppl_ratio`].
    MaxPplRatio,
    /// [`Gates::max_layer_error`].
    MaxLayerError,
    /// [`Gates::max_state_drift`].
    MaxStateDrift,
    /// [`Gates::max_expert_changes`].
    MaxExpertChanges,
}

impl Gate {
    /// All of them, in the order they are reported.
    pub const ALL: [Self; 7] = [
        Self::MaxKld,
        Self::MaxKldP99,
        Self::MinTop1,
        Self::MaxPplRatio,
        Self::MaxLayerError,
        Self::MaxStateDrift,
        Self::MaxExpertChanges,
    ];

    /// The flag without its dashes.
    pub fn name(self) -> &'static str {
        match self {
            Self::MaxKld => "max-kld",
            Self::MaxKldP99 => "max-kld-p99",
            Self::MinTop1 => "min-top1",
            Self::MaxPplRatio => "max-ppl-ratio",
            Self::MaxLayerError => "max-layer-error",
            Self::MaxStateDrift => "max-state-drift",
            Self::MaxExpertChanges => "max-expert-changes",
        }
    }

    /// What is measured.
    pub fn measure(self) -> &'static str {
        match self {
            Self::MaxKld => "mean KL divergence",
            Self::MaxKldP99 => "99 % KL divergence",
            Self::MinTop1 => "top-1 agreement",
            Self::MaxPplRatio => "perplexity ratio",
            Self::MaxLayerError => "largest layer error",
            Self::MaxStateDrift => "largest SSM state error",
            Self::MaxExpertChanges => "expert sets changed",
        }
    }

    /// The finding that a failure of this gate is.
    pub fn rule(self) -> Rule {
        match self {
            Self::MaxKld | Self::MaxKldP99 => Rule::KlAboveGate,
            Self::MinTop1 => Rule::Top1BelowGate,
            Self::MaxPplRatio => Rule::PerplexityAboveGate,
            Self::MaxLayerError => Rule::LayerErrorAboveGate,
            Self::MaxStateDrift => Rule::StateDriftAboveGate,
            Self::MaxExpertChanges => Rule::RoutingAboveGate,
        }
    }

    /// The comparison that has to hold.
    pub fn sign(self) -> &'static str {
        if self == Self::MinTop1 { "≥" } else { "≤" }
    }

    fn holds(self, measured: f64, limit: f64) -> bool {
        if self == Self::MinTop1 {
            measured >= limit
        } else {
            measured <= limit
        }
    }

    fn measured(self, report: &ValidationReport) -> Option<f64> {
        let logits = report.logits.as_ref().filter(|logits| logits.positions > 0);
        // The rest of a layer says nothing where some of it is not a number.
        let is_sound = report
            .layers
            .iter()
            .all(|layer| layer.non_finite_tokens == 0);
        let layers = report.layers.iter().filter(|_| is_sound);
        match self {
            Self::MaxKld => Some(logits?.kl_divergence.mean.value),
            Self::MaxKldP99 => Some(logits?.kl_divergence.p99),
            Self::MinTop1 => Some(logits?.top1_agreement.value),
            Self::MaxPplRatio => Some(logits?.perplexity_ratio.value),
            Self::MaxLayerError => largest(layers.map(|layer| layer.relative_error)),
            Self::MaxStateDrift => largest(layers.filter_map(|layer| {
                let state = layer.state.as_ref()?;
                state.relative_error.last().copied()
            })),
            Self::MaxExpertChanges => largest(layers.filter_map(|layer| {
                let experts = layer.experts.as_ref()?;
                Some(experts.changed_tokens)
            })),
        }
    }

    /// What makes a limit of this gate senseless.
    fn objection(self, limit: f64) -> Option<&'static str> {
        let is_share = matches!(self, Self::MinTop1 | Self::MaxExpertChanges);
        if !limit.is_finite() || limit < 0.0 {
            Some("a limit is a number from 0 up")
        } else if is_share && limit > 1.0 {
            Some("it is a share: write 98 % as 0.98")
        } else if self == Self::MaxPplRatio && limit < 0.5 {
            Some("it is a ratio: write 2 % more as 1.02")
        } else {
            None
        }
    }
}

/// The largest value; NaN if one is NaN.
fn largest(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.reduce(|a, b| if a.is_nan() || a > b { a } else { b })
}

/// Whether a limit was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was.
    Passed,
    /// It was not.
    Failed,
    /// The figure was not measured, so nobody can say; the validation fails.
    NotMeasured,
}

/// A limit and what it was held against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateResult {
    /// Which.
    pub gate: Gate,
    /// The limit.
    pub limit: f64,
    /// The figure; `None` if it was not measured or is not a number.
    pub measured: Option<f64>,
    /// The answer.
    pub outcome: Outcome,
}

impl fmt::Display for GateResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let measure = self.gate.measure();
        let (sign, limit) = (self.gate.sign(), self.limit);
        match self.measured {
            Some(measured) => {
                let measured = super::text::figure(measured);
                write!(f, "{measure} is {measured}, asked for {sign} {limit}")
            }
            None => write!(f, "{measure} was not measured, asked for {sign} {limit}"),
        }
    }
}

/// Which findings fail a validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailOn {
    /// Findings of this severity or a higher one.
    Severity(Severity),
    /// Findings of this rule, whatever their severity.
    Rule(Rule),
    /// None.
    Never,
}

impl Default for FailOn {
    fn default() -> Self {
        Self::Severity(Severity::Error)
    }
}

impl FailOn {
    /// Whether `finding` fails.
    pub fn covers(self, finding: &Finding) -> bool {
        match self {
            Self::Severity(severity) => finding.severity >= severity,
            Self::Rule(rule) => finding.rule == rule,
            Self::Never => false,
        }
    }
}

impl fmt::Display for FailOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Severity(severity) => severity.fmt(f),
            Self::Rule(rule) => rule.fmt(f),
            Self::Never => f.write_str("never"),
        }
    }
}

impl FromStr for FailOn {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "note" => Ok(Self::Severity(Severity::Note)),
            "warning" => Ok(Self::Severity(Severity::Warning)),
            "error" => Ok(Self::Severity(Severity::Error)),
            "never" => Ok(Self::Never),
            id => Rule::of_id(id).map(Self::Rule).ok_or_else(|| {
                format!("`{id}` is neither note, warning, error, never nor the id of a finding")
            }),
        }
    }
}

impl Serialize for FailOn {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FailOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl Gates {
    /// Reads a YAML file.
    ///
    /// # Errors
    /// A file that cannot be read, is no YAML, names an unknown gate or holds a limit that makes no sense.
    pub fn open(path: &Path) -> Result<Self> {
        let input = |error: formats::Error| Error::Input(error.in_file(path));
        let size = std::fs::metadata(path).map_err(|error| input(error.into()))?;
        if size.len() > MAX_FILE_BYTES {
            let what = format!("{} bytes are too many for a gates file", size.len());
            return Err(input(formats::Error::malformed(what)));
        }
        let yaml = std::fs::read_to_string(path).map_err(|error| input(error.into()))?;
        Self::of_yaml(&yaml).map_err(|what| input(formats::Error::malformed(what)))
    }

    fn of_yaml(yaml: &str) -> std::result::Result<Self, String> {
        // A file of comments alone is null to YAML and an empty set of gates to its author.
        let gates: Option<Self> = serde_saphyr::from_str(yaml).map_err(|error| {
            let text = error.without_snippet().to_string();
            text.lines().next().unwrap_or_default().to_string()
        })?;
        let gates = gates.unwrap_or_default();
        gates.check().map_err(|fault| fault.what)?;
        Ok(gates)
    }

    /// These, and `file` where these say nothing. Findings named here replace those of the file.
    pub fn or(self, file: Self) -> Self {
        Self {
            max_kld: self.max_kld.or(file.max_kld),
            max_kld_p99: self.max_kld_p99.or(file.max_kld_p99),
            min_top1: self.min_top1.or(file.min_top1),
            max_ppl_ratio: self.max_ppl_ratio.or(file.max_ppl_ratio),
            max_layer_error: self.max_layer_error.or(file.max_layer_error),
            max_state_drift: self.max_state_drift.or(file.max_state_drift),
            max_expert_changes: self.max_expert_changes.or(file.max_expert_changes),
            fail_on: if self.fail_on.is_empty() {
                file.fail_on
            } else {
                self.fail_on
            },
        }
    }

    /// Refuses limits that make no sense.
    ///
    /// # Errors
    /// NaN, negative, or a percentage where a share belongs.
    pub fn check(&self) -> std::result::Result<(), Fault> {
        for (gate, limit) in self.limits() {
            if let Some(objection) = gate.objection(limit) {
                let what = format!("`{}: {limit}` cannot be kept: {objection}", gate.name());
                return Err(Fault::new(what));
            }
        }
        Ok(())
    }

    /// The limits that are set.
    pub fn limits(&self) -> impl Iterator<Item = (Gate, f64)> {
        Gate::ALL
            .into_iter()
            .filter_map(|gate| Some((gate, self.limit(gate)?)))
    }

    fn limit(&self, gate: Gate) -> Option<f64> {
        match gate {
            Gate::MaxKld => self.max_kld,
            Gate::MaxKldP99 => self.max_kld_p99,
            Gate::MinTop1 => self.min_top1,
            Gate::MaxPplRatio => self.max_ppl_ratio,
            Gate::MaxLayerError => self.max_layer_error,
            Gate::MaxStateDrift => self.max_state_drift,
            Gate::MaxExpertChanges => self.max_expert_changes,
        }
    }

    pub(super) fn fail_on(&self) -> Vec<FailOn> {
        if self.fail_on.is_empty() {
            vec![FailOn::default()]
        } else {
            self.fail_on.clone()
        }
    }

    pub(super) fn results(&self, report: &ValidationReport) -> Vec<GateResult> {
        let result = |(gate, limit): (Gate, f64)| {
            let measured = gate.measured(report).filter(|value| !value.is_nan());
            let outcome = match measured {
                None => Outcome::NotMeasured,
                Some(value) if gate.holds(value, limit) => Outcome::Passed,
                Some(_) => Outcome::Failed,
            };
            GateResult {
                gate,
                limit,
                measured,
                outcome,
            }
        };
        self.limits().map(result).collect()
    }
}

#[cfg(test)]
mod tests;
