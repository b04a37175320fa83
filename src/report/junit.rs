//! The report as JUnit XML, as Jenkins and GitLab read it: a suite per level, a case per check, a case per gate.
//!
//! Enters: a report. Leaves: XML 1.0 text.

use std::fmt::Write as _;

use super::{Finding, GateResult, Level, LevelReport, Outcome, Rule, ValidationReport};

/// The report as XML, with a last newline.
pub fn render(report: &ValidationReport) -> String {
    let suites = suites(report);
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let all: Vec<&Case> = suites.iter().flat_map(|suite| &suite.cases).collect();
    let _ = writeln!(
        xml,
        "<testsuites name=\"nemoconv validate\" {}>",
        counts(&all)
    );
    for suite in &suites {
        suite.render(&mut xml);
    }
    xml.push_str("</testsuites>\n");
    xml
}

struct Suite {
    name: String,
    cases: Vec<Case>,
}

struct Case {
    name: String,
    result: CaseResult,
    /// Findings that do not fail.
    output: String,
}

enum CaseResult {
    Passed,
    Skipped(String),
    Failed {
        kind: String,
        message: String,
        text: String,
    },
}

fn suites(report: &ValidationReport) -> Vec<Suite> {
    let mut suites: Vec<_> = report
        .levels
        .iter()
        .map(|level| level_suite(report, level))
        .collect();
    if !report.gates.is_empty() {
        suites.push(Suite {
            name: "gates".into(),
            cases: report.gates.iter().map(gate_case).collect(),
        });
    }
    suites
}

fn level_suite(report: &ValidationReport, level: &LevelReport) -> Suite {
    let cases = match &level.skipped {
        Some(why) => vec![Case {
            name: format!("{} level", level.level),
            result: CaseResult::Skipped(why.clone()),
            output: String::new(),
        }],
        None => rules(report, level)
            .into_iter()
            .map(|rule| rule_case(report, rule))
            .collect(),
    };
    Suite {
        name: level.level.name().into(),
        cases,
    }
}

/// What the level checked, and anything found besides. Gates have a suite of their own.
fn rules(report: &ValidationReport, level: &LevelReport) -> Vec<Rule> {
    let mut rules = level.checked.clone();
    rules.extend(report.findings_of(level.level).map(|finding| finding.rule));
    rules.retain(|rule| !rule.is_gate());
    rules.sort_unstable();
    rules.dedup();
    rules
}

fn rule_case(report: &ValidationReport, rule: Rule) -> Case {
    let found: Vec<&Finding> = report
        .findings
        .iter()
        .filter(|finding| finding.rule == rule)
        .collect();
    let (failing, other): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|found| report.fails(found));
    let result = if failing.is_empty() {
        CaseResult::Passed
    } else {
        CaseResult::Failed {
            kind: failing
                .iter()
                .map(|found| found.severity)
                .max()
                .map_or("", |s| s.name())
                .into(),
            message: format!("{} ({})", rule.title(), failing.len()),
            text: format!("{}{}\n", lines(&failing), rule.help()),
        }
    };
    Case {
        name: rule.id().into(),
        result,
        output: lines(&other),
    }
}

fn gate_case(gate: &GateResult) -> Case {
    let result = match gate.outcome {
        Outcome::Passed => CaseResult::Passed,
        Outcome::Failed | Outcome::NotMeasured => CaseResult::Failed {
            kind: gate.gate.rule().id().into(),
            message: gate.to_string(),
            text: format!("{}\n", gate.gate.rule().help()),
        },
    };
    Case {
        name: gate.gate.name().into(),
        result,
        output: format!("{gate}\n"),
    }
}

fn lines(findings: &[&Finding]) -> String {
    findings.iter().fold(String::new(), |mut text, finding| {
        let place = finding.place.to_string();
        let separator = if place.is_empty() { "" } else { ": " };
        let _ = writeln!(
            text,
            "{}: {place}{separator}{}",
            finding.severity, finding.message
        );
        text
    })
}

fn counts(cases: &[&Case]) -> String {
    let failures = cases
        .iter()
        .filter(|case| matches!(case.result, CaseResult::Failed { .. }));
    let skipped = cases
        .iter()
        .filter(|case| matches!(case.result, CaseResult::Skipped(_)));
    let (failures, skipped) = (failures.count(), skipped.count());
    format!(
        "tests=\"{}\" failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\"",
        cases.len()
    )
}

impl Suite {
    fn render(&self, xml: &mut String) {
        let cases: Vec<&Case> = self.cases.iter().collect();
        let name = escape(&self.name);
        let _ = writeln!(xml, "  <testsuite name=\"{name}\" {}>", counts(&cases));
        for case in cases {
            case.render(xml, &name);
        }
        xml.push_str("  </testsuite>\n");
    }
}

impl Case {
    fn render(&self, xml: &mut String, suite: &str) {
        let name = escape(&self.name);
        let _ = write!(
            xml,
            "    <testcase classname=\"nemoconv.{suite}\" name=\"{name}\""
        );
        if matches!(self.result, CaseResult::Passed) && self.output.is_empty() {
            xml.push_str("/>\n");
            return;
        }
        xml.push_str(">\n");
        match &self.result {
            CaseResult::Passed => {}
            CaseResult::Skipped(why) => {
                let _ = writeln!(xml, "      <skipped message=\"{}\"/>", escape(why));
            }
            CaseResult::Failed {
                kind,
                message,
                text,
            } => {
                let (kind, message, text) = (escape(kind), escape(message), escape_text(text));
                let _ = writeln!(
                    xml,
                    "      <failure type=\"{kind}\" message=\"{message}\">{text}</failure>"
                );
            }
        }
        if !self.output.is_empty() {
            let _ = writeln!(
                xml,
                "      <system-out>{}</system-out>",
                escape_text(&self.output)
            );
        }
        xml.push_str("    </testcase>\n");
    }
}

/// Text for an attribute: line ends survive as character references.
fn escape(text: &str) -> String {
    escape_text(text)
        .replace('\n', "&#10;")
        .replace('\t', "&#9;")
}

/// Text between tags. Characters that XML 1.0 cannot hold at all become U+FFFD.
fn escape_text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

impl Rule {
    /// Whether its findings are failed gates.
    pub(super) fn is_gate(self) -> bool {
        self.level() == Level::Logits && super::Gate::ALL.iter().any(|gate| gate.rule() == self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_report_as_xml() {
        insta::assert_snapshot!(render(&synthetic::report()));
    }

    #[test]
    fn nothing_breaks_out() {
        let check = |text: &str, expected: &str| assert_eq!(escape(text), expected);
        check("a<b>&\"'", "a&lt;b&gt;&amp;&quot;'");
        check("]]>", "]]&gt;");
        check("\u{0}\u{1b}\u{ffff}", "\u{fffd}\u{fffd}\u{fffd}");
        check("a\nb", "a&#10;b");
    }
}
