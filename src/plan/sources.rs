//! Every tensor of the checkpoint accounted for: written, merged into another, or dropped with a reason.
//!
//! Enters: tensor names, shapes and types of the checkpoint, the architecture's table. Leaves: for each GGUF
//! tensor where its values come from. Reads headers only.

use nemoconv_formats::Dtype;
use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv_formats::packed::PackedLinear;

use super::packing::Packing;
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
    /// It is a part of a GGUF tensor: an expert of a stack, or codes and scales of a packed weight.
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
#[derive(Debug, Clone)]
pub enum Piece {
    /// Rows of a checkpoint tensor, from `first_row` on.
    Tensor {
        /// Index into [`Checkpoint::tensors`].
        source: usize,
        /// First row, not 0 only in a stack of experts.
        first_row: usize,
    },
    /// A packed linear.
    Packed(Box<PackedLinear>),
    /// The scale above the scales of one: a single value.
    SecondScale(Box<PackedLinear>),
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
/// nothing accounts for; two tensors spell the same name; a tied head has weights of its own.
pub fn resolve(
    checkpoint: &Checkpoint,
    config: &NemotronHConfig,
    with_mtp: bool,
) -> Result<Sources> {
    let mut resolver = Resolver::new(checkpoint, config)?;
    resolver.check_tied_head()?;
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
    packing: Packing<'a>,
    fates: Vec<Option<Fate>>,
}

impl<'a> Resolver<'a> {
    fn new(checkpoint: &'a Checkpoint, config: &'a NemotronHConfig) -> Result<Self> {
        let fates = vec![None; checkpoint.tensors().len()];
        Ok(Self {
            checkpoint,
            config,
            widths: Widths::of(config),
            packing: Packing::new(checkpoint)?,
            fates,
        })
    }

    /// Of a head beside a tied embedding some programs take the one, some the other.
    fn check_tied_head(&self) -> Result<()> {
        const HEAD: &str = "lm_head.weight";
        if !self.config.tie_word_embeddings || self.packing.position(HEAD).is_none() {
            return Ok(());
        }
        let what = "`tie_word_embeddings` must be false where the head has weights, found true";
        let fault = Fault::new(what).in_tensor(HEAD);
        Err(Error::Model(
            fault
                .in_file(self.checkpoint.folder().join("config.json"))
                .hint("set it to false if the head is not the embedding, else leave the head's weights out"),
        ))
    }

    fn resolve(&mut self, expected: ExpectedTensor) -> Result<Option<ResolvedTensor>> {
        let stacked = expected
            .stacked_source
            .as_ref()
            .and_then(|name| self.packing.position(name));
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
            if let Some(linear) = self.packing.linear(name, &shape)? {
                self.merge(&linear, &expected.name);
                pieces.push(Piece::Packed(Box::new(linear)));
                continue;
            }
            let Some(source) = self.packing.position(name) else {
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
            pieces.push(Piece::Tensor {
                source,
                first_row: 0,
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
        self.fates[source] = Some(Fate::Written {
            into: expected.name.clone(),
        });
        Ok((0..experts)
            .map(|expert| Piece::Tensor {
                source,
                first_row: expert * rows,
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
        let readable = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        if !readable.contains(&entry.dtype) {
            let what = format!("dtype must be F32, F16 or BF16, found {}", entry.dtype);
            return Err(fault(self.checkpoint, entry, what));
        }
        Ok(())
    }

    /// Every tensor of a packed linear goes into the same one.
    fn merge(&mut self, linear: &PackedLinear, into: &str) {
        for position in linear.positions() {
            self.fates[position] = Some(Fate::Merged { into: into.into() });
        }
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

/// An error about a tensor, with its file and offset.
pub(super) fn fault(checkpoint: &Checkpoint, entry: &TensorEntry, what: String) -> Error {
    let place = Fault::new(what).in_tensor(&entry.name).at(entry.offset);
    Error::Model(place.in_file(checkpoint.shards()[entry.shard].path()))
}
