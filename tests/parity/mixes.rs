//! The types we give every tensor beside those that llama-quantize gives, on models of fourteen shapes.

use std::collections::{BTreeMap, BTreeSet};

use nemoconv::formats::{Dtype, GgmlType};
use nemoconv::model::nemotron_h::Storage;
use nemoconv::plan::file_type::FileType;
use nemoconv::plan::mixes::ModelTraits;
use nemoconv::plan::types::{Candidate, TypeSettings, choose};
use nemoconv_fixtures::reference;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    model: Model,
    tensors: Vec<(String, Vec<u64>)>,
    /// Names that stay F32 in every file type.
    kept: BTreeSet<String>,
    plain: BTreeMap<String, Answer>,
    with_imatrix: BTreeMap<String, Answer>,
}

#[derive(Deserialize)]
struct Model {
    pattern: String,
    experts: usize,
    heads: usize,
    kv_heads: usize,
    tied: bool,
    mtp: bool,
}

/// What llama-quantize chose for the tensors that it quantizes.
#[derive(Deserialize)]
struct Answer {
    common: String,
    others: BTreeMap<String, String>,
}

#[test]
fn types_are_llama_quantizes() {
    let path = reference().join("mixes/mixes.json");
    let text = std::fs::read_to_string(path).expect("the fixture is there");
    let cases: BTreeMap<String, Case> =
        serde_json::from_str(&text).expect("the fixture is well-formed");
    let mut failures = Vec::new();
    let mut compared = 0;
    for (name, case) in &cases {
        for (has_imatrix, answers) in [(false, &case.plain), (true, &case.with_imatrix)] {
            for (file_type, answer) in answers {
                let differing = differences(case, file_type, has_imatrix, answer);
                compared += case.tensors.len();
                failures.extend(differing.into_iter().map(|why| {
                    format!("{name}, {file_type}, importance matrix {has_imatrix}: {why}")
                }));
            }
        }
    }
    assert!(compared > 50_000, "only {compared} types compared");
    assert!(
        failures.is_empty(),
        "{} of {compared} types differ\n{}",
        failures.len(),
        failures.join("\n")
    );
}

fn differences(case: &Case, file_type: &str, has_imatrix: bool, answer: &Answer) -> Vec<String> {
    let candidates: Vec<_> = case
        .tensors
        .iter()
        .map(|(name, dims)| Candidate {
            name,
            dims,
            storage: match case.kept.contains(name) {
                true => Storage::F32,
                false => Storage::OutType,
            },
            source: Dtype::F32,
        })
        .collect();
    let file_type = file_type
        .parse::<FileType>()
        .expect("the fixture names file types");
    let settings = TypeSettings {
        allow_fallback: true,
        ..TypeSettings::of(file_type)
    };
    let choices =
        choose(&candidates, &settings, traits(&case.model, has_imatrix)).expect("types are chosen");
    candidates
        .iter()
        .zip(choices)
        .filter_map(|(candidate, choice)| {
            let expected = expected_type(case, answer, candidate.name);
            (choice.ty != expected).then(|| {
                format!(
                    "{} {:?}: expected {expected}, found {}",
                    candidate.name, candidate.dims, choice.ty
                )
            })
        })
        .collect()
}

fn traits(model: &Model, has_imatrix: bool) -> ModelTraits {
    ModelTraits {
        block_count: model.pattern.len() + usize::from(model.mtp),
        expert_count: model.experts,
        gqa_of_block_0: match model.pattern.starts_with('*') {
            true => model.heads / model.kv_heads,
            false => 0,
        },
        has_output: !model.tied,
        has_imatrix,
    }
}

fn expected_type(case: &Case, answer: &Answer, name: &str) -> GgmlType {
    if case.kept.contains(name) {
        return GgmlType::F32;
    }
    let text = answer.others.get(name).unwrap_or(&answer.common);
    text.to_uppercase()
        .parse()
        .unwrap_or_else(|_| panic!("`{text}` is a type"))
}
