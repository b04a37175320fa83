//! The report as JSON: every field of the struct, and back.
//!
//! Enters: a report, or its JSON. Leaves: the other of the two.

use super::ValidationReport;
use crate::error::{Error, Result};
use crate::formats;

/// The report, indented, with a last newline.
pub fn render(report: &ValidationReport) -> String {
    let mut json = serde_json::to_string_pretty(report).expect("a report holds nothing but data");
    json.push('\n');
    json
}

/// A report that was rendered before.
///
/// # Errors
/// Text that is not such a report.
pub fn parse(json: &str) -> Result<ValidationReport> {
    serde_json::from_str(json).map_err(|error| {
        let what = format!("this is not a validation report: {error}");
        Error::Input(formats::Error::malformed(what))
    })
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_report_is_its_json() {
        let report = synthetic::report();
        let json = render(&report);
        assert_eq!(parse(&json).unwrap(), report);
        let mut brief = report;
        brief.layers.truncate(3);
        brief.tensors.truncate(2);
        brief.noise_floor = None;
        for level in &mut brief.levels {
            level.checked.truncate(2);
        }
        insta::assert_snapshot!(render(&brief));
    }

    #[test]
    fn another_file_is_refused() {
        let error = parse("{\"tool\": 3}").unwrap_err().to_string();
        assert!(error.contains("not a validation report"), "{error}");
    }
}
