//! The report as one page that needs nothing else: no scripts, no fonts, no network; plots are SVG.
//!
//! Enters: a report. Leaves: HTML, legible on a desk and on a phone, light and dark.

mod figures;
mod plot;
mod scale;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::text::{self, FigureRow, figure as number};
use super::{
    Finding, GateResult, LayerDrift, LevelReport, Outcome, Severity, Subject, ValidationReport,
    Verdict,
};

/// Rows of a long list; the rest is counted and stands in the JSON.
const SHOWN_ROWS: usize = 200;

/// The report as a page.
pub fn render(report: &ValidationReport) -> String {
    let name = report
        .artifact
        .name
        .as_deref()
        .unwrap_or(&report.artifact.path);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="generator" content=(format!("{} {}", report.tool.name, report.tool.version));
                title { "Validation of " (name) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                (heading(report, name))
                (tiles(report))
                main {
                    (gates(&report.gates))
                    (levels(report))
                    (findings(report))
                    (plots(report))
                    (tables(report))
                }
                footer { "Made by " (report.tool.name) " " (report.tool.version) "." }
            }
        }
    };
    page.into_string().chars().map(printable).collect()
}

fn heading(report: &ValidationReport, name: &str) -> Markup {
    let (state, word) = match report.verdict {
        Verdict::Passed => ("passed", "passed"),
        Verdict::Failed => ("failed", "failed"),
    };
    html! {
        header class=(state) {
            h1 { (name) }
            p { span class=(format!("badge {state}")) { (word) } " " span.muted { (reasons(report)) } }
            dl.subjects {
                (subject("artifact", &report.artifact))
                @if let Some(reference) = &report.reference { (subject("reference", reference)) }
                @if let Some(floor) = &report.noise_floor {
                    dt { "noise floor" }
                    dd { (floor.what) }
                }
            }
        }
    }
}

/// The verdict without its first word.
fn reasons(report: &ValidationReport) -> String {
    let verdict = text::verdict(report);
    let reasons = verdict
        .split_once(" (")
        .map(|(_, reasons)| reasons.trim_end_matches(')'));
    reasons
        .unwrap_or("every gate holds, no finding fails")
        .to_string()
}

fn subject(role: &str, subject: &Subject) -> Markup {
    let facts = text::subject(subject);
    html! {
        dt { (role) }
        dd {
            code { (subject.path) }
            @if !facts.is_empty() { br; span.sub { (facts) } }
        }
    }
}

fn tiles(report: &ValidationReport) -> Markup {
    let Some(logits) = report.logits.as_ref().filter(|logits| logits.positions > 0) else {
        return html! {};
    };
    let wanted = [
        "KL divergence, mean",
        "KL divergence, 99 %",
        "top-1 agreement",
        "perplexity ratio",
    ];
    let rows = text::figure_rows(report, logits);
    let rows: Vec<&FigureRow> = rows.iter().filter(|row| wanted.contains(&row.0)).collect();
    html! {
        section.tiles aria-label="key figures" {
            @for (what, value, floor) in rows {
                div.card.tile {
                    span.muted { (what) }
                    @let (figure, error) = value.split_once(" ± ").unwrap_or((value, ""));
                    b { (figure) @if error.ends_with('%') { " %" } }
                    @if !error.is_empty() { div.sub { "± " (error) } }
                    div.sub {
                        @match floor {
                            Some(floor) => { "noise floor " (floor) }
                            None => { "noise floor not measured" }
                        }
                    }
                }
            }
        }
    }
}

fn gates(gates: &[GateResult]) -> Markup {
    html! {
        @if !gates.is_empty() {
            h2 { "Gates" }
            div.card.scroll {
                table {
                    thead { tr { th { "gate" } th.number { "measured" } th.number { "limit" } th { "" } } }
                    tbody { @for gate in gates { (gate_row(gate)) } }
                }
            }
        }
    }
}

fn gate_row(gate: &GateResult) -> Markup {
    let (class, word) = match gate.outcome {
        Outcome::Passed => ("passed", "passed"),
        Outcome::Failed => ("failed", "failed"),
        Outcome::NotMeasured => ("failed", "not measured"),
    };
    html! {
        tr {
            td { code.whole { (gate.gate.name()) } div.sub { (gate.gate.measure()) } }
            td.number { (gate.measured.map_or("–".into(), number)) }
            td.number { (gate.gate.sign()) " " (gate.limit) }
            td { span class=(format!("badge {class}")) { (word) } }
        }
    }
}

fn levels(report: &ValidationReport) -> Markup {
    html! {
        @if !report.levels.is_empty() {
            h2 { "Levels" }
            div.card.scroll {
                table {
                    tbody { @for level in &report.levels { (level_row(report, level)) } }
                }
            }
        }
    }
}

