//! From headers and settings to a complete plan: every tensor's sources, type and place in the output.
//!
//! Enters: a checkpoint's headers, [`Settings`], an importance matrix. Leaves: [`Plan`], from which all output
//! offsets follow, so that writers stream. Reads no weights and runs anywhere.

pub mod allocation;
pub mod file_type;
pub mod mixes;
pub mod packed;
pub mod packing;
pub mod phase;
pub mod recipe;
pub mod sources;
pub mod types;
pub mod widen;

use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::imatrix::Imatrix;
use nemoconv_formats::{Dtype, GgmlType};

use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;
use crate::model::nemotron_h::{Dim, SECOND_SCALE, Stream, TensorRule, ValueRule, Widths};
use mixes::ModelTraits;
use sources::{Fate, Piece, ResolvedTensor};
use types::{Candidate, TypeSettings};
use widen::Widening;

/// What the user decided.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which type goes where.
    pub types: TypeSettings,
    /// Widen exactly to multiples of 256.
    pub widen: bool,
    /// The model will be calibrated: named mixes are those that llama-quantize takes with an importance matrix.
    pub calibrated: bool,
    /// Keep the multi-token-prediction head, if the model has one.
    pub with_mtp: bool,
}

/// One matrix `[rows, columns]`: of a whole tensor, or of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// `out_features`.
    pub rows: usize,
    /// `in_features`: the row length.
    pub columns: usize,
}

/// A tensor of the output.
#[derive(Debug)]
pub struct PlannedTensor {
    /// GGUF name.
    pub name: String,
    /// GGUF dimensions, fastest first.
    pub dims: Vec<u64>,
    /// Stored type.
    pub ty: GgmlType,
    /// The type it should have had, where llama.cpp's substitution was needed and allowed.
    pub instead_of: Option<GgmlType>,
    /// Its row of the architecture's table.
    pub rule: &'static TensorRule,
    /// One matrix, or one per expert.
    pub pieces: Vec<Piece>,
    /// A piece in the checkpoint.
    pub source: Extent,
    /// A piece as stored: never smaller.
    pub stored: Extent,
    /// What every value is multiplied with; not 1 only when the residual stream is widened.
    pub factor: f32,
    /// Rows per attention head, for rules that interleave heads.
    pub head_dim: usize,
    /// Importance of each column, per piece: `[pieces * stored.columns]`.
    pub importance: Option<Vec<f32>>,
}

impl PlannedTensor {
    /// Bytes of one stored row.
    pub fn row_bytes(&self) -> usize {
        self.stored.columns / self.ty.block_elements() * self.ty.block_bytes()
    }

    /// Bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        (self.row_bytes() * self.stored.rows) as u64 * self.pieces.len() as u64
    }

    /// Stored weights, padding included.
    pub fn weights(&self) -> u64 {
        (self.stored.rows * self.stored.columns) as u64 * self.pieces.len() as u64
    }
}

/// How an importance matrix goes with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Tensors that it steers.
    pub steered: usize,
    /// Tensors that one of this model steers: those of the blocks that are run whose type asks for importance.
    pub steerable: usize,
    /// Entries that name no tensor of this model.
    pub foreign: usize,
}

/// A complete conversion, before a weight is read.
#[derive(Debug)]
pub struct Plan {
    /// Sizes of the network.
    pub config: NemotronHConfig,
    /// The named mix, or the one that comes closest.
    pub file_type: file_type::FileType,
    /// Widths before and after.
    pub widening: Widening,
    /// Whether the multi-token-prediction head is in the file.
    pub with_mtp: bool,
    /// Tensors in file order.
    pub tensors: Vec<PlannedTensor>,
    /// What becomes of every source tensor, in checkpoint order.
    pub fates: Vec<Fate>,
    /// What the importance matrix steers, if there is one.
    pub coverage: Option<Coverage>,
}

impl Plan {
    /// Plans a conversion.
    ///
    /// # Errors
    /// The checkpoint does not match its config, a type does not fit, the importance matrix is not of this
    /// model, a widening is impossible.
    pub fn new(
        checkpoint: &Checkpoint,
        config: NemotronHConfig,
        settings: &Settings,
        imatrix: Option<&Imatrix>,
    ) -> Result<Self> {
        let with_mtp = settings.with_mtp && config.nextn_predict_layers > 0;
        let widening = match settings.widen {
            true => Widening::to_super_blocks(&config, with_mtp)?,
            false => Widening::none(&config),
        };
        let resolved = sources::resolve(checkpoint, &config, with_mtp)?;
        let mut tensors: Vec<_> = resolved
            .tensors
            .into_iter()
            .map(|tensor| shape(tensor, &config, &widening))
            .collect();
        balance_tied_head(&mut tensors, &widening);
        choose_types(
            &mut tensors,
            checkpoint,
            &config,
            settings,
            imatrix.is_some() || settings.calibrated,
            with_mtp,
        )?;
        let mut tensors = with_second_scales(tensors, settings)?;
        let coverage = imatrix
            .map(|imatrix| steer(&mut tensors, imatrix, config.pattern.kinds().len()))
            .transpose()?;
        Ok(Self {
            file_type: {
                let weights = tensors.iter().map(|tensor| (tensor.ty, tensor.weights()));
                settings.types.scheme.file_type(weights)
            },
            config,
            widening,
            with_mtp,
            tensors,
            fates: resolved.fates,
            coverage,
        })
    }

