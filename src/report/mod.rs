//! What a validation found, as one plain struct; every output is a rendering of it.
//!
//! Enters: results of the levels. Leaves: JSON, JUnit XML, SARIF, one HTML page, text for a terminal. Measures nothing
//! and knows no model.

pub mod finding;
pub mod gate;
pub mod html;
pub mod json;
pub mod junit;
pub mod sarif;
pub mod text;

mod drift;
#[cfg(test)]
mod synthetic;

use serde::{Deserialize, Serialize};

pub use drift::{
    BucketDrift, Distribution, Estimate, ExpertDrift, HeadDrift, Histogram, KlBounds, LayerDrift,
    LogitsDrift, NoiseFloor, StateDrift,
};
pub use finding::{Finding, FindingPlace, Level, Rule, Severity};
pub use gate::{FailOn, Gate, GateResult, Gates, Outcome};

/// Everything a validation has to say. The same inputs give the same report: it holds no times and no host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationReport {
    /// Who says it.
    pub tool: Tool,
    /// What was validated.
    pub artifact: Subject,
    /// What it was compared with.
    pub reference: Option<Subject>,
    /// One entry per level, in order.
    pub levels: Vec<LevelReport>,
    /// Everything found, in the order of the levels.
    pub findings: Vec<Finding>,
    /// What the gates were and whether they hold; filled by [`ValidationReport::judge`].
    pub gates: Vec<GateResult>,
    /// The findings that fail the validation.
    pub fail_on: Vec<FailOn>,
    /// Rounding error per tensor.
    pub tensors: Vec<TensorError>,
    /// Drift of every block's output.
    pub layers: Vec<LayerDrift>,
    /// Drift of the predictions.
    pub logits: Option<LogitsDrift>,
    /// The same measures where only BF16 rounding acts.
    pub noise_floor: Option<NoiseFloor>,
    /// The answer.
    pub verdict: Verdict,
}

/// The program that made the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

impl Default for Tool {
    fn default() -> Self {
        Self {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// A model under test or a reference.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Path or hub id, as the user gave it.
    pub path: String,
    /// The container, such as `GGUF`, `checkpoint`, `KLD base file`, `compact reference`.
    pub format: String,
    /// The model's own name.
    pub name: Option<String>,
    /// Such as `nemotron_h`.
    pub architecture: Option<String>,
    /// The type of most tensors, such as `Q4_K_M`.
    pub file_type: Option<String>,
    /// Bytes of all files.
    pub bytes: Option<u64>,
    /// Number of weights.
    pub weights: Option<u64>,
}

impl Subject {
    /// Bits per weight over all files.
    pub fn bits_per_weight(&self) -> Option<f64> {
        let weights = self.weights.filter(|&weights| weights > 0)?;
        Some(self.bytes? as f64 * 8.0 / weights as f64)
    }
}

/// What became of one level.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelReport {
    /// Which.
    pub level: Level,
    /// Why it did not run; `None` if it did.
    pub skipped: Option<String>,
    /// Every rule it checked, found or not.
    pub checked: Vec<Rule>,
    /// What it looked at, such as `("tensors", "53")`.
    pub scope: Vec<(String, String)>,
}

impl LevelReport {
    /// A level that ran and checked all its rules.
    pub fn ran(level: Level) -> Self {
        let checked = Rule::ALL.iter().copied();
        Self {
            level,
            skipped: None,
            checked: checked.filter(|rule| rule.level() == level).collect(),
            scope: Vec::new(),
        }
    }

    /// A level that did not run.
    pub fn skipped(level: Level, why: impl Into<String>) -> Self {
        Self {
            level,
            skipped: Some(why.into()),
            checked: Vec::new(),
            scope: Vec::new(),
        }
    }
}

/// Rounding error of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorError {
    /// GGUF name.
    pub name: String,
    /// ggml name of the stored type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Number of weights.
    pub weights: u64,
    /// ||w - w_ref|| / ||w_ref||.
    pub relative_error: f64,
    /// Largest |w - w_ref|.
    pub max_abs_error: f64,
    /// The relative error that rounding normal weights to this type gives, where known.
    pub expected: Option<f64>,
}

