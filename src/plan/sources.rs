//! Every tensor of the checkpoint accounted for: written, merged into another, or dropped with a reason.
//!
//! Enters: tensor names, shapes and types of the checkpoint, the architecture's table. Leaves: for each GGUF
//! tensor where its values come from. Reads headers only.

use std::collections::HashMap;

use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};

use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{
    ExpectedTensor, Presence, Widths, canonical_name, expected_tensors,
};

/// What became of one source tensor.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "fate")]
pub enum Fate {
    /// It is a GGUF tensor of its own.
    Written {
        /// Its GGUF name.
        into: String,
    },
    /// It is a part of a GGUF tensor: an expert of a stack, or the scale of a weight.
    Merged {
        /// The GGUF name.
        into: String,
    },
    /// It is not needed.
    Dropped {
        /// Why.
        reason: &'static str,
    },
}

/// Where one matrix of a GGUF tensor comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Rows of a checkpoint tensor, from `first_row` on.
    Tensor {
        /// Index into [`Checkpoint::tensors`].
        source: usize,
        /// First row, not 0 only in a stack of experts.
        first_row: usize,
        /// Index of the FP8 scale.
        scale: Option<usize>,
    },
    /// The checkpoint has none and the runtime wants zeros.
    Zeros,
}

/// A tensor of the architecture with the checkpoint tensors that fill it.
#[derive(Debug)]
pub struct ResolvedTensor {
    /// Its table row and names.
    pub expected: ExpectedTensor,
    /// One piece, or one per expert.
    pub pieces: Vec<Piece>,
}

/// All tensors that can be written, and the fate of every source tensor, in checkpoint order.
#[derive(Debug)]
pub struct Sources {
    /// In writing order.
    pub tensors: Vec<ResolvedTensor>,
    /// Parallel to [`Checkpoint::tensors`].
    pub fates: Vec<Fate>,
}

/// Matches the checkpoint against the architecture.
///
/// # Errors
/// A required tensor is missing; a shape or type is not what the config implies; a tensor is left over that
/// nothing accounts for; two tensors spell the same name.
pub fn resolve(
    checkpoint: &Checkpoint,
    config: &NemotronHConfig,
    with_mtp: bool,
) -> Result<Sources> {
    let mut resolver = Resolver::new(checkpoint, config)?;
    let mut tensors = Vec::new();
    for expected in expected_tensors(config, with_mtp) {
        tensors.extend(resolver.resolve(expected)?);
    }
    let fates = resolver.finish(with_mtp)?;
    Ok(Sources { tensors, fates })
}

struct Resolver<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a NemotronHConfig,
    widths: Widths,
    by_name: HashMap<String, usize>,
    fates: Vec<Option<Fate>>,
}

impl<'a> Resolver<'a> {
    fn new(checkpoint: &'a Checkpoint, config: &'a NemotronHConfig) -> Result<Self> {
        let mut by_name = HashMap::new();
        for (index, entry) in checkpoint.tensors().iter().enumerate() {
            if let Some(other) = by_name.insert(canonical_name(&entry.name), index) {
                let other = &checkpoint.tensors()[other];
                return Err(fault(
                    checkpoint,
                    entry,
                    format!("is the same tensor as `{}`", other.name),
                ));
            }
        }
        let fates = vec![None; checkpoint.tensors().len()];
        Ok(Self {
            checkpoint,
            config,
            widths: Widths::of(config),
            by_name,
            fates,
        })
    }

    fn resolve(&mut self, expected: ExpectedTensor) -> Result<Option<ResolvedTensor>> {
        let stacked = expected
            .stacked_source
            .as_ref()
            .and_then(|name| self.by_name.get(name).copied());
        let pieces = match stacked {
            Some(source) => self.stacked_pieces(&expected, source)?,
            None => self.single_pieces(&expected)?,
        };
        Ok((!pieces.is_empty()).then_some(ResolvedTensor { expected, pieces }))
    }

    fn single_pieces(&mut self, expected: &ExpectedTensor) -> Result<Vec<Piece>> {
        let shape = self.shape(expected);
        let is_stack = expected.rule.is_stacked();
        let mut pieces = Vec::with_capacity(expected.sources.len());
        for name in &expected.sources {
            let Some(&source) = self.by_name.get(name) else {
                match expected.rule.presence {
                    Presence::Required => return Err(self.missing(name)),
                    Presence::Optional => return Ok(Vec::new()),
                    Presence::ZerosIfMissing => return Ok(vec![Piece::Zeros]),
                }
            };
            self.check_shape(source, &shape)?;
            let into = expected.name.clone();
            self.fates[source] = Some(if is_stack {
                Fate::Merged { into }
            } else {
                Fate::Written { into }
            });
            let scale = self.scale_of(source, name, &expected.name)?;
            pieces.push(Piece::Tensor {
                source,
                first_row: 0,
                scale,
            });
        }
        Ok(pieces)
    }