    /// Blocks in the file.
    pub fn block_count(&self) -> usize {
        self.config.pattern.kinds().len() + usize::from(self.with_mtp)
    }

    /// Bytes of all tensors, without headers and padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(PlannedTensor::bytes).sum()
    }

    /// What a tensor is stored as; F32 if the plan has none of this name.
    pub fn type_of(&self, name: &str) -> GgmlType {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        tensor.map_or(GgmlType::F32, |tensor| tensor.ty)
    }

    /// Weights of all tensors, padding included.
    pub fn weights(&self) -> u64 {
        self.tensors.iter().map(PlannedTensor::weights).sum()
    }

    /// Real bits per weight of the whole file.
    pub fn bits_per_weight(&self) -> f64 {
        self.tensor_bytes() as f64 * 8.0 / self.weights() as f64
    }
}

/// Lays out one tensor: extents of its pieces before and after widening, GGUF dimensions.
fn shape(tensor: ResolvedTensor, config: &NemotronHConfig, widening: &Widening) -> PlannedTensor {
    let ResolvedTensor { expected, pieces } = tensor;
    let rule = expected.rule;
    let sizes = |dims: &[Dim], widths: &Widths| -> Vec<usize> {
        dims.iter().map(|dim| dim.size(config, widths)).collect()
    };
    let stored_shape = sizes(rule.reshape.unwrap_or(rule.shape), &widening.to);
    let mut dims: Vec<u64> = stored_shape.iter().rev().map(|&size| size as u64).collect();
    if rule.is_stacked() {
        dims.push(pieces.len() as u64);
    }
    PlannedTensor {
        name: expected.name,
        dims,
        ty: GgmlType::F32,
        instead_of: None,
        rule,
        pieces,
        source: extent(rule, &sizes(rule.shape, &widening.from)),
        stored: extent(rule, &sizes(rule.shape, &widening.to)),
        factor: widening.factor(rule.stream),
        head_dim: config.head_dim,
        importance: None,
    }
}

/// A head tied to the embedding reads rows that carry a writer's factor; the norm before it takes that back.
fn balance_tied_head(tensors: &mut [PlannedTensor], widening: &Widening) {
    if tensors.iter().any(|tensor| tensor.name == "output.weight") {
        return;
    }
    if let Some(norm) = tensors
        .iter_mut()
        .find(|tensor| tensor.name == "output_norm.weight")
    {
        norm.factor = widening.factor(Stream::NormOfTiedHead);
    }
}

/// A shape as rows and columns. A vector is one row, unless its elements are permuted like rows.
fn extent(rule: &TensorRule, shape: &[usize]) -> Extent {
    match *shape {
        [n] if rule.value == ValueRule::InterleaveQueryHeads
            || rule.value == ValueRule::InterleaveKeyHeads =>
        {
            Extent {
                rows: n,
                columns: 1,
            }
        }
        [n] => Extent {
            rows: 1,
            columns: n,
        },
        [rows, ref rest @ ..] => Extent {
            rows,
            columns: rest.iter().product(),
        },
        [] => Extent {
            rows: 1,
            columns: 1,
        },
    }
}

fn choose_types(
    tensors: &mut [PlannedTensor],
    checkpoint: &Checkpoint,
    config: &NemotronHConfig,
    settings: &Settings,
    has_imatrix: bool,
    with_mtp: bool,
) -> Result<()> {
    let first_is_attention = config.pattern.kinds()[0] == BlockKind::Attention;
    let traits = ModelTraits {
        block_count: config.pattern.kinds().len() + usize::from(with_mtp),
        expert_count: config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts),
        gqa_of_block_0: if first_is_attention {
            config.num_attention_heads / config.num_key_value_heads
        } else {
            0
        },
        has_output: tensors.iter().any(|tensor| tensor.name == "output.weight"),
        has_imatrix,
    };
    let dtype = |piece: &Piece| match piece {
        Piece::Tensor { source, .. } => checkpoint.tensors()[*source].dtype,
        _ => Dtype::F32,
    };
    // Experts of several types: F32 holds them all.
    let source_type = |tensor: &PlannedTensor| {
        let mut types = tensor.pieces.iter().map(dtype);
        let first = types.next().unwrap_or(Dtype::F32);
        match types.all(|other| other == first) {
            true => first,
            false => Dtype::F32,
        }
    };
    let candidates: Vec<_> = tensors
        .iter()
        .map(|tensor| Candidate {
            name: &tensor.name,
            dims: &tensor.dims,
            storage: tensor.rule.storage,
            source: source_type(tensor),
        })
        .collect();
    let choices = types::choose(&candidates, &settings.types, traits)?;
    for (tensor, choice) in tensors.iter_mut().zip(choices) {
        tensor.ty = choice.ty;
        tensor.instead_of = choice.instead_of;
    }
    Ok(())
}

