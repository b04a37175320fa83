//! Libraries put together: what a conversion wrote, held against what it was made from.

mod clean;
mod damage;
mod defects;
#[cfg(feature = "device")]
mod device;
mod mistaken;
#[cfg(feature = "device")]
mod mixing;
mod operations;
mod packed;
#[cfg(feature = "device")]
mod predictions;

use nemoconv::report::{Finding, Severity};
use nemoconv::validate::static_levels;
use std::path::Path;

/// Everything that the levels without a forward pass find.
fn findings(artifact: &Path, reference: Option<&Path>) -> Vec<Finding> {
    let text = |path: &Path| path.to_str().expect("test paths are UTF-8").to_owned();
    let reference = reference.map(text);
    let report = static_levels::inspect(&text(artifact), reference.as_deref(), None);
    report.expect("both models can be read").findings
}

/// What a gate would stop.
fn faults(artifact: &Path, reference: Option<&Path>) -> Vec<Finding> {
    let mut findings = findings(artifact, reference);
    findings.retain(|finding| finding.severity > Severity::Note);
    findings
}

/// Exactly one of `found` has this id, tensor or key, and a message with these words.
#[track_caller]
fn expect(found: &[Finding], id: &str, tensor: &str, words: &[&str]) {
    let named: Vec<_> = found
        .iter()
        .filter(|finding| {
            finding.rule.id() == id
                && finding.place.tensor.as_deref() == Some(tensor)
                && words.iter().all(|word| finding.message.contains(word))
        })
        .collect();
    assert_eq!(named.len(), 1, "{id} {tensor} {words:?} in {found:#?}");
}
