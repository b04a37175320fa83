//! The weights level: every stored weight as a number, and against those it was made from.
//!
//! Enters: an artifact, and a reference in either container. Leaves: findings and the error of each tensor. Memory
//! holds a tile per thread, whatever the size of the model; of a reference that has to be rewritten one tensor as f32.

mod block_facts;
mod expectation;
mod judge;
mod order;
mod statistics;
mod undo;

use std::sync::Mutex;

use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;
use nemoconv_formats::checkpoint::Checkpoint;

use super::Found;
use super::container::layer_of;
use super::rewritten::{Recorded, of_same_widths, recorded};
use crate::artifact::{StoredModel, StoredTensor};
use crate::error::Result;
use crate::parallel;
use crate::report::{Finding, Rule, TensorError};
use crate::rewrite::{Mixer, Rewrites, Rewritten};
use block_facts::BlockFacts;
use expectation::{Expectation, Rounding};
use nemoconv_formats::gguf::{Metadata, Value};
use statistics::{At, Measure, Statistics};
use undo::{View, Views, whole};

/// Weights of a tile: 1 MiB as f32 on each side.
const TILE_WEIGHTS: usize = 1 << 18;

/// Tiles whose figures wait to be added in order.
const TILES_AT_ONCE: usize = 256;

/// What the level has to say.
#[derive(Debug, Default)]
pub struct Weights {
    /// Findings.
    pub found: Found,
    /// The error of each tensor, in file order; empty without a reference.
    pub tensors: Vec<TensorError>,
}

/// Compares every tensor with the reference, under the rewrites that the artifact records, or looks at the stored values
/// alone. The reference's rows and columns are mixed by `mixer`, if there is one. Runs in rayon's current pool.
///
/// # Errors
/// A file cannot be read, the machine that mixes fails.
pub fn inspect(
    artifact: &StoredModel,
    reference: Option<&StoredModel>,
    mixer: Option<&dyn Mixer>,
) -> Result<Weights> {
    let recorded = reference.map_or(Recorded::None, |_| recorded(artifact));
    let (rewrites, reference) = match recorded {
        Recorded::None => (None, reference),
        Recorded::Rewrites(rewrites) => (Some(*rewrites), reference),
        Recorded::Unknown(why) => {
            let mut weights = compare(artifact, None, None, None)?;
            weights.found.push(Finding::new(Rule::RewritesMissing, why));
            return Ok(weights);
        }
    };
    let widened = match (&rewrites, reference) {
        (Some(_), Some(reference)) => of_same_widths(artifact, reference)?,
        _ => None,
    };
    let reference = widened.as_ref().or(reference);
    if let (Some(rewrites), Some(reference)) = (&rewrites, reference)
        && let Err(error) = rewrites.check(reference.config())
    {
        let mut weights = Weights::default();
        let finding = Finding::new(Rule::DifferentModels, error.to_string());
        weights.found.push(finding);
        return Ok(weights);
    }
    compare(artifact, reference, rewrites.as_ref(), mixer)
}

/// The same with the rewrites known that the reference has to undergo.
fn compare(
    artifact: &StoredModel,
    reference: Option<&StoredModel>,
    rewrites: Option<&Rewrites>,
    mixer: Option<&dyn Mixer>,
) -> Result<Weights> {
    let mut weights = Weights::default();
    let pairing = reference.map(|reference| Pairing::new(artifact, reference, rewrites));
    if let Some(finding) = pairing.as_ref().and_then(Pairing::of_other_sizes) {
        weights.found.push(finding);
        return Ok(weights);
    }
    let rounding = rounding_of(artifact);
    let mut judge = judge::Judge::new(artifact, pairing.as_ref(), absorbs_biases(artifact));
    for tensor in artifact.tensors().iter().filter(|t| t.weights() > 0) {
        let expected = match artifact.scheme(tensor) {
            Some(scheme) => Some(expectation::packed(scheme, tensor.columns, rounding)),
            None => expectation::of(tensor.ty, rounding),
        };
        let Some(expectation) = expected else {
            let message = format!("{} cannot be decoded here", tensor.ty);
            let mut finding = Finding::new(Rule::NotComparable, message).in_tensor(&tensor.name);
            finding.place.layer = layer_of(&tensor.name);
            weights.found.push(finding);
            continue;
        };
        let rewritten = match &pairing {
            Some(pairing) => pairing.rewritten(tensor, mixer)?,
            None => None,
        };
        let pair = pairing.as_ref();
        let pair = pair.and_then(|pairing| pairing.pair(tensor, rewritten.as_ref()));
        let measure = Measure {
            expectation: match &pair {
                Some(pair) => expectation.against(&pair.expectation),
                None => expectation,
            },
            lossless: pair.is_some_and(|pair| pair.is_lossless(tensor)),
        };
        let job = Job {
            artifact,
            tensor,
            pair,
            measure,
        };
        let statistics = job.statistics()?;
        if let Some(pair) = pair {
            weights.tensors.push(tensor_error(
                artifact.stored_as(tensor),
                tensor,
                &measure,
                &statistics,
            ));
            judge.compared(tensor, &pair, &measure, &statistics, &mut weights.found)?;
        } else {
            judge.alone(tensor, &measure, &statistics, &mut weights.found);
        }
    }
    judge.finish(&mut weights.found);
    weights.found.looked_at("tensors", artifact.tensors().len());
    Ok(weights)
}

