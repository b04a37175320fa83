//! What an evaluation found, as tables and as JSON.

use nemoconv::eval::comparison::{Comparison, MetricChange};
use nemoconv::eval::files::StoredRun;
use nemoconv::eval::run::TaskSamples;
use serde_json::{Value, json};

use super::eval_model::Performance;
use super::output::{human_bytes, table};

/// Compares every task of a run with the same task of a baseline.
pub fn compare(
    tasks: &[TaskSamples],
    baseline: &[TaskSamples],
) -> nemoconv::error::Result<Vec<Comparison>> {
    tasks
        .iter()
        .map(|samples| {
            let other = baseline.iter().find(|other| other.task == samples.task);
            let other = other.map_or(&[][..], |other| &other.samples);
            Comparison::of(samples.task, &samples.samples, other)
        })
        .collect()
}

/// One line per task and metric; beside a baseline with the paired statistics.
pub fn accuracy_table(results: &Value, tasks: &[TaskSamples], changes: &[Comparison]) -> String {
    let mut header = vec!["task", "n", "metric", "value", "stderr"];
    if !changes.is_empty() {
        header.extend([
            "baseline",
            "difference",
            "paired stderr",
            "flips",
            "p (McNemar)",
            "smallest detectable drop",
        ]);
    }
    let mut rows = vec![header.iter().map(|cell| cell.to_string()).collect()];
    for samples in tasks {
        let name = samples.task.name();
        for (index, (metric, _)) in samples.task.metrics().iter().enumerate() {
            let figure = |key: String| figure(&results["results"][name][key]);
            let mut row = vec![
                name.to_string(),
                samples.samples.len().to_string(),
                metric.to_string(),
                figure(format!("{metric},none")),
                figure(format!("{metric}_stderr,none")),
            ];
            let change = changes.iter().find(|change| change.task == samples.task);
            if let Some(change) = change.and_then(|change| change.metrics.get(index)) {
                row.extend(change_cells(change));
            }
            rows.push(row);
        }
    }
    let right: Vec<_> = header
        .iter()
        .map(|name| !matches!(*name, "task" | "metric"))
        .collect();
    table(&rows, &right)
}

fn figure(value: &Value) -> String {
    match value.as_f64() {
        Some(number) if number.abs() < 10.0 => format!("{number:.4}"),
        Some(number) if number.abs() < 1e6 => format!("{number:.2}"),
        Some(number) => format!("{number:.4e}"),
        None => value.as_str().unwrap_or("-").to_string(),
    }
}

fn change_cells(change: &MetricChange) -> Vec<String> {
    let mut cells = vec![
        figure(&json!(change.baseline)),
        format!("{:+.4}", change.difference),
    ];
    match &change.paired {
        Some(paired) => cells.extend([
            paired
                .stderr
                .map_or_else(|| "N/A".into(), |stderr| format!("{stderr:.4}")),
            format!("{} (+{} -{})", paired.flips(), paired.gained, paired.lost),
            format!("{:.3}", paired.p_exact),
            format!("{:.4}", paired.smallest_detectable_drop),
        ]),
        None => cells.extend(["N/A"; 4].map(String::from)),
    }
    cells
}

/// File, memory and speed of each model.
pub fn performance_table(models: &[&Performance]) -> String {
    let header = [
        "model",
        "file",
        "weights",
        "peak memory",
        "prefill tokens/s",
        "decode tokens/s",
    ];
    let mut rows = vec![header.map(String::from).to_vec()];
    rows.extend(models.iter().map(|model| {
        vec![
            model.model.clone(),
            human_bytes(model.file_bytes),
            human_bytes(model.weight_bytes),
            model
                .peak_memory_bytes
                .map_or_else(|| "-".into(), human_bytes),
            format!("{:.1}", model.prefill_tokens_per_second),
            format!("{:.1}", model.decode_tokens_per_second),
        ]
    }));
    table(&rows, &[false, true, true, true, true, true])
}

/// The comparison as JSON.
pub fn comparison_json(baseline: &str, changes: &[Comparison]) -> Value {
    let metric = |change: &MetricChange| {
        let mut value = json!({
            "metric": change.metric,
            "baseline": change.baseline,
            "model": change.model,
            "difference": change.difference,
        });
        if let Some(paired) = &change.paired {
            value["paired_stderr"] = json!(paired.stderr);
            value["flips"] = json!(paired.flips());
            value["gained"] = json!(paired.gained);
            value["lost"] = json!(paired.lost);
            value["mcnemar_p"] = json!(paired.p_exact);
            value["mcnemar_mid_p"] = json!(paired.p_mid);
            value["smallest_detectable_drop"] = json!(paired.smallest_detectable_drop);
        }
        value
    };
    let task = |change: &Comparison| {
        json!({
            "task": change.task.name(),
            "documents": change.documents,
            "changed_predictions": change.changed_predictions,
            "mean_abs_log_likelihood_change_per_token": change.mean_abs_change_per_token,
            "metrics": change.metrics.iter().map(metric).collect::<Vec<_>>(),
        })
    };
    json!({
        "baseline": baseline,
        "tasks": changes.iter().map(task).collect::<Vec<_>>(),
    })
}

/// The name that a stored run gives its model.
pub fn model_name(run: &StoredRun) -> String {
    let name = run.results["model_name"].as_str();
    name.unwrap_or("baseline").to_string()
}
