//! The report for a terminal: levels, findings, figures beside their noise floor, gates, and the verdict last.
//!
//! Enters: a report. Leaves: plain text of at most 110 columns, tensor names aside. Knows no colours.

use std::fmt::Write as _;

use super::{
    Estimate, Finding, LayerDrift, Level, LevelReport, LogitsDrift, Outcome, Severity, Subject,
    ValidationReport, Verdict,
};

/// Findings shown per level; the rest is counted.
const SHOWN_FINDINGS: usize = 12;

/// The report as text, with a last newline.
pub fn render(report: &ValidationReport) -> String {
    let mut text = String::new();
    heading(&mut text, report);
    for level in &report.levels {
        level_lines(&mut text, report, level);
    }
    // Of nothing that could be compared there are no figures.
    if let Some(logits) = report.logits.as_ref().filter(|logits| logits.positions > 0) {
        figures(&mut text, report, logits);
    }
    if !report.gates.is_empty() {
        text.push('\n');
    }
    for gate in &report.gates {
        let _ = writeln!(
            text,
            "{:<10}  gate {}: {gate}",
            outcome(gate.outcome),
            gate.gate.name()
        );
    }
    let _ = writeln!(text, "\nverdict: {}", verdict(report));
    text
}

/// A figure with as many digits as it needs to be told from its neighbours.
pub fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if !(1e-4..1e6).contains(&size) => format!("{value:.2e}"),
        size if size < 0.1 => format!("{value:.6}"),
        size if size < 10.0 => format!("{value:.4}"),
        _ => format!("{value:.3}"),
    }
}

/// 1234567 as `1.23 MB`.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 999.5 && unit + 1 < units.len() {
        size /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{size:.2} {}", units[unit])
    }
}

/// A share as a percentage.
pub(super) fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// What a gate came to.
pub(super) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed => "FAILED",
        Outcome::NotMeasured => "UNMEASURED",
    }
}

/// The verdict and its reasons.
pub(super) fn verdict(report: &ValidationReport) -> String {
    match report.verdict {
        Verdict::Passed => "passed".into(),
        Verdict::Failed => {
            let gates = counted(report.failed_gates().count(), "gate fails", "gates fail");
            let findings = counted(report.failing_findings().count(), "finding", "findings");
            let fail_on: Vec<_> = report.fail_on.iter().map(ToString::to_string).collect();
            format!(
                "failed ({gates}, {findings} at --fail-on {})",
                fail_on.join(", ")
            )
        }
    }
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// What is known of a model, in one line.
pub(super) fn subject(subject: &Subject) -> String {
    let size = subject.bytes.map(human_bytes);
    let bits = subject.bits_per_weight();
    let bits = bits.map(|bits| format!("{bits:.2} bits per weight"));
    let format = Some(subject.format.clone()).filter(|format| !format.is_empty());
    let parts = [format, subject.file_type.clone(), size, bits];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    parts.join(", ")
}

fn heading(text: &mut String, report: &ValidationReport) {
    subject_line(text, "artifact", &report.artifact);
    if let Some(reference) = &report.reference {
        subject_line(text, "reference", reference);
    }
    text.push('\n');
}

fn subject_line(text: &mut String, role: &str, model: &Subject) {
    let path = clean(&model.path);
    let _ = match subject(model) {
        known if known.is_empty() => writeln!(text, "{role:<10}  {path}"),
        known => writeln!(text, "{role:<10}  {path} ({known})"),
    };
}

/// What became of a level: `passed`, `failed` or `skipped`.
pub(super) fn level_state(report: &ValidationReport, level: &LevelReport) -> &'static str {
    let gate_failed = level.level == Level::Logits && report.failed_gates().count() > 0;
    if level.skipped.is_some() {
        "skipped"
    } else if gate_failed
        || report
            .findings_of(level.level)
            .any(|found| report.fails(found))
    {
        "failed"
    } else {
        "passed"
    }
}

/// What a level looked at and found, in one line.
pub(super) fn level_summary(report: &ValidationReport, level: &LevelReport) -> String {
    if let Some(why) = &level.skipped {
        return why.clone();
    }
    let mut parts = vec![counted(level.checked.len(), "check", "checks")];
    parts.extend(
        level
            .scope
            .iter()
            .map(|(what, found)| scope_part(what, found)),
    );
    for severity in [Severity::Error, Severity::Warning, Severity::Note] {
        let count = report
            .findings_of(level.level)
            .filter(|finding| finding.severity == severity)
            .count();
        if count > 0 {
            parts.push(counted(count, severity.name(), &format!("{severity}s")));
        }
    }
    parts.join(", ")
}