/// How the artifact was rounded: as llama-quantize and the converter record an importance matrix, as a calibrated
/// conversion records itself. Of a packed folder the receipt says so; without one it may have been rounded in any way.
fn rounding_of(model: &StoredModel) -> Rounding {
    if let Some(checkpoint) = model.checkpoint() {
        return rounding_of_folder(checkpoint);
    }
    let Some(keys) = model.metadata() else {
        return Rounding::Nearest;
    };
    let calibrated = settings_of(keys);
    let method = calibrated
        .as_ref()
        .and_then(|rounding| rounding["method"].as_str());
    match method {
        Some("gptq") => Rounding::FedBack,
        Some("imatrix") => Rounding::Steered,
        _ if keys
            .iter()
            .any(|(key, _)| key.starts_with("quantize.imatrix.")) =>
        {
            Rounding::Steered
        }
        _ => Rounding::Nearest,
    }
}

/// How a calibrated conversion was told to round.
fn settings_of(keys: &Metadata) -> Option<serde_json::Value> {
    match keys.get("nemoconv.rounding") {
        Some(Value::String(settings)) => serde_json::from_str(settings).ok(),
        _ => None,
    }
}

/// Whether the artifact records that biases took back what rounding lost: a GGUF file in its keys, a folder in its receipt.
fn absorbs_biases(model: &StoredModel) -> bool {
    let settings = match model.checkpoint() {
        Some(checkpoint) => {
            let receipt = checkpoint.read_json("receipt.json").ok().flatten();
            receipt.map(|receipt| receipt["calibration"]["rounding"].clone())
        }
        None => model.metadata().and_then(settings_of),
    };
    settings.is_some_and(|settings| settings["bias_absorption"] == true)
}

/// The `method` of the folder's `receipt.json`.
fn rounding_of_folder(checkpoint: &Checkpoint) -> Rounding {
    let receipt = checkpoint.read_json("receipt.json").ok().flatten();
    let method = receipt
        .as_ref()
        .and_then(|receipt| receipt["method"].as_str());
    match method {
        Some("rtn") => Rounding::Nearest,
        Some("imatrix") => Rounding::Steered,
        _ => Rounding::FedBack,
    }
}

fn tensor_error(
    stored_as: String,
    tensor: &StoredTensor,
    measure: &Measure,
    statistics: &Statistics,
) -> TensorError {
    let expected = match measure.lossless {
        true => 0.0,
        false => measure.expectation.typical,
    };
    TensorError {
        name: tensor.name.clone(),
        ty: stored_as,
        weights: statistics.weights,
        relative_error: statistics.relative_error(),
        max_abs_error: statistics.max_abs_error,
        expected: Some(expected),
    }
}

/// An artifact and a reference, and what widening and rewrites did to either.
struct Pairing<'a> {
    reference: &'a StoredModel,
    /// What the reference has to undergo.
    rewrites: Option<&'a Rewrites>,
    views: (Views, Views),
    undo: bool,
    sizes_differ: Option<String>,
}

