//! Parts of a run as one: what the run would have written unsharded, byte for byte but for its date.
//!
//! Enters: the stored parts. Leaves: results and samples. Asks no model.

use serde_json::{Value, json};

use super::files::StoredRun;
use super::results::{figures, sample_counts, task_hashes};
use super::run::TaskSamples;
use super::shard::Shard;
use crate::error::{Error, Fault, Result};

/// What depends on the part.
const OWN_TO_A_PART: [&str; 5] = ["results", "n-samples", "task_hashes", "date", "nemoconv"];

/// Puts all parts of one run together. The date is that of the earliest part.
///
/// # Errors
/// A part that is missing, given twice, or of another run.
pub fn merge(mut parts: Vec<StoredRun>) -> Result<(Value, Vec<TaskSamples>)> {
    let mut shards: Vec<Shard> = parts.iter().map(shard_of).collect::<Result<_>>()?;
    parts.sort_by_key(|part| shard_of(part).ok());
    shards.sort();
    let Some(first) = parts.first() else {
        return Err(Error::Data(Fault::new("there are no parts to merge")));
    };
    for part in &parts[1..] {
        check_same_run(first, part)?;
    }
    check_complete(&shards, &parts)?;

    let mut tasks = Vec::new();
    for (index, task) in first.tasks.iter().enumerate() {
        let samples = parts
            .iter()
            .flat_map(|part| part.tasks[index].samples.iter().cloned());
        let mut samples: Vec<_> = samples.collect();
        samples.sort_by_key(|sample| sample.doc_id);
        let expected = task.original.min(limit_of(first));
        let in_order = samples
            .iter()
            .enumerate()
            .all(|(index, sample)| index == sample.doc_id);
        if samples.len() != expected || !in_order {
            let what = format!(
                "{}: expected documents 0 to {}, found {} documents with others or with gaps",
                task.task.name(),
                expected.saturating_sub(1),
                samples.len()
            );
            return Err(Error::Data(Fault::new(what).in_file(&first.path)));
        }
        tasks.push(TaskSamples {
            samples,
            ..task.clone()
        });
    }
    let mut results = first.results.clone();
    results["results"] = figures(&tasks)["results"].take();
    results["n-samples"] = sample_counts(&tasks);
    results["task_hashes"] = task_hashes(&tasks);
    let dates = parts
        .iter()
        .filter_map(|part| part.results["date"].as_f64());
    results["date"] = json!(dates.fold(f64::INFINITY, f64::min));
    if let Some(own) = results["nemoconv"].as_object_mut() {
        own.shift_remove("shard");
    }
    Ok((results, tasks))
}

fn shard_of(part: &StoredRun) -> Result<Shard> {
    let shard = part.results["nemoconv"]["shard"].as_str();
    let shard = shard.and_then(|text| text.parse().ok());
    shard.ok_or_else(|| {
        let fault = Fault::new("the results are not a part of a sharded run")
            .in_file(&part.path)
            .hint("name the results that `nemoconv eval --shard I/N` wrote");
        Error::Data(fault)
    })
}

fn limit_of(part: &StoredRun) -> usize {
    let limit = part.results["config"]["limit"].as_u64();
    limit.map_or(usize::MAX, |limit| limit as usize)
}

fn check_same_run(first: &StoredRun, other: &StoredRun) -> Result<()> {
    let differs = |what: String| {
        let fault = Fault::new(format!("{what} differs from that of the other parts"))
            .in_file(&other.path)
            .hint("merge parts of one model, run with the same flags and data");
        Err(Error::Data(fault))
    };
    let (Some(a), Some(b)) = (first.results.as_object(), other.results.as_object()) else {
        return differs("the content".into());
    };
    for key in a.keys().chain(b.keys()) {
        if !OWN_TO_A_PART.contains(&key.as_str()) && a.get(key) != b.get(key) {
            return differs(format!("`{key}`"));
        }
    }
    for key in ["version", "identity", "add_bos"] {
        if a["nemoconv"][key] != b["nemoconv"][key] {
            return differs(format!("`nemoconv.{key}`"));
        }
    }
    let names = |run: &StoredRun| -> Vec<_> {
        run.tasks
            .iter()
            .map(|samples| (samples.task, samples.original))
            .collect()
    };
    if names(first) != names(other) {
        return differs("the list of tasks".into());
    }
    Ok(())
}

fn check_complete(shards: &[Shard], parts: &[StoredRun]) -> Result<()> {
    let fault = |what: String| {
        let path = parts.first().map(|part| part.path.clone());
        Err(Error::Data(
            Fault::new(what).in_file(path.unwrap_or_default()),
        ))
    };
    if let Some(pair) = shards.windows(2).find(|pair| pair[0] == pair[1]) {
        return fault(format!("part {} is given twice", pair[0]));
    }
    let count = shards[0].count();
    if let Some(other) = shards.iter().find(|shard| shard.count() != count) {
        return fault(format!(
            "parts {} and {other} are of different runs",
            shards[0]
        ));
    }
    let missing: Vec<String> = (1..=count)
        .map(|index| format!("{index}/{count}"))
        .filter(|name| !shards.iter().any(|shard| shard.to_string() == *name))
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        fault(format!("missing: part {}", missing.join(", ")))
    }
}