/// A count before what is counted, a setting behind its name.
fn scope_part(what: &str, found: &str) -> String {
    let (counted, rest) = what.split_at(what.find(' ').unwrap_or(what.len()));
    match (counted.strip_suffix('s'), found.parse::<u64>()) {
        (Some(one), Ok(1)) => format!("1 {one}{rest}"),
        (Some(_), Ok(count)) => format!("{count} {what}"),
        _ => format!("{what} {found}"),
    }
}

fn level_lines(text: &mut String, report: &ValidationReport, level: &LevelReport) {
    let state = match level_state(report, level) {
        "failed" => "FAILED",
        state => state,
    };
    let _ = writeln!(
        text,
        "{state:<10}  {:<10}  {}",
        level.level,
        level_summary(report, level)
    );
    let mut findings: Vec<&Finding> = report.findings_of(level.level).collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    for finding in findings.iter().take(SHOWN_FINDINGS) {
        let place = finding.place.to_string();
        let separator = if place.is_empty() { "" } else { ": " };
        let line = format!("{place}{separator}{}", finding.message);
        let _ = writeln!(text, "  {} {}", finding.severity, finding.rule);
        let _ = writeln!(text, "    {}", clean(&line));
    }
    if findings.len() > SHOWN_FINDINGS {
        let more = findings.len() - SHOWN_FINDINGS;
        let _ = writeln!(text, "  and {more} more, all in --json");
    }
}