/// Puts behind each NVFP4 tensor the scale above its scales. Blocks of NVFP4 are taken over, never made.
fn with_second_scales(
    tensors: Vec<PlannedTensor>,
    settings: &Settings,
) -> Result<Vec<PlannedTensor>> {
    let mut all = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if tensor.ty != GgmlType::NVFP4 {
            all.push(tensor);
            continue;
        }
        let stem = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let has_scale = stem != "token_embd" && !stem.contains("latent");
        if settings.calibrated || !has_scale || !packing::keeps_codes(&tensor) {
            let what = "cannot be stored as NVFP4, which is only taken over as it is";
            return Err(Error::Plan(Fault::new(what).in_tensor(&tensor.name).hint(
                "the source must hold it as NVFP4; not for the embedding, latent projections, widened or calibrated models",
            )));
        }
        let one = Extent {
            rows: 1,
            columns: 1,
        };
        let pieces = tensor.pieces.iter().map(|piece| match piece {
            Piece::Packed(linear) => Piece::SecondScale(linear.clone()),
            other => other.clone(),
        });
        let scale = PlannedTensor {
            name: format!("{stem}.{}", SECOND_SCALE.name),
            dims: vec![tensor.pieces.len() as u64],
            ty: GgmlType::F32,
            instead_of: None,
            rule: &SECOND_SCALE,
            pieces: pieces.collect(),
            source: one,
            stored: one,
            factor: 1.0,
            head_dim: tensor.head_dim,
            importance: None,
        };
        all.extend([tensor, scale]);
    }
    Ok(all)
}

/// Types whose search ignores importance.
fn ignores_importance(ty: GgmlType) -> bool {
    use GgmlType as T;
    matches!(
        ty,
        T::F32 | T::F16 | T::BF16 | T::Q8_0 | T::MXFP4 | T::NVFP4 | T::TQ1_0 | T::TQ2_0
    )
}

/// Hands each tensor its importance, padded where columns were. The network that is run has `blocks`.
fn steer(tensors: &mut [PlannedTensor], imatrix: &Imatrix, blocks: usize) -> Result<Coverage> {
    check_origin(tensors, imatrix)?;
    let named = tensors
        .iter()
        .filter(|t| imatrix.importance(&t.name).is_some());
    let foreign = imatrix.entries().len() - named.count();
    let mut coverage = Coverage {
        steered: 0,
        steerable: 0,
        foreign,
    };
    for tensor in tensors
        .iter_mut()
        .filter(|tensor| !ignores_importance(tensor.ty))
    {
        let importance = imatrix.importance(&tensor.name);
        let is_usual = is_usually_collected(&tensor.name, blocks);
        coverage.steerable += usize::from(is_usual || importance.is_some());
        coverage.steered += usize::from(importance.is_some());
        let (columns, stored) = (tensor.source.columns, tensor.stored.columns);
        tensor.importance = importance.map(|importance| pad(importance, columns, stored));
    }
    Ok(coverage)
}

/// llama-imatrix leaves embedding and head out unless it is asked for them, and runs no multi-token-prediction head.
fn is_usually_collected(tensor: &str, blocks: usize) -> bool {
    packed::linears::layer_of(tensor).is_some_and(|block| block < blocks)
}

/// The matrix names tensors of this model, and those in its shape.
fn check_origin(tensors: &[PlannedTensor], imatrix: &Imatrix) -> Result<()> {
    const HINT: &str = "it was collected on another model";
    let mut names_any = false;
    for tensor in tensors {
        let Some(importance) = imatrix.importance(&tensor.name) else {
            continue;
        };
        names_any = true;
        let expected = tensor.source.columns * tensor.pieces.len();
        if importance.len() != expected {
            let what = format!(
                "importance matrix has {} columns, expected {expected}",
                importance.len()
            );
            let fault = Fault::new(what).in_tensor(&tensor.name);
            return Err(Error::Plan(fault.hint(HINT)));
        }
    }
    if names_any {
        return Ok(());
    }
    let fault = Fault::new("the importance matrix names no tensor of this model");
    Err(Error::Plan(fault.hint(HINT)))
}

/// Appends zeros to each row of `columns` values.
fn pad(values: &[f32], columns: usize, stored_columns: usize) -> Vec<f32> {
    let mut padded = vec![0.0; values.len() / columns * stored_columns];
    for (row, to) in values
        .chunks(columns)
        .zip(padded.chunks_mut(stored_columns))
    {
        to[..columns].copy_from_slice(row);
    }
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_importance_matrix_usually_covers() {
        let check = |name, expected| assert_eq!(is_usually_collected(name, 5), expected, "{name}");
        check("blk.4.ffn_up.weight", true);
        // The multi-token-prediction head.
        check("blk.5.ffn_up.weight", false);
        check("token_embd.weight", false);
        check("output.weight", false);
    }
}
