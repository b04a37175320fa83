//! `results_DATE.json` in lm-eval's shape.
//!
//! Enters: samples and a description of the run. Leaves: JSON. Nothing in it depends on how long a run took, on which
//! machine, or in how many parts: those are kept beside it.

use serde_json::{Map, Value, json};

use super::metrics::aggregate;
use super::run::TaskSamples;
use super::samples::sha256;
use super::shard::Shard;
use super::tasks::task_config;
use crate::model::tokenizer::{NamedToken, TextEncoder};

/// What a result file says about a run beside its figures.
#[derive(Debug, Clone)]
pub struct Description {
    /// Name of the model, as users know it.
    pub model_name: String,
    /// Number of weights.
    pub parameters: u64,
    /// Stored type, such as `Q4_K_M` or `bfloat16`.
    pub dtype: String,
    /// Digest of the artifact, by which runs of the same model are known.
    pub identity: String,
    /// Revision of the source, if it has one.
    pub revision: Option<String>,
    /// Longest input.
    pub max_length: usize,
    /// Whether special tokens were asked for or refused.
    pub add_bos: Option<bool>,
    /// Documents per task.
    pub limit: Option<usize>,
    /// Which of them.
    pub shard: Shard,
    /// Begin of the run, seconds since 1970.
    pub date: f64,
}

/// The result file.
pub fn results(description: &Description, encoder: &TextEncoder, tasks: &[TaskSamples]) -> Value {
    let mut results = figures(tasks);
    let mut by_name: Vec<_> = tasks.iter().collect();
    by_name.sort_by_key(|samples| samples.task.name());
    let each = |value: &dyn Fn(&TaskSamples) -> Value| -> Value {
        let entries = by_name.iter();
        Value::Object(
            entries
                .map(|samples| (samples.task.name().to_string(), value(samples)))
                .collect(),
        )
    };
    let set = |results: &mut Value, key: &str, value: Value| results[key] = value;
    set(&mut results, "group_subtasks", json!({}));
    set(
        &mut results,
        "configs",
        each(&|samples| task_config(samples.task, &samples.files)),
    );
    set(
        &mut results,
        "versions",
        each(&|samples| json!(samples.task.version())),
    );
    set(&mut results, "n-shot", each(&|_| json!(0)));
    set(
        &mut results,
        "higher_is_better",
        each(&|samples| {
            let metrics = samples.task.metrics().iter();
            Value::Object(
                metrics
                    .map(|(metric, higher)| (metric.to_string(), json!(higher)))
                    .collect(),
            )
        }),
    );
    set(&mut results, "n-samples", sample_counts(tasks));
    set(&mut results, "config", config(description));
    set(&mut results, "git_hash", Value::Null);
    set(&mut results, "date", json!(description.date));
    let version = concat!("nemoconv ", env!("CARGO_PKG_VERSION"));
    set(&mut results, "pretty_env_info", json!(version));
    set(&mut results, "transformers_version", Value::Null);
    set(&mut results, "lm_eval_version", json!("0.4.13"));
    set(&mut results, "upper_git_hash", Value::Null);
    for (role, token) in [
        ("pad", encoder.pad()),
        ("eos", encoder.eos()),
        ("bos", encoder.bos()),
    ] {
        set(
            &mut results,
            &format!("tokenizer_{role}_token"),
            named(token),
        );
    }
    let eot = encoder.eos().map(|token| token.id);
    set(&mut results, "eot_token_id", json!(eot));
    set(&mut results, "max_length", json!(description.max_length));
    set(&mut results, "task_hashes", task_hashes(tasks));
    set(&mut results, "model_source", json!("nemoconv"));
    set(&mut results, "model_name", json!(description.model_name));
    let sanitized = sanitize(&description.model_name);
    set(&mut results, "model_name_sanitized", json!(sanitized));
    for key in ["system_instruction", "system_instruction_sha"] {
        set(&mut results, key, Value::Null);
    }
    set(&mut results, "fewshot_as_multiturn", json!(false));
    for key in [
        "chat_template",
        "chat_template_sha",
        "total_evaluation_time_seconds",
    ] {
        set(&mut results, key, Value::Null);
    }
    let mut own = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "identity": description.identity,
        "add_bos": description.add_bos,
    });
    if description.shard != Shard::WHOLE {
        own["shard"] = json!(description.shard.to_string());
    }
    set(&mut results, "nemoconv", own);
    results
}

