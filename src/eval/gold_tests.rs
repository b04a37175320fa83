//! Everything up to the model and after it, against the reference's own files. Runs where `NEMOCONV_SHARED` has them.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

use std::path::{Path, PathBuf};

use nemoconv_formats::checkpoint::config_json;
use serde_json::Value;

use super::document::DataSet;
use super::metrics::{Measured, aggregate, first_maximum};
use super::requests::{Answer, Prompting, TokenPair};
use super::samples::Sample;
use super::tasks::{Item, Question, Task};
use crate::model::tokenizer::{TextEncoder, TokenizerFiles};

/// The folder that the variable names, or nothing and a line that says so.
fn shared() -> Option<PathBuf> {
    let shared = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from);
    if shared.is_none() {
        println!("skipped: NEMOCONV_SHARED is not set");
    }
    shared
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().unwrap().iter();
    values.map(|value| value.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    let values = value.as_array().unwrap().iter();
    values.map(|value| value.as_u64().unwrap() as u32).collect()
}

fn encoder(model: &Path) -> TextEncoder {
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let config = config_json::parse(&config).unwrap();
    let vocab_size = config["vocab_size"].as_u64().unwrap() as usize;
    let files = TokenizerFiles::read(model).unwrap();
    TextEncoder::of_files(&files, vocab_size).unwrap()
}

struct GoldRun {
    data: PathBuf,
    model: PathBuf,
    folder: PathBuf,
    tag: &'static str,
    add_bos: Option<bool>,
}

/// Every run of the reference on multiple-choice tasks.
fn gold_runs(shared: &Path) -> Vec<GoldRun> {
    let gold = shared.join("gold/lm-eval");
    let run = |model: &Path, folder: &str, tag, add_bos| GoldRun {
        data: shared.join("benchmarks"),
        model: model.to_owned(),
        folder: gold.join(folder),
        tag,
        add_bos,
    };
    let random = gold.join("random-nemotron-h");
    let trained = |name: &str| shared.join("models").join(name);
    vec![
        run(&random, "random", "limit150-b1", None),
        run(&random, "random", "limit150-b16", None),
        run(&random, "random", "wikihow-b1", None),
        run(&random, "random", "limit60-nobos", Some(false)),
        run(&random, "random", "limit60-maxlen40", None),
        run(&random, "random", "limit60-maxlen64", None),
        run(
            &trained("nemotron-h-tiny"),
            "nemotron-h-tiny",
            "limit100-b1",
            None,
        ),
        run(
            &trained("nemotron-h-moe-tiny"),
            "nemotron-h-moe-tiny",
            "limit50-b1",
            None,
        ),
    ]
}

impl GoldRun {
    /// Tasks of the run, their items and the reference's rows.
    fn rows(&self) -> Vec<(Task, Vec<(Item, Value)>)> {
        let task_rows = |task: Task| {
            let path = self
                .folder
                .join(format!("{}.{}.jsonl", self.tag, task.name()));
            if !path.is_file() {
                return None;
            }
            let data = DataSet::read(&self.data, task).unwrap();
            let row = |gold: Value| {
                let document = &data.documents[gold["doc_id"].as_u64().unwrap() as usize];
                (task.item(document).unwrap(), gold)
            };
            Some((task, json_lines(&path).into_iter().map(row).collect()))
        };
        Task::ALL.into_iter().filter_map(task_rows).collect()
    }
}

#[test]
fn strings_and_tokens_are_those_of_the_reference() {
    let Some(shared) = shared() else { return };
    let mut checked = 0;
    for run in gold_runs(&shared) {
        let encoder = encoder(&run.model);
        for (task, rows) in run.rows() {
            for (item, gold) in rows {
                check_item(&item, &gold, &encoder, run.add_bos, task);
                checked += 1;
            }
        }
    }
    assert!(checked > 2000, "only {checked} documents");
}

fn check_item(item: &Item, gold: &Value, encoder: &TextEncoder, add_bos: Option<bool>, task: Task) {
    let Question::Choices {
        requests,
        choice_chars,
        gold: right,
    } = &item.question
    else {
        panic!("{} has choices", task.name());
    };
    let place = format!("{} {}", task.name(), gold["doc_id"]);
    let lengths: Vec<u32> = choice_chars.iter().map(|chars| *chars as u32).collect();
    assert_eq!(ids(&gold["chars"]), lengths, "{place}");
    assert_eq!(gold["gold"], *right, "{place}");
    let pairs: Vec<_> = requests
        .iter()
        .map(|request| TokenPair::of(request, encoder, add_bos).unwrap())
        .collect();
    let context: Vec<_> = pairs.iter().map(|pair| pair.context.len() as u32).collect();
    let continuation: Vec<_> = pairs
        .iter()
        .map(|pair| pair.continuation.len() as u32)
        .collect();
    assert_eq!(ids(&gold["ctx_tokens"]), context, "{place}");
    assert_eq!(ids(&gold["cont_tokens"]), continuation, "{place}");
    if gold.get("context").is_none() {
        return;
    }
    for (index, (request, pair)) in requests.iter().zip(&pairs).enumerate() {
        let of = |key: &str| match &gold[key] {
            Value::Array(list) if key != "context_ids" || list[0].is_array() => list[index].clone(),
            one => one.clone(),
        };
        assert_eq!(of("context"), request.context, "{place}");
        assert_eq!(of("continuation"), request.continuation, "{place}");
        assert_eq!(ids(&of("context_ids")), pair.context, "{place}");
        assert_eq!(ids(&of("continuation_ids")), pair.continuation, "{place}");
    }
}