    /// All experts in one 3-D tensor `[experts, out_features, in_features]`.
    fn stacked_pieces(&mut self, expected: &ExpectedTensor, source: usize) -> Result<Vec<Piece>> {
        let experts = expected.sources.len();
        let shape = self.shape(expected);
        let rows = shape[0];
        let stack: Vec<usize> = std::iter::once(experts).chain(shape).collect();
        self.check_shape(source, &stack)?;
        let entry = &self.checkpoint.tensors()[source];
        if entry.dtype == Dtype::F8E4M3 {
            return Err(fault(
                self.checkpoint,
                entry,
                "FP8 stacks of experts are not known".into(),
            ));
        }
        self.fates[source] = Some(Fate::Written {
            into: expected.name.clone(),
        });
        Ok((0..experts)
            .map(|expert| Piece::Tensor {
                source,
                first_row: expert * rows,
                scale: None,
            })
            .collect())
    }

    fn shape(&self, expected: &ExpectedTensor) -> Vec<usize> {
        expected
            .rule
            .shape
            .iter()
            .map(|dim| dim.size(self.config, &self.widths))
            .collect()
    }

    fn check_shape(&self, source: usize, expected: &[usize]) -> Result<()> {
        let entry = &self.checkpoint.tensors()[source];
        if entry.shape != expected {
            let what = format!(
                "shape must be {expected:?} by config.json, found {:?}",
                entry.shape
            );
            return Err(fault(self.checkpoint, entry, what));
        }
        let readable = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8E4M3];
        if !readable.contains(&entry.dtype) {
            let what = format!(
                "dtype must be F32, F16, BF16 or F8_E4M3, found {}",
                entry.dtype
            );
            return Err(fault(self.checkpoint, entry, what));
        }
        Ok(())
    }

    /// The scale beside an FP8 weight: one value, one per row, or one per block of rows and columns.
    fn scale_of(&mut self, source: usize, name: &str, into: &str) -> Result<Option<usize>> {
        let entry = &self.checkpoint.tensors()[source];
        if entry.dtype != Dtype::F8E4M3 {
            return Ok(None);
        }
        let candidates = ["_scale", "_scale_inv"].map(|suffix| format!("{name}{suffix}"));
        let Some(scale) = candidates
            .iter()
            .find_map(|name| self.by_name.get(name).copied())
        else {
            let what = "is F8_E4M3 without a `weight_scale` or `weight_scale_inv` beside it".into();
            return Err(fault(self.checkpoint, entry, what));
        };
        let scale_entry = &self.checkpoint.tensors()[scale];
        super::fp8::Grid::new(&entry.shape, &scale_entry.shape)
            .filter(|_| matches!(scale_entry.dtype, Dtype::F32 | Dtype::Bf16 | Dtype::F16))
            .ok_or_else(|| {
                let what = format!(
                    "scale of shape {:?} and dtype {} does not fit a weight of shape {:?}",
                    scale_entry.shape, scale_entry.dtype, entry.shape
                );
                fault(self.checkpoint, scale_entry, what)
            })?;
        self.fates[scale] = Some(Fate::Merged {
            into: into.to_string(),
        });
        Ok(Some(scale))
    }

    fn missing(&self, name: &str) -> Error {
        let what = format!("the checkpoint has no tensor `{name}`, which config.json implies");
        Error::Model(
            Fault::new(what)
                .in_file(self.checkpoint.folder())
                .hint("the download may be incomplete; check the shards against the index"),
        )
    }

    /// Gives the leftovers a reason, or refuses them.
    fn finish(self, with_mtp: bool) -> Result<Vec<Fate>> {
        let entries = self.checkpoint.tensors();
        let fates = self
            .fates
            .into_iter()
            .zip(entries)
            .map(|(fate, entry)| match fate {
                Some(fate) => Ok(fate),
                None => drop_reason(&canonical_name(&entry.name), self.config, with_mtp)
                    .map(|reason| Fate::Dropped { reason })
                    .ok_or_else(|| unknown(self.checkpoint, entry)),
            });
        fates.collect()
    }
}

/// Why a tensor that the artifact has no place for may be left out; `None` if it may not.
fn drop_reason(name: &str, config: &NemotronHConfig, with_mtp: bool) -> Option<&'static str> {
    let activation_scales = ["input_scale", "activation_scale", "k_scale", "v_scale"];
    if name.starts_with("mtp.") && config.nextn_predict_layers == 0 {
        return Some("multi-token-prediction head that config.json does not announce");
    }
    if name.starts_with("mtp.") && !with_mtp {
        return Some("multi-token-prediction head, dropped on request");
    }
    if activation_scales
        .iter()
        .any(|suffix| name.ends_with(suffix))
    {
        return Some(
            "activation scale of another runtime; GGUF runtimes scale activations themselves",
        );
    }
    name.ends_with("rotary_emb.inv_freq")
        .then_some("position table; this architecture has no positions")
}

fn unknown(checkpoint: &Checkpoint, entry: &TensorEntry) -> Error {
    let fault = Fault::new("nothing in the architecture accounts for this tensor")
        .in_tensor(&entry.name)
        .in_file(checkpoint.shards()[entry.shard].path())
        .at(entry.offset)
        .hint("llama.cpp refuses files with tensors it does not know; remove it from the checkpoint if it is not needed");
    Error::Model(fault)
}

fn fault(checkpoint: &Checkpoint, entry: &TensorEntry, what: String) -> Error {
    let place = Fault::new(what).in_tensor(&entry.name).at(entry.offset);
    Error::Model(place.in_file(checkpoint.shards()[entry.shard].path()))
}