/// `{"results": ...}`: the figures of every task, in the order of the run.
pub(super) fn figures(tasks: &[TaskSamples]) -> Value {
    let entry = |samples: &TaskSamples| {
        let name = samples.task.name();
        let mut entry = Map::new();
        entry.insert("name".into(), json!(name));
        entry.insert("alias".into(), json!(name));
        entry.insert("sample_len".into(), json!(samples.samples.len()));
        for (index, (metric, _)) in samples.task.metrics().iter().enumerate() {
            let documents: Vec<_> = samples
                .samples
                .iter()
                .map(|sample| sample.metrics[index])
                .collect();
            let aggregate = aggregate(metric, &documents);
            let or_absent = |value: Option<f64>| value.map_or_else(|| json!("N/A"), |v| json!(v));
            entry.insert(format!("{metric},none"), or_absent(aggregate.value));
            entry.insert(format!("{metric}_stderr,none"), or_absent(aggregate.stderr));
        }
        (name.to_string(), Value::Object(entry))
    };
    let entries: Map<_, _> = tasks.iter().map(entry).collect();
    json!({ "results": entries })
}

pub(super) fn sample_counts(tasks: &[TaskSamples]) -> Value {
    let entry = |samples: &TaskSamples| {
        let counts = json!({ "original": samples.original, "effective": samples.samples.len() });
        (samples.task.name().to_string(), counts)
    };
    Value::Object(tasks.iter().map(entry).collect())
}

pub(super) fn task_hashes(tasks: &[TaskSamples]) -> Value {
    let entry = |samples: &TaskSamples| {
        let hashes: String = samples
            .samples
            .iter()
            .map(|sample| sample.hashes.as_str())
            .collect();
        (samples.task.name().to_string(), json!(sha256(&hashes)))
    };
    Value::Object(tasks.iter().map(entry).collect())
}

fn config(description: &Description) -> Value {
    let Description {
        model_name, dtype, ..
    } = description;
    json!({
        "model": "nemoconv",
        "model_args": format!("pretrained={model_name},dtype={dtype}"),
        "model_num_parameters": description.parameters,
        "model_dtype": dtype,
        "model_revision": description.revision.as_deref().unwrap_or("main"),
        "model_sha": description.revision.as_deref().unwrap_or(""),
        "batch_size": 1,
        "batch_sizes": [],
        "device": "cpu",
        "use_cache": null,
        "limit": description.limit,
        "bootstrap_iters": 0,
        "gen_kwargs": null,
        "random_seed": 0,
        "numpy_seed": 1234,
        "torch_seed": 1234,
        "fewshot_seed": 1234,
    })
}

/// Text and id, both as text.
fn named(token: Option<&NamedToken>) -> Value {
    match token {
        Some(token) => json!([token.text, token.id.to_string()]),
        None => json!([null, "None"]),
    }
}

/// The name as a folder's name.
pub fn sanitize(model_name: &str) -> String {
    let forbidden = |c: char| r#""<>:/|\?*[]"#.contains(c);
    let mut name = String::new();
    let mut in_run = false;
    for c in model_name.chars() {
        match (forbidden(c), in_run) {
            (true, false) => name.push_str("__"),
            (true, true) => {}
            (false, _) => name.push(c),
        }
        in_run = forbidden(c);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_folders_as_in_the_reference() {
        let check = |name, expected| assert_eq!(sanitize(name), expected);
        check("org/name", "org__name");
        check("a://b[c]d", "a__b__c__d");
        check("model-Q4_K_M.gguf", "model-Q4_K_M.gguf");
    }
}
