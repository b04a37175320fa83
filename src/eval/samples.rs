//! Lines of `samples_TASK_DATE.jsonl`: one scored document each.
//!
//! Enters: an item and its answers, or a line that this program or lm-eval wrote. Leaves: [`Sample`]. Knows no model.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::metrics::{Measured, measure};
use super::python_text;
use super::requests::Answer;
use super::tasks::{Item, Question, Task};

/// One scored document.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Position in the data.
    pub doc_id: usize,
    /// The line as it is stored, without its end.
    pub line: String,
    /// The strings of each request.
    pub arguments: Vec<Vec<String>>,
    /// The answer to each request.
    pub log_likelihoods: Vec<f64>,
    /// Scored tokens of each request; empty when read from a file, which does not say.
    pub target_tokens: Vec<usize>,
    /// In the task's order.
    pub metrics: Vec<Measured>,
    /// Digests of document, prompt and target, joined.
    pub hashes: String,
}

impl Sample {
    /// A scored document; `target_tokens` are the scored tokens of each request.
    pub fn new(
        task: Task,
        doc_id: usize,
        item: &Item,
        answers: &[Answer],
        target_tokens: Vec<usize>,
    ) -> Self {
        let arguments = arguments_of(&item.question);
        let metrics = measure(task, &item.question, answers);
        let document = Value::Object(item.document.clone());
        let doc_hash = sha256(&python_text::json_indented(&document));
        let prompt_hash = sha256(&arguments[0][0]);
        let target_hash = sha256(&item.target);
        let is_rolling = matches!(item.question, Question::Rolling { .. });
        let responses: Vec<Value> = answers
            .iter()
            .map(|answer| {
                let number = python_text::float(answer.log_likelihood);
                if is_rolling {
                    json!(number)
                } else {
                    json!([number, python_text::boolean(answer.is_greedy)])
                }
            })
            .collect();
        let mut line = json!({
            "doc_id": doc_id,
            "doc": document,
            "target": item.target,
            "arguments": arguments_json(&arguments),
            "resps": responses.iter().map(|response| json!([response])).collect::<Vec<_>>(),
            "filtered_resps": responses,
            "filter": "none",
            "metrics": task.metrics().iter().map(|(metric, _)| metric).collect::<Vec<_>>(),
            "doc_hash": doc_hash,
            "prompt_hash": prompt_hash,
            "target_hash": target_hash,
        });
        for ((metric, _), measured) in task.metrics().iter().zip(&metrics) {
            line[*metric] = match measured {
                Measured::Number(number) => json!(number),
                Measured::Weighted {
                    log_likelihood,
                    weight,
                } => json!([log_likelihood, weight]),
            };
        }
        Self {
            doc_id,
            line: python_text::json_line(&line),
            arguments,
            log_likelihoods: answers.iter().map(|answer| answer.log_likelihood).collect(),
            target_tokens,
            metrics,
            hashes: doc_hash + &prompt_hash + &target_hash,
        }
    }

    /// Reads a line of a samples file of `task`.
    ///
    /// # Errors
    /// Says which part of the line is not as lm-eval writes it.
    pub fn parse(task: Task, line: &str) -> Result<Self, String> {
        let sample: Value =
            serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
        let wrong = |key: &str| format!("`{key}` is not as lm-eval writes it");
        let doc_id = sample["doc_id"].as_u64();
        let doc_id = doc_id.and_then(|id| usize::try_from(id).ok());
        let metrics = task.metrics().iter().map(|(metric, _)| {
            let measured = match &sample[*metric] {
                Value::Array(pair) => pair.first().zip(pair.get(1)).and_then(|(number, weight)| {
                    Some(Measured::Weighted {
                        log_likelihood: number.as_f64()?,
                        weight: weight.as_u64()?,
                    })
                }),
                number => number.as_f64().map(Measured::Number),
            };
            measured.ok_or_else(|| wrong(metric))
        });
        let hashes = ["doc_hash", "prompt_hash", "target_hash"]
            .map(|key| sample[key].as_str().ok_or_else(|| wrong(key)));
        let hashes: Result<String, String> = hashes.into_iter().collect();
        Ok(Self {
            doc_id: doc_id.ok_or_else(|| wrong("doc_id"))?,
            line: line.to_string(),
            arguments: parse_arguments(&sample["arguments"]).ok_or_else(|| wrong("arguments"))?,
            log_likelihoods: parse_responses(&sample["filtered_resps"])
                .ok_or_else(|| wrong("filtered_resps"))?,
            target_tokens: Vec::new(),
            metrics: metrics.collect::<Result<_, _>>()?,
            hashes: hashes?,
        })
    }
}

fn arguments_of(question: &Question) -> Vec<Vec<String>> {
    match question {
        Question::Choices { requests, .. } => requests
            .iter()
            .map(|request| vec![request.context.clone(), request.continuation.clone()])
            .collect(),
        Question::Rolling { text, .. } => vec![vec![text.clone()]],
    }
}

fn arguments_json(arguments: &[Vec<String>]) -> Value {
    let request = |(index, texts): (usize, &Vec<String>)| {
        let texts: Map<String, Value> = texts
            .iter()
            .enumerate()
            .map(|(index, text)| (format!("arg_{index}"), json!(text)))
            .collect();
        (format!("gen_args_{index}"), Value::Object(texts))
    };
    Value::Object(arguments.iter().enumerate().map(request).collect())
}

fn parse_arguments(value: &Value) -> Option<Vec<Vec<String>>> {
    let requests = value.as_object()?.values();
    requests
        .map(|request| {
            let texts = request.as_object()?.values();
            texts.map(|text| Some(text.as_str()?.to_string())).collect()
        })
        .collect()
}

/// `["-1.5", "False"]` of a choice, `"-1.5"` of a whole text; older versions have numbers.
fn parse_responses(value: &Value) -> Option<Vec<f64>> {
    let responses = value.as_array()?.iter();
    responses
        .map(|response| {
            let number = response.get(0).unwrap_or(response);
            let parsed = || number.as_str()?.parse().ok();
            number.as_f64().or_else(parsed)
        })
        .collect()
}

/// SHA-256 of a text, in hexadecimal digits.
pub fn sha256(text: &str) -> String {
    super::hex(&Sha256::digest(text))
}
