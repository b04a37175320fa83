//! `receipt.json`: what went in, what came out, what happened to every source tensor.

use nemoconv::convert::Summary;
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::plan::Plan;
use nemoconv::write::gguf::parts::Parts;
use serde_json::{Value, json};

/// The plan as JSON, with how its types were allocated if they were; the receipt of a conversion adds its [`Summary`].
pub fn plan_json(
    checkpoint: &Checkpoint,
    plan: &Plan,
    parts: &Parts,
    peak_bytes: u64,
    allocation: Option<&Value>,
) -> Value {
    let files: Vec<_> = parts
        .parts
        .iter()
        .map(|part| {
            json!({
                "name": part.path.file_name().unwrap_or_default().to_string_lossy(),
                "bytes": part.layout.file_bytes(),
                "tensors": part.layout.tensor_count(),
            })
        })
        .collect();
    let tensors: Vec<_> = plan
        .tensors
        .iter()
        .zip(&parts.slots)
        .map(|(tensor, slot)| {
            json!({
                "name": tensor.name,
                "dims": tensor.dims,
                "type": tensor.ty.name(),
                "instead_of": tensor.instead_of.map(|ty| ty.name()),
                "importance": tensor.importance.is_some(),
                "bytes": tensor.bytes(),
                "file": slot.part,
                "offset": slot.offset,
            })
        })
        .collect();
    let widened: Vec<_> = plan
        .widening
        .changes()
        .into_iter()
        .map(|(field, from, to)| json!({ "field": field, "from": from, "to": to }))
        .collect();
    let mut json = json!({
        "nemoconv": env!("CARGO_PKG_VERSION"),
        "file_type": plan.file_type.name(),
        "file_bytes": parts.file_bytes(),
        "weights": plan.weights(),
        "bits_per_weight": plan.bits_per_weight(),
        "peak_memory_bytes": peak_bytes,
        "source": sources_json(checkpoint, plan),
        "widened": widened,
        "files": files,
        "tensors": tensors,
    });
    if let Some(allocation) = allocation {
        json["allocation"] = allocation.clone();
    }
    json
}

/// The files of a checkpoint.
pub fn shards_json(checkpoint: &Checkpoint) -> Value {
    let shards = checkpoint.shards().iter().map(|shard| {
        let name = shard.path().file_name().unwrap_or_default();
        json!({ "name": name.to_string_lossy(), "bytes": shard.bytes().len() })
    });
    shards.collect()
}

fn sources_json(checkpoint: &Checkpoint, plan: &Plan) -> Value {
    let shards = shards_json(checkpoint);
    let tensors: Vec<_> = checkpoint
        .tensors()
        .iter()
        .zip(&plan.fates)
        .map(|(entry, fate)| {
            let mut value = json!(fate);
            value["name"] = json!(entry.name);
            value["dtype"] = json!(entry.dtype.name());
            value["shape"] = json!(entry.shape);
            value
        })
        .collect();
    json!({ "revision": checkpoint.revision(), "files": shards, "tensors": tensors })
}

/// Adds what came of it.
pub fn with_summary(mut plan: Value, summary: &Summary, finished: Option<&Workspace>) -> Value {
    plan["oddities"] = json!(summary.oddities);
    if let Some(finished) = finished {
        plan["rounding"] = json!(finished.outcomes().collect::<Vec<_>>());
    }
    plan
}
