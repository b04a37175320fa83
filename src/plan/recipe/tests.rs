//! Recipes read and written.

use nemoconv_formats::GgmlType;

use super::super::phase::Phase;
use super::*;

fn recipe(yaml: &str) -> Recipe {
    RecipeEntries::of_yaml(yaml).unwrap().resolve().unwrap()
}

#[test]
fn a_recipe_reads_back_as_it_was_written() {
    let yaml = "
phase: 3
rules:
  - {tensor: 'blk\\.[01]\\.''x', type: q6_k}
  - tensor: ssm_out
    type: keep
output-tensor-type: q8_0
token-embedding-type: keep
widen: true
method: imatrix
passes: 1
damp-percent: 0.02
calibration: {context: 256, seed: 7}
rewrite: {rotation: klt}
";
    let first = recipe(yaml);
    assert_eq!(first.aim, Aim::Scheme(Scheme::Phase(Phase::Mixed)));
    assert_eq!(first.rules[0].pattern.as_str(), r"blk\.[01]\.'x");
    assert_eq!(first.rules[1].ty, WantedType::Keep);
    assert_eq!(first.output, Some(GgmlType::Q8_0.into()));
    let sequences = first.samples.max_sequences;
    assert_eq!(
        (first.samples.context_tokens, sequences, first.samples.seed),
        (256, 512, 7)
    );
    assert_eq!(recipe(&first.to_yaml()).to_yaml(), first.to_yaml());
}

#[test]
fn sizes_are_powers_of_1000() {
    let check = |text, expected| assert_eq!(parse_size(text).ok(), expected, "{text}");
    check("500M", Some(500_000_000));
    check("4G", Some(4_000_000_000));
    check("17", Some(17));
    check("1.5M", Some(1_500_000));
    check("0.25K", Some(250));
    check("4.0", Some(4));
    for odd in [
        "1.5", "1.2345K", "1.M", ".5M", "1.5.5M", "1.-5M", "1,5M", "-1M", "nanM",
    ] {
        check(odd, None);
    }
    check("0", None);
    check("M", None);
    check("99999999999G", None);
    check("é", None);
}

#[test]
fn every_way_to_aim_is_written() {
    for aim in [
        "phase: 1",
        "outtype: Q4_K_M",
        "outtype: auto",
        "target-bpw: 4.5",
        "target-size: 4000000",
    ] {
        let written = recipe(aim).to_yaml();
        assert!(written.contains(&format!("{aim}\n")), "{written}");
    }
    assert_eq!(recipe("target-size: 4M").aim, Aim::FileBytes(4_000_000));
    assert_eq!(recipe("# nothing").aim, Aim::OwnType);
}

#[test]
fn what_needs_a_text_is_known() {
    let check = |yaml: &str, expected| {
        let entries = RecipeEntries::of_yaml(yaml).unwrap();
        assert_eq!(entries.calibration_key(), expected, "{yaml}");
    };
    check("phase: 2\npure: false", None);
    check("method: gptq", Some("method"));
    check("method: rtn\npasses: 3", None);
    check("passes: 3", Some("passes"));
    check("bias-absorption: false\nrewrite: {apply: false}", None);
    check("calibration: {seed: 7}", Some("seed"));
    check("rewrite: {rotation: klt}", Some("rotation"));
    // A recipe without such keys is printed without them.
    let printed = recipe("phase: 2").to_data_free_yaml();
    check(&printed, None);
    assert_eq!(recipe(&printed).to_yaml(), recipe("phase: 2").to_yaml());
}

#[test]
fn flags_override_the_file() {
    let entries = |yaml| RecipeEntries::of_yaml(yaml).unwrap();
    let file = "outtype: q8_0\npasses: 1\nrules: [{tensor: a, type: q8_0}]";
    let merged = entries("phase: 2\nrules: [{tensor: b, type: q8_0}]").or(entries(file));
    let recipe = merged.resolve().unwrap();
    assert!(recipe.to_yaml().contains("rotation: auto\n"));
    assert_eq!(recipe.aim, Aim::Scheme(Scheme::Phase(Phase::W4A8)));
    assert_eq!(recipe.rounding.passes, 1);
    let patterns: Vec<_> = recipe
        .rules
        .iter()
        .map(|rule| rule.pattern.as_str())
        .collect();
    assert_eq!(patterns, ["b", "a"]);
}

#[test]
fn errors_name_line_and_key() {
    let check = |yaml: &str, parts: &[&str]| {
        let entries = RecipeEntries::of_yaml(yaml).and_then(|entries| entries.check());
        let error = entries.unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    check("pure: true\noutype: q8_0", &["`outype`", "line 2"]);
    check("phase: 4", &["`phase`", "line 1", "found `4`"]);
    check(
        "\n\nouttype: q9_0",
        &["`outtype`", "line 3", "`q9_0` is not a file type"],
    );
    check(
        "rules:\n  - {tensor: '(', type: q8_0}",
        &["`(` is no regular expression"],
    );
    check(
        "rules:\n  - {tensor: a, type: iq1_s}",
        &["line 2", "IQ1_S cannot be written"],
    );
    check("rules:\n  - {tensor: a}", &["type"]);
    check(
        "phase: 1\nouttype: q8_0",
        &["`phase` and `outtype` exclude each other"],
    );
    check("phase: 1\npure: true", &["`pure` goes with `outtype`"]);
    check(
        "target-correction: 1.5",
        &["`target-correction` is out of range"],
    );
    check("calibration: {context: 2}", &["`context` is out of range"]);
    check("calibration: {text: a}", &["`text`", "line 1"]);
    check("target-size: 4T", &["`target-size`", "not a size"]);
}