impl<'a> Pairing<'a> {
    fn new(
        artifact: &StoredModel,
        reference: &'a StoredModel,
        rewrites: Option<&'a Rewrites>,
    ) -> Self {
        let views = (Views::of(artifact), Views::of(reference));
        // Rewrites are those of the widened model: there both have all their rows and columns.
        let undo = rewrites.is_none() && !views.0.same_widths(&views.1);
        let mut pairing = Self {
            reference,
            rewrites,
            views,
            undo,
            sizes_differ: None,
        };
        let blocks = |model: &StoredModel| model.config().pattern.kinds().to_vec();
        pairing.sizes_differ = match blocks(artifact) == blocks(reference) {
            false => Some("the blocks are of other kinds or of another number".into()),
            true => artifact
                .tensors()
                .iter()
                .find_map(|tensor| pairing.other_shape(tensor)),
        };
        pairing
    }

    fn other_shape(&self, tensor: &StoredTensor) -> Option<String> {
        let other = self.reference.tensor(&tensor.name)?;
        let (ours, theirs) = self.views_of(tensor, other);
        let shape = |view: View, tensor: &StoredTensor| [tensor.matrices, view.rows, view.columns];
        let (ours, theirs) = (shape(ours, tensor), shape(theirs, other));
        let name = &tensor.name;
        (ours != theirs).then(|| {
            format!("`{name}` has shape {ours:?} in the artifact, {theirs:?} in the reference")
        })
    }

    fn views_of(&self, ours: &StoredTensor, theirs: &StoredTensor) -> (View, View) {
        match self.undo {
            true => (self.views.0.view(ours), self.views.1.view(theirs)),
            false => (whole(ours), whole(theirs)),
        }
    }

    fn of_other_sizes(&self) -> Option<Finding> {
        let what = self.sizes_differ.as_ref()?;
        Some(Finding::new(Rule::DifferentModels, what.as_str()))
    }

    /// The reference's tensor after its rewrites: a model of this tensor alone.
    fn rewritten(
        &self,
        tensor: &StoredTensor,
        mixer: Option<&dyn Mixer>,
    ) -> Result<Option<StoredModel>> {
        let (Some(rewrites), Some(_)) = (self.rewrites, self.reference.tensor(&tensor.name)) else {
            return Ok(None);
        };
        let view = Rewritten {
            stored: self.reference,
            rewrites,
            mixer,
        };
        let config = self.reference.config().clone();
        let tensors = vec![view.in_memory(&tensor.name)?];
        StoredModel::in_memory(self.reference.path(), config, tensors).map(Some)
    }

    fn pair<'b>(
        &'b self,
        tensor: &StoredTensor,
        rewritten: Option<&'b StoredModel>,
    ) -> Option<Pair<'b>> {
        let stored = self.reference.tensor(&tensor.name)?;
        let reference = rewritten.unwrap_or(self.reference);
        let other = reference.tensor(&tensor.name)?;
        let (ours, theirs) = self.views_of(tensor, other);
        let is_float = matches!(stored.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        Some(Pair {
            expectation: expectation::of(stored.ty, rounding_of(self.reference))?,
            reference,
            tensor: other,
            is_exact: rewritten.is_none() || is_float,
            ours,
            theirs,
        })
    }
}

/// The counterpart of a tensor.
#[derive(Clone, Copy)]
struct Pair<'a> {
    reference: &'a StoredModel,
    tensor: &'a StoredTensor,
    /// Whether the values are those that the artifact was made from, and not rounded before they were rewritten.
    is_exact: bool,
    ours: View,
    theirs: View,
    expectation: Expectation,
}

impl Pair<'_> {
    /// Whether the stored type holds every value of the reference.
    fn is_lossless(&self, tensor: &StoredTensor) -> bool {
        use GgmlType::{BF16, F16, F32};
        let holds = matches!(
            (tensor.ty, self.tensor.ty),
            (F32, F32 | F16 | BF16) | (F16, F16) | (BF16, BF16)
        );
        let factors = self.ours.factor == 1.0 && self.theirs.factor == 1.0;
        holds && !tensor.is_packed && self.is_exact && (factors || tensor.ty == F32)
    }
}

/// One tensor to be measured.
struct Job<'a> {
    artifact: &'a StoredModel,
    tensor: &'a StoredTensor,
    pair: Option<Pair<'a>>,
    measure: Measure,
}

/// A worker's buffers.
#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    ours: Vec<f32>,
    theirs: Vec<f32>,
}

