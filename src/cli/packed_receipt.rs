//! `receipt.json` of a packed folder: what went in, what came out.

use nemoconv::convert::Summary;
use nemoconv::convert::calibrated::workspace::Workspace;
use nemoconv::formats::checkpoint::Checkpoint;
use nemoconv::plan::packed::PackedPlan;
use serde_json::{Value, json};

use super::receipt::shards_json;

/// The plan as JSON.
pub fn plan_json(checkpoint: &Checkpoint, plan: &PackedPlan) -> Value {
    let files: Vec<_> = plan
        .shards
        .iter()
        .map(|shard| {
            json!({ "name": shard.name, "bytes": shard.file_bytes(), "tensors": shard.slots.len() })
        })
        .collect();
    let linears: Vec<_> = plan
        .linears
        .iter()
        .zip(&plan.schemes)
        .map(|(linear, scheme)| {
            json!({
                "module": linear.module,
                "shape": [linear.rows, linear.columns],
                "scheme": scheme.as_ref().map(|scheme| scheme.scheme.to_string()),
            })
        })
        .collect();
    json!({
        "nemoconv": env!("CARGO_PKG_VERSION"),
        "file_bytes": plan.file_bytes(),
        "weights": plan.plan.weights(),
        "bits_per_weight": plan.bits_per_weight(),
        "source": { "revision": checkpoint.revision(), "files": shards_json(checkpoint) },
        "files": files,
        "linears": linears,
        "remarks": plan.remarks,
    })
}

/// Adds what came of it.
pub fn add_summary(receipt: &mut Value, summary: &Summary, workspace: Option<&Workspace>) {
    receipt["oddities"] = json!(summary.oddities);
    if let Some(workspace) = workspace {
        receipt["rounding"] = json!(workspace.outcomes().collect::<Vec<_>>());
    }
}
