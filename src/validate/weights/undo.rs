//! Which stored values correspond to which of the model before widening, and the factor they took.
//!
//! Enters: a stored model and its keys. Leaves: a [`View`] per tensor. Reads no weights.

use std::collections::HashMap;

use nemoconv_formats::gguf::Value;

use crate::artifact::{StoredModel, StoredTensor};
use crate::model::nemotron_h::{Stream, TensorRule, Widths, expected_tensors};
use crate::plan::widen::Widening;

/// The part of each matrix that the unwidened model has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// Its rows; those after them are padding.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
    /// What every value was multiplied with.
    pub factor: f32,
}

/// Views of all tensors of one model.
pub struct Views {
    widening: Widening,
    rules: HashMap<String, &'static TensorRule>,
    has_output: bool,
    config: crate::model::config::NemotronHConfig,
}

impl Views {
    pub fn of(model: &StoredModel) -> Self {
        let mut config = model.config().clone();
        // Its tensors are one more block, and have the same rules whether they are run or not.
        config.nextn_predict_layers = usize::from(config.moe.is_some());
        let rules = expected_tensors(&config, true);
        Self {
            widening: widening(model),
            rules: rules.into_iter().map(|t| (t.name, t.rule)).collect(),
            has_output: model.tensor("output.weight").is_some(),
            config,
        }
    }

    /// Whether both were widened in the same way, or not at all: then there is nothing to undo.
    pub fn same_widths(&self, other: &Self) -> bool {
        self.widening == other.widening
    }

    /// What of the tensor the unwidened model has.
    pub fn view(&self, tensor: &StoredTensor) -> View {
        let whole = whole(tensor);
        let Some(rule) = self.rules.get(&tensor.name) else {
            return whole;
        };
        let dims = rule.reshape.unwrap_or(rule.shape).iter();
        let sizes: Vec<usize> = dims
            .map(|dim| dim.size(&self.config, &self.widening.from))
            .collect();
        let (rows, columns) = match sizes.split_last() {
            Some((columns, rest)) if !rest.is_empty() => (rest.iter().product(), *columns),
            _ => (1, sizes.iter().product()),
        };
        let tied_norm = !self.has_output && rule.name == "output_norm.weight";
        let stream = match tied_norm {
            true => Stream::NormOfTiedHead,
            false => rule.stream,
        };
        View {
            rows: rows.min(tensor.rows),
            columns: columns.min(tensor.columns),
            factor: self.widening.factor(stream),
        }
    }
}

/// All of the tensor as it is.
pub fn whole(tensor: &StoredTensor) -> View {
    View {
        rows: tensor.rows,
        columns: tensor.columns,
        factor: 1.0,
    }
}

/// What `nemoconv.widened_from.*` records.
fn widening(model: &StoredModel) -> Widening {
    let to = Widths::of(model.config());
    let from = |field: &str, now: usize| {
        let key = format!("nemoconv.widened_from.{field}");
        match model.metadata().and_then(|metadata| metadata.get(&key)) {
            Some(Value::U32(width)) if (1..=now).contains(&(*width as usize)) => *width as usize,
            _ => now,
        }
    };
    Widening {
        from: Widths {
            hidden: from("hidden_size", to.hidden),
            intermediate: from("intermediate_size", to.intermediate),
            expert_intermediate: from("moe_intermediate_size", to.expert_intermediate),
            shared_intermediate: from(
                "moe_shared_expert_intermediate_size",
                to.shared_intermediate,
            ),
            latent: from("moe_latent_size", to.latent),
        },
        to,
    }
}
