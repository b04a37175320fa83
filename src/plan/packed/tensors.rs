//! Every tensor of the folder, from every tensor of the checkpoint.
//!
//! Enters: headers and schemes. Leaves: [`PackedTensor`]s in checkpoint order. A packed linear takes the place of its
//! weight; scales of FP8 weights go, for what they scale is packed or widened.

use std::collections::HashMap;

use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};

use super::linears::{Kind, Linear};
use super::scheme::LinearScheme;
use super::{Content, PackedTensor, fault};
use crate::error::{Error, Result};
use crate::model::nemotron_h::ValueRule;
use crate::plan::Plan;
use crate::plan::sources::{Fate, Piece};

/// Part of the name of what is added to the scores of experts: vLLM and transformers hold it in F32.
const ROUTER_CORRECTION: &str = ".exp_probs_b";

/// What a checkpoint tensor is to the plan.
struct Use {
    tensor: usize,
    piece: usize,
}

pub fn tensors(
    checkpoint: &Checkpoint,
    plan: &Plan,
    linears: &[Linear],
    schemes: &[Option<LinearScheme>],
    is_rewritten: bool,
) -> Result<Vec<PackedTensor>> {
    let uses = uses(plan);
    let by_place: HashMap<(usize, usize), usize> = linears
        .iter()
        .enumerate()
        .map(|(index, linear)| ((linear.tensor, linear.piece), index))
        .collect();
    let mut tensors = Vec::new();
    for (source, entry) in checkpoint.tensors().iter().enumerate() {
        let used = uses.get(&source).map_or(&[][..], Vec::as_slice);
        let Some(first) = used.first() else {
            if is_carried_over(&plan.fates[source], entry) {
                tensors.push(copied(source, entry));
            }
            continue;
        };
        let linear_of = |used: &Use| by_place.get(&(used.tensor, used.piece)).copied();
        let is_packed = linear_of(first).is_some_and(|linear| schemes[linear].is_some());
        if is_packed {
            for index in used.iter().filter_map(linear_of) {
                let scheme = schemes[index].as_ref();
                tensors.extend(scheme.map_or(Ok(Vec::new()), |scheme| {
                    packed(index, &linears[index], scheme)
                })?);
            }
            continue;
        }
        let is_router = linear_of(first).is_some_and(|index| linears[index].kind == Kind::Router);
        let is_correction = plan.tensors[first.tensor].name.contains(ROUTER_CORRECTION);
        let dtype = match entry.dtype {
            // What transformers makes of it.
            _ if is_correction => Dtype::F32,
            // Its columns carry what the norm before it gave up.
            _ if is_router && is_rewritten => Dtype::F32,
            dtype => dtype,
        };
        // No rewrite changes what the state decays by.
        let is_decay = plan.tensors[first.tensor].rule.value == ValueRule::NegExp;
        let content = match dtype != entry.dtype || is_rewritten && !is_decay {
            true => values(first, used.len(), source),
            false => Content::Copied { source },
        };
        let unpacked = linear_of(first).filter(|_| is_packed_source(plan, first));
        tensors.push(match unpacked {
            Some(index) => PackedTensor {
                name: format!("{}.weight", linears[index].module),
                dtype: Dtype::Bf16,
                shape: vec![linears[index].rows, linears[index].columns],
                content: values(first, used.len(), source),
            },
            None => PackedTensor {
                dtype,
                content,
                ..copied(source, entry)
            },
        });
    }
    Ok(tensors)
}

/// Which planned matrices each checkpoint tensor fills; of a packed linear one tensor stands for all.
fn uses(plan: &Plan) -> HashMap<usize, Vec<Use>> {
    let mut uses: HashMap<usize, Vec<Use>> = HashMap::new();
    for (tensor, planned) in plan.tensors.iter().enumerate() {
        for (piece, part) in planned.pieces.iter().enumerate() {
            let source = match part {
                Piece::Tensor { source, .. } => Some(*source),
                Piece::Packed(linear) => linear.positions().next(),
                Piece::Zeros | Piece::SecondScale(_) => None,
            };
            if let Some(source) = source {
                uses.entry(source).or_default().push(Use { tensor, piece });
            }
        }
    }
    uses
}

/// Whether a tensor that the plan does not read belongs to the folder all the same: a multi-token-prediction head does,
/// scales of weights that are stored otherwise do not.
fn is_carried_over(fate: &Fate, entry: &TensorEntry) -> bool {
    let is_scale = entry.name.ends_with("_scale") || entry.name.ends_with("_scale_inv");
    let is_read = matches!(fate, Fate::Merged { .. });
    !is_read && (entry.name.starts_with("mtp.") || !is_scale)
}

fn is_packed_source(plan: &Plan, used: &Use) -> bool {
    matches!(
        plan.tensors[used.tensor].pieces[used.piece],
        Piece::Packed(_)
    )
}

fn values(used: &Use, matrices: usize, source: usize) -> Content {
    Content::Values {
        tensor: used.tensor,
        piece: (matrices == 1).then_some(used.piece),
        source,
    }
}

fn copied(source: usize, entry: &TensorEntry) -> PackedTensor {
    PackedTensor {
        name: entry.name.clone(),
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        content: Content::Copied { source },
    }
}

fn packed(index: usize, linear: &Linear, scheme: &LinearScheme) -> Result<Vec<PackedTensor>> {
    let specs = scheme.scheme.tensors(linear.rows, linear.columns);
    let specs = specs.map_err(|error| Error::Plan(fault(linear, error.to_string())))?;
    let tensors = specs.into_iter().filter_map(|spec| {
        Some(PackedTensor {
            name: format!("{}.{}", linear.module, spec.suffix),
            dtype: *spec.dtypes.first()?,
            shape: spec.shapes.first()?.clone(),
            content: Content::Packed {
                linear: index,
                role: spec.role,
            },
        })
    });
    Ok(tensors.collect())
}
