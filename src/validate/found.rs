//! Findings as a level makes them: a flood of one kind ends in a count.
//!
//! Enters: findings, one by one. Leaves: at most [`MAX_PER_RULE`] of each rule. Judges nothing.

use std::collections::BTreeMap;

use crate::report::{Finding, Rule, Severity};

/// A file whose sizes are wrong has one fault and as many findings as tensors; more than these help nobody.
const MAX_PER_RULE: usize = 12;

/// What a level found and what it looked at.
#[derive(Debug, Default)]
pub struct Found {
    findings: Vec<Finding>,
    /// Per rule: how many there were, and the worst severity of those left out.
    counts: BTreeMap<Rule, (usize, Option<Severity>)>,
    /// What was looked at, such as `("tensors", "53")`.
    pub scope: Vec<(String, String)>,
}

impl Found {
    /// Adds one.
    pub fn push(&mut self, finding: Finding) {
        let (count, left_out) = self.counts.entry(finding.rule).or_default();
        *count += 1;
        if *count <= MAX_PER_RULE {
            self.findings.push(finding);
        } else {
            *left_out = (*left_out).max(Some(finding.severity));
        }
    }

    /// Notes what was looked at.
    pub fn looked_at(&mut self, what: &str, count: usize) {
        self.scope.push((what.into(), count.to_string()));
    }

    /// Whether anything of the rule was found.
    pub fn has(&self, rule: Rule) -> bool {
        self.counts.contains_key(&rule)
    }

    /// Whether anything was found that makes the artifact wrong.
    pub fn has_errors(&self) -> bool {
        self.findings
            .iter()
            .any(|finding| finding.severity == Severity::Error)
    }

    /// All findings, with one for those left out.
    pub fn into_findings(mut self) -> Vec<Finding> {
        for (rule, (count, left_out)) in self.counts {
            if let Some(severity) = left_out {
                let message = format!("{} more like these", count - MAX_PER_RULE);
                self.findings
                    .push(Finding::new(rule, message).severity(severity));
            }
        }
        self.findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted() {
        let mut found = Found::default();
        for index in 0..MAX_PER_RULE + 3 {
            found.push(Finding::new(Rule::MissingTensor, index.to_string()));
        }
        found.push(Finding::new(Rule::TrailingBytes, "1 byte"));
        let findings = found.into_findings();
        assert_eq!(findings.len(), MAX_PER_RULE + 2);
        assert_eq!(findings.last().unwrap().message, "3 more like these");
        assert_eq!(findings.last().unwrap().severity, Severity::Error);
    }
}
