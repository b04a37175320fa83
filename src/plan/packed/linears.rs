//! Which tensors of the network are linears, under the names that checkpoints give their modules.
//!
//! Enters: a plan and its checkpoint. Leaves: [`Linear`]s in the order of the network.

use nemoconv_formats::checkpoint::Checkpoint;

use crate::plan::sources::Piece;
use crate::plan::{Plan, PlannedTensor};

/// What a linear is to its neighbours: readers want some of them alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// In a Mamba-2 mixer.
    Mamba,
    /// q, k or v: one matrix in vLLM.
    QueryKeyValue,
    /// The output of attention.
    AttentionOutput,
    /// An MLP, or the shared expert of a MoE.
    Mlp,
    /// A routed expert.
    Expert,
    /// Into or out of the latent space of a MoE.
    Latent,
    /// `lm_head`.
    Head,
    /// The router of a MoE: never quantized.
    Router,
}

/// A matrix of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linear {
    /// Name of its module in the checkpoint: what precedes `.weight`.
    pub module: String,
    /// What it is.
    pub kind: Kind,
    /// Its block; `None` for the head.
    pub layer: Option<usize>,
    /// Index into [`Plan::tensors`].
    pub tensor: usize,
    /// Which matrix of that tensor.
    pub piece: usize,
    /// `out_features`.
    pub rows: usize,
    /// `in_features`.
    pub columns: usize,
}

impl Linear {
    /// The module's name within its layer, experts without their number: `mixer.experts.up_proj`.
    pub fn stem(&self) -> String {
        let inside = match self.layer {
            Some(layer) => {
                let marker = format!("layers.{layer}.");
                let at = self.module.find(&marker).map(|at| at + marker.len());
                &self.module[at.unwrap_or(0)..]
            }
            None => &self.module,
        };
        match self.kind {
            Kind::Expert => inside.replace(&format!(".{}.", self.piece), "."),
            _ => inside.to_string(),
        }
    }
}

/// All linears, block after block, the head last.
pub fn linears(checkpoint: &Checkpoint, plan: &Plan) -> Vec<Linear> {
    let mut linears = Vec::new();
    for (index, tensor) in plan.tensors.iter().enumerate() {
        let Some(kind) = kind_of(&tensor.name) else {
            continue;
        };
        let layer = layer_of(&tensor.name);
        for (piece, module) in modules(checkpoint, tensor, layer).into_iter().enumerate() {
            linears.push(Linear {
                module,
                kind,
                layer,
                tensor: index,
                piece,
                rows: tensor.stored.rows,
                columns: tensor.stored.columns,
            });
        }
    }
    linears.sort_by_key(|linear| linear.layer.unwrap_or(usize::MAX));
    linears
}

/// Index of the block of a GGUF name.
pub fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

fn kind_of(name: &str) -> Option<Kind> {
    let stem = match name.strip_prefix("blk.") {
        Some(rest) => rest.split_once('.')?.1,
        None => name,
    };
    Some(match stem.strip_suffix(".weight")? {
        "ssm_in" | "ssm_out" => Kind::Mamba,
        "attn_q" | "attn_k" | "attn_v" => Kind::QueryKeyValue,
        "attn_output" => Kind::AttentionOutput,
        "ffn_up" | "ffn_down" | "ffn_up_shexp" | "ffn_down_shexp" => Kind::Mlp,
        "ffn_up_exps" | "ffn_down_exps" => Kind::Expert,
        "ffn_latent_down" | "ffn_latent_up" => Kind::Latent,
        "ffn_gate_inp" => Kind::Router,
        "output" => Kind::Head,
        _ => return None,
    })
}

/// The module of every matrix. Experts that lie in one tensor get the names they have apart.
fn modules(checkpoint: &Checkpoint, tensor: &PlannedTensor, layer: Option<usize>) -> Vec<String> {
    let name = |(piece, part): (usize, &Piece)| {
        let entry = match part {
            Piece::Tensor { source, .. } => &checkpoint.tensors()[*source],
            Piece::Packed(linear) => return Some(linear.module().to_string()),
            Piece::Zeros | Piece::SecondScale(_) => return None,
        };
        let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
        let is_stack = tensor.pieces.len() > 1 && entry.shape.len() == 3;
        let layer = layer.filter(|_| is_stack);
        Some(match layer.zip(module.rsplit_once('.')) {
            Some((_, (experts, projection))) => format!("{experts}.{piece}.{projection}"),
            None => module.to_string(),
        })
    };
    tensor.pieces.iter().enumerate().filter_map(name).collect()
}