/// Without control characters: a tensor name may hold terminal commands.
fn clean(line: &str) -> String {
    line.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A row of the figures: what, the artifact, the noise floor.
pub(super) type FigureRow = (&'static str, String, Option<String>);

/// The figures that judge an artifact, each beside its noise floor.
pub(super) fn figure_rows(report: &ValidationReport, logits: &LogitsDrift) -> Vec<FigureRow> {
    let floor = report.noise_floor.as_ref();
    let floor_logits = floor.map(|floor| &floor.logits);
    let mut rows = Vec::new();
    let mut row = |what, show: &dyn Fn(&LogitsDrift) -> Option<String>| {
        if let Some(shown) = show(logits) {
            rows.push((what, shown, floor_logits.and_then(show)));
        }
    };
    row("KL divergence, mean", &|drift| {
        Some(estimate(drift.kl_divergence.mean))
    });
    row("KL divergence, median", &|drift| {
        Some(figure(drift.kl_divergence.median))
    });
    row("KL divergence, 99 %", &|drift| {
        Some(figure(drift.kl_divergence.p99))
    });
    row("KL divergence, max", &|drift| {
        Some(figure(drift.kl_divergence.max))
    });
    row("KL, bounds of the mean", &|drift| {
        let bounds = drift.kl_bounds?;
        Some(format!(
            "{} to {}",
            figure(bounds.lower),
            figure(bounds.upper)
        ))
    });
    row("KL, routing unchanged", &|drift| {
        drift.kl_unchanged_routing.map(estimate)
    });
    row("top-1 agreement", &|drift| {
        Some(percent_estimate(drift.top1_agreement))
    });
    row("RMS of delta p", &|drift| {
        Some(percent_estimate(drift.delta_p_rms))
    });
    row("perplexity, artifact", &|drift| {
        Some(estimate(drift.perplexity))
    });
    row("perplexity, reference", &|drift| {
        Some(estimate(drift.perplexity_reference))
    });
    row("perplexity ratio", &|drift| {
        Some(estimate(drift.perplexity_ratio))
    });
    let floor_layers = floor.map(|floor| floor.layers.as_slice());
    rows.extend(layer_rows(&report.layers, floor_layers));
    rows
}

fn layer_rows(layers: &[LayerDrift], floor: Option<&[LayerDrift]>) -> Vec<FigureRow> {
    let shows: [(&str, LayerFigure); 3] = [
        ("largest layer error", |layer| {
            Some((layer.relative_error, false))
        }),
        ("largest SSM state error", |layer| {
            Some((*layer.state.as_ref()?.relative_error.last()?, false))
        }),
        ("expert sets changed, most", |layer| {
            Some((layer.experts.as_ref()?.changed_tokens, true))
        }),
    ];
    let row = |&(what, show): &(&'static str, LayerFigure)| {
        let shown = worst_layer(layers, show)?;
        Some((
            what,
            shown,
            floor.and_then(|layers| worst_layer(layers, show)),
        ))
    };
    shows.iter().filter_map(row).collect()
}

/// A figure of a layer and whether it is a share.
type LayerFigure = fn(&LayerDrift) -> Option<(f64, bool)>;

fn worst_layer(layers: &[LayerDrift], show: LayerFigure) -> Option<String> {
    let figures = layers
        .iter()
        .filter_map(|layer| Some((layer.layer, show(layer)?)));
    let (layer, (value, is_share)) = figures.max_by(|a, b| a.1.0.total_cmp(&b.1.0))?;
    let shown = if is_share {
        percent(value)
    } else {
        figure(value)
    };
    Some(format!("{shown} (layer {layer})"))
}

fn figures(text: &mut String, report: &ValidationReport, logits: &LogitsDrift) {
    let rows = figure_rows(report, logits);
    let widest = |cells: &mut dyn Iterator<Item = usize>| cells.max().unwrap_or(0);
    let width = widest(&mut rows.iter().map(|row| row.1.chars().count())).max(8);
    let floor = match &report.noise_floor {
        Some(floor) => format!("noise floor: {}", floor.what),
        None => "noise floor: not measured".into(),
    };
    let _ = writeln!(text, "\n{:<26}  {:>width$}  {floor}", "", "artifact");
    for (what, shown, floor) in rows {
        let line = format!("{what:<26}  {shown:>width$}  {}", floor.unwrap_or_default());
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

/// A figure and its standard error.
pub(super) fn estimate(estimate: Estimate) -> String {
    format!("{} ± {}", figure(estimate.value), figure(estimate.error))
}

pub(super) fn percent_estimate(share: Estimate) -> String {
    format!("{:.3} ± {:.3} %", 100.0 * share.value, 100.0 * share.error)
}

#[cfg(test)]
mod tests {
    use super::super::{Rule, synthetic};
    use super::*;

    #[test]
    fn scopes_read_as_words() {
        let check = |what, found, expected: &str| assert_eq!(scope_part(what, found), expected);
        check("files", "1", "1 file");
        check("tensors", "53", "53 tensors");
        check("lines of text", "1", "1 line of text");
        check("lines of text", "34", "34 lines of text");
        check("context", "512", "context 512");
        let taken = "as llama.cpp takes them";
        check("activations", taken, "activations as llama.cpp takes them");
    }

    #[test]
    fn nothing_is_said_of_an_artifact_of_which_nothing_is_known() {
        let subject = Subject {
            path: "cut.gguf".into(),
            ..Subject::default()
        };
        let report = ValidationReport::new(subject, None);
        assert!(render(&report).starts_with("artifact    cut.gguf\n"));
    }

    #[test]
    fn without_a_comparable_position_there_are_no_figures() {
        let mut report = synthetic::report();
        assert!(render(&report).contains("perplexity, reference"));
        report.logits.as_mut().unwrap().positions = 0;
        assert!(!render(&report).contains("perplexity, reference"));
    }

    #[test]
    fn a_report_fits_a_terminal() {
        insta::assert_snapshot!(render(&synthetic::report()));
    }

    #[test]
    fn a_report_without_results_is_short() {
        let mut report = ValidationReport::new(Subject::default(), None);
        report.levels.push(LevelReport::ran(Level::Container));
        let text = render(&report);
        assert!(text.ends_with("\nverdict: passed\n"), "{text}");
    }

    #[test]
    fn many_findings_are_counted_and_names_give_no_commands() {
        let mut report = synthetic::report();
        let finding = Finding::new(Rule::UnknownTensor, "is unknown").in_tensor("\u{1b}[2J");
        report.findings.extend(vec![finding; 100]);
        let text = render(&report);
        assert!(text.contains("and 89 more"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn sizes_are_readable() {
        let check = |bytes, expected| assert_eq!(human_bytes(bytes), expected);
        check(17, "17 B");
        check(7_046_368, "7.05 MB");
        check(999_999, "1.00 MB");
    }

    #[test]
    fn figures_have_the_digits_they_need() {
        let check = |value, expected| assert_eq!(figure(value), expected);
        check(0.0, "0");
        check(0.02262, "0.022620");
        check(0.849_02, "0.8490");
        check(38.134_972, "38.135");
        check(2.26e-5, "2.26e-5");
        check(-0.5, "-0.5000");
        check(f64::INFINITY, "inf");
    }
}