fn level_row(report: &ValidationReport, level: &LevelReport) -> Markup {
    let state = text::level_state(report, level);
    html! {
        tr {
            td { (level.level) }
            td { span class=(format!("badge {state}")) { (state) } }
            td.muted { (text::level_summary(report, level)) }
        }
    }
}

fn findings(report: &ValidationReport) -> Markup {
    let mut findings: Vec<&Finding> = report.findings.iter().collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    html! {
        h2 { "Findings" }
        div.card {
            @if findings.is_empty() { p.muted { "None." } }
            ul.findings {
                @for finding in findings.iter().take(SHOWN_ROWS) { (finding_item(finding)) }
            }
            (and_more(findings.len()))
        }
    }
}

fn finding_item(finding: &Finding) -> Markup {
    let place = finding.place.to_string();
    html! {
        li {
            span class=(format!("badge {}", severity_class(finding.severity))) { (finding.severity) }
            " " b { (finding.message) }
            @if !place.is_empty() { div { code { (place) } } }
            div.sub { code { (finding.rule) } ": " (finding.rule.title()) ". " (finding.rule.help()) }
        }
    }
}

fn severity_class(severity: Severity) -> &'static str {
    severity.name()
}

fn and_more(count: usize) -> Markup {
    html! {
        @if count > SHOWN_ROWS {
            p.muted { "and " (count - SHOWN_ROWS) " more, all in the JSON report" }
        }
    }
}

/// HTML has no place for control characters; names from files may hold some.
fn printable(c: char) -> char {
    if c.is_control() && c != '\n' {
        '\u{fffd}'
    } else {
        c
    }
}

fn plots(report: &ValidationReport) -> Markup {
    let plots = figures::all(report);
    html! {
        @if !plots.is_empty() {
            h2 { "Figures" }
            div.plots { @for plot in plots { (plot) } }
        }
    }
}

fn tables(report: &ValidationReport) -> Markup {
    html! {
        @if let Some(logits) = &report.logits {
            h2 { "Numbers" }
            details open {
                summary { "Predictions, " (logits.positions) " positions in " (logits.chunks) " chunks of "
                    (logits.context_tokens) " tokens" }
                (figure_table(&text::figure_rows(report, logits)))
            }
        }
        @if !report.layers.is_empty() {
            details {
                summary { "Layers" }
                (layer_table(&report.layers))
            }
        }
        @if !report.tensors.is_empty() { (tensor_table(report)) }
    }
}

fn figure_table(rows: &[FigureRow]) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { th { "" } th.number { "artifact" } th.number { "noise floor" } } }
                tbody {
                    @for (what, value, floor) in rows {
                        tr { td { (what) } td.number { (value) } td.number { (floor.as_deref().unwrap_or("–")) } }
                    }
                }
            }
        }
    }
}

fn layer_table(layers: &[LayerDrift]) -> Markup {
    html! {
        div.scroll {
            table {
                thead {
                    tr {
                        th.number { "layer" } th { "kind" } th.number { "error, mean" } th.number { "error, max" }
                        th.number { "state error" } th.number { "growing heads" } th.number { "experts changed" }
                    }
                }
                tbody { @for layer in layers { (layer_row(layer)) } }
            }
        }
    }
}

fn layer_row(layer: &LayerDrift) -> Markup {
    let dash = || "–".to_string();
    let state = layer.state.as_ref();
    let last = state.and_then(|state| state.relative_error.last());
    let growing = state.map(|state| format!("{} of {}", state.growing.len(), state.heads));
    let experts = layer
        .experts
        .as_ref()
        .map(|experts| text::percent(experts.changed_tokens));
    html! {
        tr {
            td.number { (layer.layer) }
            td { (layer.kind) }
            td.number { (number(layer.relative_error)) }
            td.number { (number(layer.max_relative_error)) }
            td.number { (last.map_or_else(dash, |error| number(*error))) }
            td.number { (growing.unwrap_or_else(dash)) }
            td.number { (experts.unwrap_or_else(dash)) }
        }
    }
}

fn tensor_table(report: &ValidationReport) -> Markup {
    let mut tensors: Vec<_> = report.tensors.iter().collect();
    tensors.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
    html! {
        details {
            summary { "Tensors, largest error first" }
            div.scroll {
                table {
                    thead {
                        tr {
                            th { "tensor" } th { "type" } th.number { "relative error" } th.number { "expected" }
                            th.number { "largest error" }
                        }
                    }
                    tbody {
                        @for tensor in tensors.iter().take(SHOWN_ROWS) {
                            tr {
                                td { code { (tensor.name) } }
                                td { (tensor.ty) }
                                td.number { (number(tensor.relative_error)) }
                                td.number { (tensor.expected.map_or("–".into(), number)) }
                                td.number { (number(tensor.max_abs_error)) }
                            }
                        }
                    }
                }
            }
            (and_more(tensors.len()))
        }
    }
}

#[cfg(test)]
mod tests;