fn answers(gold: &Value) -> Vec<Answer> {
    let greedy = gold["greedy"].as_array().unwrap();
    numbers(&gold["ll"])
        .into_iter()
        .zip(greedy)
        .map(|(log_likelihood, greedy)| Answer {
            log_likelihood,
            is_greedy: greedy.as_bool().unwrap(),
        })
        .collect()
}

#[test]
fn figures_from_the_reference_s_likelihoods_are_its_figures() {
    let Some(shared) = shared() else { return };
    for run in gold_runs(&shared) {
        let results = json(&run.folder.join(format!("{}.results.json", run.tag)));
        for (task, rows) in run.rows() {
            let mut documents = Vec::new();
            for (item, gold) in rows {
                let answers = answers(&gold);
                let best = first_maximum(answers.iter().map(|answer| answer.log_likelihood));
                assert_eq!(gold["pred"], best);
                let sample = Sample::new(task, 0, &item, &answers, Vec::new());
                for ((metric, _), measured) in task.metrics().iter().zip(&sample.metrics) {
                    let expected = Measured::Number(gold[*metric].as_f64().unwrap());
                    assert_eq!(*measured, expected, "{} {metric}", gold["doc_id"]);
                }
                documents.push(sample.metrics);
            }
            check_figures(task, &documents, &results["results"][task.name()]);
        }
    }
}

fn check_figures(task: Task, documents: &[Vec<Measured>], expected: &Value) {
    for (index, (metric, _)) in task.metrics().iter().enumerate() {
        let values: Vec<_> = documents.iter().map(|metrics| metrics[index]).collect();
        let found = aggregate(metric, &values);
        let value = &expected[format!("{metric},none")];
        assert_eq!(*value, found.value.unwrap(), "{} {metric}", task.name());
        let stderr = &expected[format!("{metric}_stderr,none")];
        match found.stderr {
            Some(found) => assert_eq!(*stderr, found, "{} {metric}", task.name()),
            None => assert_eq!(stderr, "N/A"),
        }
    }
}

#[test]
fn whole_texts_are_those_of_the_reference() {
    let Some(shared) = shared() else { return };
    let gold = shared.join("gold/lm-eval");
    let encoder = encoder(&gold.join("random-nemotron-h"));
    let folder = tempfile::tempdir().unwrap();
    let pages = std::fs::read(gold.join("wikitext_sample.jsonl")).unwrap();
    std::fs::write(folder.path().join("wikitext.jsonl"), pages).unwrap();
    let data = DataSet::read(folder.path(), Task::Wikitext).unwrap();
    for tag in ["wikitext", "wikitext-maxlen128"] {
        let results = json(&gold.join(format!("random/{tag}.results.json")));
        let rows = json_lines(&gold.join(format!("random/{tag}.wikitext.jsonl")));
        assert_eq!(rows.len(), data.documents.len());
        let mut documents = Vec::new();
        for (document, gold) in data.documents.iter().zip(rows) {
            let item = Task::Wikitext.item(document).unwrap();
            let Question::Rolling { text, words, bytes } = &item.question else {
                panic!("a page is one text");
            };
            assert_eq!(
                (&gold["words"], &gold["bytes"]),
                (&(*words).into(), &(*bytes).into())
            );
            if let Some(target) = gold["target"].as_str() {
                assert_eq!(text, target);
            }
            let tokens = encoder.encode(text, None).unwrap();
            assert_eq!(gold["tokens"], tokens.len());
            let answer = Answer {
                log_likelihood: gold["loglikelihood"].as_f64().unwrap(),
                is_greedy: false,
            };
            let sample = Sample::new(Task::Wikitext, 0, &item, &[answer], Vec::new());
            documents.push(sample.metrics);
        }
        check_figures(Task::Wikitext, &documents, &results["results"]["wikitext"]);
    }
}

/// The reference's own sample lines, byte for byte, from its documents and likelihoods.
#[test]
fn sample_lines_are_those_of_the_reference() {
    let Some(shared) = shared() else { return };
    let text = std::fs::read_to_string(shared.join("gold/lm-eval/example_samples.jsonl")).unwrap();
    let tasks = [Task::ArcEasy, Task::Winogrande, Task::Hellaswag];
    assert_eq!(text.lines().count(), tasks.len());
    for (task, line) in tasks.into_iter().zip(text.lines()) {
        let parsed = Sample::parse(task, line).unwrap();
        let data = DataSet::read(&shared.join("benchmarks"), task).unwrap();
        let item = task.item(&data.documents[parsed.doc_id]).unwrap();
        let answers: Vec<_> = parsed
            .log_likelihoods
            .iter()
            .map(|log_likelihood| Answer {
                log_likelihood: *log_likelihood,
                is_greedy: false,
            })
            .collect();
        let made = Sample::new(task, parsed.doc_id, &item, &answers, Vec::new());
        assert_eq!(made.line, line);
        assert_eq!(made, parsed);
    }
}

#[test]
fn windows_of_long_texts_stay_in_bounds() {
    let Some(shared) = shared() else { return };
    let encoder = encoder(&shared.join("gold/lm-eval/random-nemotron-h"));
    for task in [Task::Hellaswag, Task::Winogrande] {
        let data = DataSet::read(&shared.join("benchmarks"), task).unwrap();
        for document in &data.documents[..60] {
            let item = task.item(document).unwrap();
            let prompting = Prompting {
                add_bos: None,
                max_length: 64,
            };
            let tokenized =
                super::requests::Tokenized::of(&item.question, &encoder, prompting).unwrap();
            for group in tokenized.prefix_groups() {
                assert!(!group.prefix.is_empty());
                for continuation in &group.continuations {
                    assert!(group.prefix.len() + continuation.tokens.len() <= 64);
                    assert!(
                        (1..=continuation.tokens.len() + 1).contains(&continuation.targets.len())
                    );
                }
            }
        }
    }
}
