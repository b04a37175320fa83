//! What a result file says about a task's definition.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::Task;

/// The entry of `configs`; `files` are where the rows came from.
pub fn task_config(task: Task, files: &[PathBuf]) -> Value {
    let files: Vec<_> = files
        .iter()
        .map(|file| file.to_string_lossy().into_owned())
        .collect();
    let format = match files.first() {
        Some(file) if file.ends_with(".parquet") => "parquet",
        _ => "json",
    };
    let files = match <[String; 1]>::try_from(files) {
        Ok([file]) => json!(file),
        Err(files) => json!(files),
    };
    let prompt = Prompt::of(task);
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.into(), value);
    set("task", json!(task.name()));
    set("dataset_path", json!(format));
    set(
        "dataset_kwargs",
        json!({ "data_files": { task.split(): files } }),
    );
    set(&format!("{}_split", task.split()), json!(task.split()));
    if let Some(process_docs) = prompt.process_docs {
        set("process_docs", json!(process_docs));
    }
    set("doc_to_text", json!(prompt.text));
    set("doc_to_target", json!(prompt.target));
    set("unsafe_code", json!(false));
    if let Some(choice) = prompt.choice {
        set("doc_to_choice", json!(choice));
    }
    if task == Task::Wikitext {
        set("process_results", json!("process_results"));
    }
    set("description", json!(""));
    set("target_delimiter", json!(" "));
    set("fewshot_delimiter", json!("\n\n"));
    set(
        "fewshot_config",
        json!({
            "sampler": "default", "split": null, "process_docs": prompt.process_docs,
            "fewshot_indices": null, "samples": null, "doc_to_text": prompt.text,
            "doc_to_choice": prompt.choice, "doc_to_target": prompt.target, "gen_prefix": null,
            "fewshot_delimiter": "\n\n", "target_delimiter": " ",
        }),
    );
    set("num_fewshot", json!(0));
    let metrics = task.metrics().iter().map(|(metric, higher_is_better)| {
        if task == Task::Wikitext {
            json!({ "metric": metric })
        } else {
            json!({ "metric": metric, "aggregation": "mean", "higher_is_better": higher_is_better })
        }
    });
    set("metric_list", metrics.collect());
    let output_type = if task == Task::Wikitext {
        "loglikelihood_rolling"
    } else {
        "multiple_choice"
    };
    set("output_type", json!(output_type));
    set("repeats", json!(1));
    set("should_decontaminate", json!(prompt.query.is_some()));
    if let Some(query) = prompt.query {
        set("doc_to_decontamination_query", json!(query));
    }
    set("metadata", json!({ "version": task.version() }));
    Value::Object(config)
}

/// Templates in the reference's notation; what is a function there stands by its name.
struct Prompt {
    process_docs: Option<&'static str>,
    text: &'static str,
    target: &'static str,
    choice: Option<&'static str>,
    query: Option<&'static str>,
}

impl Prompt {
    fn of(task: Task) -> Self {
        let (process_docs, text, target, choice, query) = match task {
            Task::ArcEasy | Task::ArcChallenge => (
                None,
                "Question: {{question}}\nAnswer:",
                "{{choices.label.index(answerKey)}}",
                Some("{{choices.text}}"),
                Some("Question: {{question}}\nAnswer:"),
            ),
            Task::Piqa => (
                None,
                "Question: {{goal}}\nAnswer:",
                "label",
                Some("{{[sol1, sol2]}}"),
                Some("goal"),
            ),
            Task::Winogrande => (
                None,
                "doc_to_text",
                "doc_to_target",
                Some("doc_to_choice"),
                Some("sentence"),
            ),
            Task::Hellaswag => (
                Some("process_docs"),
                "{{query}}",
                "{{label}}",
                Some("choices"),
                None,
            ),
            Task::Wikitext => (None, "", "wikitext_detokenizer", None, Some("{{page}}")),
        };
        Self {
            process_docs,
            text,
            target,
            choice,
            query,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Key names of the reference's own result file, in its order.
    #[test]
    fn keys_are_those_of_the_reference() {
        let check = |task: Task, own: &[&str]| {
            let config = task_config(task, &["a.jsonl".into()]);
            let keys: Vec<_> = config.as_object().unwrap().keys().collect();
            assert_eq!(keys, own);
        };
        let arc = [
            "task",
            "dataset_path",
            "dataset_kwargs",
            "test_split",
            "doc_to_text",
            "doc_to_target",
            "unsafe_code",
            "doc_to_choice",
            "description",
            "target_delimiter",
            "fewshot_delimiter",
            "fewshot_config",
            "num_fewshot",
            "metric_list",
            "output_type",
            "repeats",
            "should_decontaminate",
            "doc_to_decontamination_query",
            "metadata",
        ];
        check(Task::ArcEasy, &arc);
        let mut hellaswag = arc.to_vec();
        hellaswag[3] = "validation_split";
        hellaswag.insert(4, "process_docs");
        hellaswag.retain(|key| *key != "doc_to_decontamination_query");
        check(Task::Hellaswag, &hellaswag);
    }
}
