//! The report as SARIF 2.1.0, for code scanning: every finding and every failed gate is a result.
//!
//! Enters: a report. Leaves: one JSON document with the table of all rules.

use std::fmt::Write as _;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Finding, FindingPlace, GateResult, Rule, Severity, ValidationReport};

const SCHEMA: &str =
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json";

/// The report as SARIF, indented, with a last newline.
pub fn render(report: &ValidationReport) -> String {
    let findings = report.findings.iter().map(finding_result);
    let gates = report.failed_gates().map(|gate| gate_result(report, gate));
    let results: Vec<Value> = findings.chain(gates).collect();
    let log = json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": report.tool.name,
                "version": report.tool.version,
                "rules": Rule::ALL.iter().map(|rule| descriptor(*rule)).collect::<Vec<_>>(),
            }},
            "invocations": [{ "executionSuccessful": true, "exitCode": report.exit_code() }],
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    });
    let mut text = serde_json::to_string_pretty(&log).expect("a JSON value can be written");
    text.push('\n');
    text
}

fn descriptor(rule: Rule) -> Value {
    json!({
        "id": rule.id(),
        "name": format!("{rule:?}"),
        "shortDescription": { "text": rule.title() },
        "help": { "text": rule.help() },
        "defaultConfiguration": { "level": rule.severity().name() },
        "properties": { "tags": [rule.level().name()] },
    })
}

fn finding_result(finding: &Finding) -> Value {
    result(
        finding.rule,
        finding.severity,
        &finding.message,
        &finding.place,
    )
}

fn gate_result(report: &ValidationReport, gate: &GateResult) -> Value {
    let place = FindingPlace {
        file: Some(report.artifact.path.clone()),
        ..FindingPlace::default()
    };
    let message = format!("{}: {gate}", gate.gate.name());
    let mut result = result(gate.gate.rule(), Severity::Error, &message, &place);
    // Two gates may share a rule.
    let fingerprint = fingerprint(gate.gate.name(), &place);
    result["partialFingerprints"]["place/v1"] = json!(fingerprint);
    result
}

fn result(rule: Rule, severity: Severity, message: &str, place: &FindingPlace) -> Value {
    let mut result = json!({
        "ruleId": rule.id(),
        "ruleIndex": Rule::ALL.iter().position(|known| *known == rule),
        "level": severity.name(),
        "message": { "text": message },
        "partialFingerprints": { "place/v1": fingerprint(rule.id(), place) },
    });
    if let Some(location) = location(place) {
        result["locations"] = json!([location]);
    }
    result
}

fn location(place: &FindingPlace) -> Option<Value> {
    let mut location = serde_json::Map::new();
    if let Some(file) = &place.file {
        let mut physical = json!({ "artifactLocation": { "uri": uri(file) } });
        if let Some(offset) = place.offset {
            physical["region"] = json!({ "byteOffset": offset });
        }
        location.insert("physicalLocation".into(), physical);
    }
    let logical = match (&place.tensor, place.layer) {
        (Some(tensor), _) => Some(json!([{ "fullyQualifiedName": tensor, "kind": "member" }])),
        (None, Some(layer)) => {
            Some(json!([{ "fullyQualifiedName": format!("blk.{layer}"), "kind": "module" }]))
        }
        (None, None) => None,
    };
    if let Some(logical) = logical {
        location.insert("logicalLocations".into(), logical);
    }
    (!location.is_empty()).then(|| Value::Object(location))
}

/// What makes the same finding of the next run the same: rule and place, not the figures of the message.
fn fingerprint(id: &str, place: &FindingPlace) -> String {
    let file = place.file.as_deref().map(file_name);
    // Where nothing else tells two findings apart.
    let offset = place
        .offset
        .filter(|_| place.tensor.is_none() && place.layer.is_none());
    let key = json!([id, file, place.tensor, place.layer, offset]).to_string();
    let digest = Sha256::digest(key.as_bytes());
    hex(&digest[..16])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn file_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// A path as a URI reference, RFC 3986: absolute paths become `file:` URIs, relative ones stay relative.
fn uri(path: &str) -> String {
    let path = path.replace('\\', "/");
    let has_drive = path.as_bytes().get(1) == Some(&b':');
    let prefix = match path.strip_prefix('/') {
        Some(_) => "file://",
        None if has_drive => "file:///",
        None => "",
    };
    let mut uri = String::from(prefix);
    for byte in path.bytes() {
        let is_plain = byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
        if is_plain || (byte == b':' && has_drive) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_report_as_sarif() {
        let mut log: Value = serde_json::from_str(&render(&synthetic::report())).unwrap();
        let rules = log["runs"][0]["tool"]["driver"]["rules"]
            .as_array_mut()
            .unwrap();
        assert_eq!(rules.len(), Rule::ALL.len());
        rules.truncate(2);
        insta::assert_snapshot!(serde_json::to_string_pretty(&log).unwrap());
    }

    #[test]
    fn results_point_at_their_rule() {
        let log: Value = serde_json::from_str(&render(&synthetic::report())).unwrap();
        let run = &log["runs"][0];
        let results = run["results"].as_array().unwrap();
        assert_eq!(results.len(), 6, "four findings, two gates");
        for result in results {
            let index = result["ruleIndex"].as_u64().unwrap() as usize;
            assert_eq!(
                run["tool"]["driver"]["rules"][index]["id"],
                result["ruleId"]
            );
        }
    }

    #[test]
    fn paths_become_uris() {
        let check = |path: &str, expected: &str| assert_eq!(uri(path), expected);
        check("out dir/a#1.gguf", "out%20dir/a%231.gguf");
        check("/models/ä.gguf", "file:///models/%C3%A4.gguf");
        check("C:\\models\\a.gguf", "file:///C:/models/a.gguf");
        check("a:b.gguf", "file:///a:b.gguf");
    }

    #[test]
    fn fingerprints_outlive_figures() {
        let finding = |message: &str, file: &str| {
            Finding::new(Rule::Saturation, message)
                .in_file(file)
                .in_tensor("output.weight")
        };
        let print = |finding: Finding| fingerprint(finding.rule.id(), &finding.place);
        let first = print(finding("3 % of the codes", "a/x.gguf"));
        assert_eq!(first, print(finding("4 % of the codes", "b/x.gguf")));
        assert_ne!(first, print(finding("3 % of the codes", "a/y.gguf")));
    }
}
