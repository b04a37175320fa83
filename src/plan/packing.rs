//! Which matrices of a checkpoint are stored packed: as codes with scales, or as FP8.
//!
//! Enters: tensor names and types, `quantization_config`. Leaves: for a matrix of the architecture the packed linear that
//! holds it, if one does. Reads headers, and of the weights nothing but their stated shapes and column orders.

use std::collections::HashMap;

use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv_formats::packed::{Group, Inputs, Layout, PackedLinear, Quantization, Scheme};
use nemoconv_formats::{Dtype, GgmlType};

use super::PlannedTensor;
use super::sources::{Piece, fault};
use crate::error::{Error, Result};
use crate::model::nemotron_h::canonical_name;

/// What only a packed linear has beside its module's name, codes first.
const PARTS: [&str; 9] = [
    "weight_packed",
    "qweight",
    "weight_scale",
    "weight_scale_inv",
    "scales",
    "qzeros",
    "weight_zero_point",
    "weight_shape",
    "g_idx",
];

/// Names of FP8 scales.
const FLOAT8_SCALES: [&str; 2] = ["weight_scale", "weight_scale_inv"];

/// A checkpoint's tensors by canonical name, and its configuration.
#[derive(Debug)]
pub struct Packing<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<Quantization>,
    by_name: HashMap<String, usize>,
}

impl<'a> Packing<'a> {
    /// Reads the configuration.
    ///
    /// # Errors
    /// A configuration that is not understood; two tensors that spell the same name.
    pub fn new(checkpoint: &'a Checkpoint) -> Result<Self> {
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
        Ok(Self {
            checkpoint,
            quantization: Quantization::of(checkpoint)?,
            by_name,
        })
    }

    /// The configuration, if there is one.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }

    /// Position in [`Checkpoint::tensors`] of a canonical name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The packed linear that holds the matrix of a canonical name such as `layers.0.mixer.in_proj.weight`; `None` if it is
    /// stored plain, or not at all.
    ///
    /// # Errors
    /// It is stored twice, incompletely, in another size, or in a way that the configuration does not explain.
    pub fn linear(&self, name: &str, shape: &[usize]) -> Result<Option<PackedLinear>> {
        let (Some(module), &[rows, columns]) = (name.strip_suffix(".weight"), shape) else {
            return Ok(None);
        };
        let weight = self.entry(name);
        let part = PARTS
            .iter()
            .find_map(|part| self.entry(&format!("{module}.{part}")));
        let codes = match (weight, part) {
            (Some(weight), _) if is_code(weight.dtype) => weight,
            (Some(weight), Some(part)) => {
                let what = format!(
                    "belongs to a packed linear, but `{}` is stored plain as {}",
                    weight.name, weight.dtype
                );
                return Err(fault(self.checkpoint, part, what));
            }
            (Some(_), None) | (None, None) => return Ok(None),
            (None, Some(part)) => part,
        };
        let module = codes.name.rsplit_once('.').map_or("", |(module, _)| module);
        let scheme = self.scheme(module, codes)?;
        let linear = PackedLinear::resolve(self.checkpoint, module, &scheme, rows, columns)?;
        Ok(Some(linear))
    }

    fn entry(&self, name: &str) -> Option<&'a TensorEntry> {
        Some(&self.checkpoint.tensors()[self.position(name)?])
    }

    /// What the configuration says of a packed module; FP8 weights say it themselves.
    fn scheme(&self, module: &str, codes: &TensorEntry) -> Result<Scheme> {
        let quantization = self.quantization.as_ref();
        let declared = quantization.and_then(|quantization| quantization.scheme_of(module));
        let is_float8 =
            declared.is_none_or(|scheme| matches!(scheme.layout, Layout::Float8 { .. }));
        if codes.dtype == Dtype::F8E4M3 && is_float8 {
            let is_there = |name: &&&str| {
                let name = format!("{module}.{name}");
                self.checkpoint.tensor(&name).is_some()
            };
            let Some(scale) = FLOAT8_SCALES.iter().find(is_there) else {
                let what = "is F8_E4M3 without a `weight_scale` or `weight_scale_inv` beside it";
                return Err(fault(self.checkpoint, codes, what.into()));
            };
            let inputs = declared.map_or(Inputs::AsTheyAre, |scheme| scheme.inputs.clone());
            return Ok(Scheme::float8(scale, inputs));
        }
        declared.cloned().ok_or_else(|| {
            let what = match quantization {
                Some(_) => "is packed, but the configuration does not quantize its module",
                None => "is packed, but config.json has no `quantization_config`",
            };
            match fault(self.checkpoint, codes, what.into()) {
                Error::Model(fault) => Error::Model(fault.hint(
                    "the config.json beside the weights must be the one that was written with them",
                )),
                other => other,
            }
        })
    }
}

/// Whether the blocks of the tensor's type hold the codes of every piece: Q4_0 those of 4 bits without zero points, Q8_0
/// all others but 8-bit ones with zero points, if a group of codes is whole blocks; NVFP4 its own.
pub fn keeps_codes(tensor: &PlannedTensor) -> bool {
    let same_place = tensor.source == tensor.stored && tensor.factor == 1.0;
    let holds = |piece: &Piece| match piece {
        Piece::Packed(linear) => holds_codes(tensor.ty, linear),
        Piece::Tensor { .. } | Piece::SecondScale(_) | Piece::Zeros => false,
    };
    same_place && tensor.pieces.iter().all(holds)
}

fn holds_codes(ty: GgmlType, linear: &PackedLinear) -> bool {
    let layout = linear.scheme().layout;
    let whole_blocks = match layout.group() {
        Some(Group::Columns(size)) => size.is_multiple_of(GgmlType::Q8_0.block_elements()),
        Some(Group::Row | Group::Tensor) => linear
            .columns()
            .is_multiple_of(GgmlType::Q8_0.block_elements()),
        None => false,
    };
    if let (GgmlType::NVFP4, Layout::Nvfp4(_)) = (ty, layout) {
        return linear
            .columns()
            .is_multiple_of(GgmlType::NVFP4.block_elements());
    }
    let is_integer = !matches!(layout, Layout::Float8 { .. } | Layout::Nvfp4(_));
    let fits = match ty {
        GgmlType::Q4_0 => layout.bits() <= 4 && layout.is_symmetric(),
        GgmlType::Q8_0 => layout.bits() <= 4 || layout.is_symmetric(),
        _ => false,
    };
    whole_blocks && is_integer && fits
}

/// Types that hold codes where a plain weight would be.
fn is_code(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8E4M3 | Dtype::I8 | Dtype::U8)
}
