//! Limits from flags and files, and what keeps them.

use super::super::synthetic;
use super::*;

#[test]
fn the_file_is_read_and_flags_win() {
    let yaml =
        "max-kld: 0.01 # reviewed\nmin-top1: 0.98\nfail-on: [warning, weights/bytes-differ]\n";
    let file = Gates::of_yaml(yaml).unwrap();
    let flags = Gates {
        max_kld: Some(0.5),
        ..Gates::default()
    };
    let gates = flags.or(file);
    assert_eq!(
        gates.limits().collect::<Vec<_>>(),
        [(Gate::MaxKld, 0.5), (Gate::MinTop1, 0.98)]
    );
    let expected = [
        FailOn::Severity(Severity::Warning),
        FailOn::Rule(Rule::BytesDiffer),
    ];
    assert_eq!(gates.fail_on, expected);
    assert_eq!(Gates::of_yaml("# nothing yet\n").unwrap(), Gates::default());
}

#[test]
fn senseless_files_are_refused() {
    let check = |yaml: &str, expected: &str| {
        let error = Gates::of_yaml(yaml).unwrap_err();
        assert!(error.contains(expected), "{yaml}: {error}");
    };
    check("max-kdl: 0.01", "max-kdl");
    check("max-kld: small", "float");
    check("max-kld: .nan", "from 0 up");
    check("max-kld: -1", "from 0 up");
    check("min-top1: 98", "0.98");
    check("max-ppl-ratio: 0.02", "1.02");
    check("max-kld: 1\nmax-kld: 2", "duplicate");
    check("fail-on: [weights/nonsense]", "weights/nonsense");
    check("- a", "");
}

#[test]
fn every_gate_measures_its_figure() {
    let report = synthetic::report();
    let check = |gates: Gates, measured: f64, outcome| {
        let results = gates.results(&report);
        assert_eq!(results[0].outcome, outcome, "{}", results[0]);
        assert_eq!(results[0].measured, Some(measured));
    };
    let none = Gates::default;
    let set = |limit: f64| Some(limit);
    check(
        Gates {
            max_kld: set(0.02262),
            ..none()
        },
        0.02262,
        Outcome::Passed,
    );
    check(
        Gates {
            max_kld: set(0.0226),
            ..none()
        },
        0.02262,
        Outcome::Failed,
    );
    check(
        Gates {
            max_kld_p99: set(0.08),
            ..none()
        },
        0.089393,
        Outcome::Failed,
    );
    check(
        Gates {
            min_top1: set(0.98),
            ..none()
        },
        0.84902,
        Outcome::Failed,
    );
    check(
        Gates {
            min_top1: set(0.8),
            ..none()
        },
        0.84902,
        Outcome::Passed,
    );
    check(
        Gates {
            max_ppl_ratio: set(1.06),
            ..none()
        },
        1.056629,
        Outcome::Passed,
    );
    check(
        Gates {
            max_layer_error: set(0.05),
            ..none()
        },
        0.0875,
        Outcome::Failed,
    );
    check(
        Gates {
            max_state_drift: set(0.1),
            ..none()
        },
        0.09,
        Outcome::Passed,
    );
    check(
        Gates {
            max_expert_changes: set(0.1),
            ..none()
        },
        0.125,
        Outcome::Failed,
    );
}

#[test]
fn what_was_not_measured_is_not_passed() {
    let mut report = synthetic::report();
    let gates = Gates {
        max_kld: Some(1.0),
        max_layer_error: Some(1.0),
        ..Gates::default()
    };
    report.logits.as_mut().unwrap().positions = 0;
    report.layers.clear();
    for result in gates.results(&report) {
        assert_eq!(result.outcome, Outcome::NotMeasured, "{result}");
    }
    report.judge(&gates);
    assert_eq!(report.exit_code(), 2);
}