impl Job<'_> {
    fn statistics(&self) -> Result<Statistics> {
        let tensor = self.tensor;
        let step = (TILE_WEIGHTS / tensor.columns.max(1)).clamp(1, tensor.rows.max(1));
        let tiles: Vec<(usize, usize)> = (0..tensor.matrices)
            .flat_map(|matrix| (0..tensor.rows).step_by(step).map(move |row| (matrix, row)))
            .collect();
        let blocks_of_row = tensor.columns / tensor.ty.block_elements();
        let mut whole = Statistics::default();
        let idle = Mutex::new(Vec::new());
        let lock = || idle.lock().expect("no work is done under this lock");
        for batch in tiles.chunks(TILES_AT_ONCE) {
            let made = parallel::try_map(batch, |&(matrix, row)| {
                let mut buffers = lock().pop().unwrap_or_default();
                let tile = self.tile(matrix, row, step.min(tensor.rows - row), &mut buffers);
                lock().push(buffers);
                tile
            })?;
            for (tile, (matrix, row)) in made.into_iter().zip(batch) {
                let rows_before = matrix * tensor.rows + row;
                whole.merge(tile, *matrix, (rows_before * blocks_of_row) as u64);
            }
        }
        Ok(whole)
    }

    fn tile(
        &self,
        matrix: usize,
        first_row: usize,
        rows: usize,
        buffers: &mut Buffers,
    ) -> Result<Statistics> {
        let tensor = self.tensor;
        let mut statistics = Statistics::default();
        let Buffers {
            bytes,
            ours,
            theirs,
        } = buffers;
        bytes.resize(rows * tensor.row_bytes(), 0);
        self.artifact.read_rows(tensor, matrix, first_row, bytes)?;
        statistics.facts = BlockFacts::of(tensor.ty, bytes);
        ours.resize(rows * tensor.columns, 0.0);
        dequantize(tensor.ty, bytes, ours).map_err(|error| error.in_tensor(&tensor.name))?;
        if let Some(scale) = self.artifact.second_scale(tensor, matrix) {
            ours.iter_mut().for_each(|value| *value *= scale);
        }
        let block = self.measure.expectation.block;
        for (index, row) in ours.chunks_exact(tensor.columns.max(1)).enumerate() {
            let at = At {
                matrix,
                row: first_row + index,
                column: 0,
            };
            statistics.artifact_row(at, row, block);
        }
        if let Some(pair) = &self.pair {
            let inside = pair.ours.rows.saturating_sub(first_row).min(rows);
            self.reference_rows(pair, matrix, first_row, inside, bytes, theirs)?;
            self.compare(pair, matrix, first_row, ours, theirs, &mut statistics);
        }
        Ok(statistics)
    }

    fn reference_rows(
        &self,
        pair: &Pair,
        matrix: usize,
        first_row: usize,
        rows: usize,
        bytes: &mut Vec<u8>,
        theirs: &mut Vec<f32>,
    ) -> Result<()> {
        theirs.resize(rows * pair.tensor.columns, 0.0);
        if rows == 0 {
            return Ok(());
        }
        pair.reference
            .dequantize_rows(pair.tensor, matrix, first_row, bytes, theirs)?;
        if pair.theirs.factor != 1.0 {
            theirs.iter_mut().for_each(|b| *b /= pair.theirs.factor);
        }
        Ok(())
    }

    fn compare(
        &self,
        pair: &Pair,
        matrix: usize,
        first_row: usize,
        ours: &mut [f32],
        theirs: &[f32],
        statistics: &mut Statistics,
    ) {
        let mut references = theirs.chunks_exact(pair.tensor.columns.max(1));
        let rows = ours.chunks_exact_mut(self.tensor.columns.max(1));
        for (index, row) in rows.enumerate() {
            let at = At {
                matrix,
                row: first_row + index,
                column: 0,
            };
            let reference = references.next();
            let columns = reference.map_or(0, |_| pair.ours.columns);
            let (row, padding) = row.split_at_mut(columns);
            if pair.ours.factor != 1.0 {
                row.iter_mut().for_each(|a| *a /= pair.ours.factor);
            }
            if let Some(reference) = reference {
                let reference = &reference[..pair.theirs.columns];
                statistics.compare_row(at, row, reference, &self.measure);
            }
            // Nothing reads padded columns but zeros: where they share a block with weights, they are rounded with them.
            let whole = columns.next_multiple_of(self.tensor.ty.block_elements());
            let padding = padding.get(whole - columns..).unwrap_or_default();
            let stray = padding.iter().position(|value| *value != 0.0);
            if let Some(stray) = stray {
                let column = whole + stray;
                statistics.padding.add(At { column, ..at });
            }
        }
    }
}