/// The answer in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every gate holds and no finding fails.
    Passed,
    /// A gate fails or a finding is at or above `fail_on`.
    Failed,
}

impl ValidationReport {
    /// An empty report that passes.
    pub fn new(artifact: Subject, reference: Option<Subject>) -> Self {
        Self {
            tool: Tool::default(),
            artifact,
            reference,
            levels: Vec::new(),
            findings: Vec::new(),
            gates: Vec::new(),
            fail_on: vec![FailOn::default()],
            tensors: Vec::new(),
            layers: Vec::new(),
            logits: None,
            noise_floor: None,
            verdict: Verdict::Passed,
        }
    }

    /// Holds the results against the gates and gives the verdict.
    pub fn judge(&mut self, gates: &Gates) {
        self.gates = gates.results(self);
        self.fail_on = gates.fail_on();
        let failed = self.failed_gates().count() > 0 || self.failing_findings().count() > 0;
        self.verdict = if failed {
            Verdict::Failed
        } else {
            Verdict::Passed
        };
    }

    /// The gates that do not hold.
    pub fn failed_gates(&self) -> impl Iterator<Item = &GateResult> {
        self.gates
            .iter()
            .filter(|gate| gate.outcome != Outcome::Passed)
    }

    /// The findings that fail the validation.
    pub fn failing_findings(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| self.fails(finding))
    }

    /// Whether a finding fails the validation.
    pub fn fails(&self, finding: &Finding) -> bool {
        self.fail_on.iter().any(|fail_on| fail_on.covers(finding))
    }

    /// The findings of one level.
    pub fn findings_of(&self, level: Level) -> impl Iterator<Item = &Finding> {
        self.findings
            .iter()
            .filter(move |finding| finding.rule.level() == level)
    }

    /// 0 if it passed, 2 if not.
    pub fn exit_code(&self) -> u8 {
        match self.verdict {
            Verdict::Passed => 0,
            Verdict::Failed => 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(severity: Severity, fail_on: &[&str]) -> Verdict {
        let mut report = ValidationReport::new(Subject::default(), None);
        let finding = Finding::new(Rule::TrailingBytes, "17 bytes").severity(severity);
        report.findings.push(finding);
        let fail_on = fail_on.iter().map(|text| text.parse().unwrap()).collect();
        report.judge(&Gates {
            fail_on,
            ..Gates::default()
        });
        assert_eq!(report.exit_code() == 2, report.verdict == Verdict::Failed);
        report.verdict
    }

    #[test]
    fn findings_fail_as_the_user_asked() {
        let check = |severity, fail_on: &[&str], expected| {
            assert_eq!(judged(severity, fail_on), expected, "{fail_on:?}");
        };
        check(Severity::Warning, &[], Verdict::Passed);
        check(Severity::Error, &[], Verdict::Failed);
        check(Severity::Warning, &["warning"], Verdict::Failed);
        check(Severity::Note, &["warning"], Verdict::Passed);
        check(Severity::Error, &["never"], Verdict::Passed);
        let this = "container/trailing-bytes";
        check(Severity::Note, &[this], Verdict::Failed);
        check(Severity::Error, &["container/missing-key"], Verdict::Passed);
        check(Severity::Error, &["never", this], Verdict::Failed);
    }

    #[test]
    fn bits_per_weight_need_weights() {
        let mut subject = Subject {
            bytes: Some(18),
            weights: Some(32),
            ..Subject::default()
        };
        assert_eq!(subject.bits_per_weight(), Some(4.5));
        subject.weights = Some(0);
        assert_eq!(subject.bits_per_weight(), None);
    }
}
