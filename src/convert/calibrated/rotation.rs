//! Which rotation of the residual stream is the easiest to round: tried on a few blocks, without running the network.
//!
//! Enters: a model, statistics, the types that its tensors will have. Leaves: the rewrites whose rounding loses least,
//! with the loss of every rotation that was tried.
//!
//! A rotation keeps what the network computes, so losses are compared as shares of it. A matrix that reads the stream
//! loses `tr(E M E^T) / tr(W M W^T)`, M the second moments of the normed stream as it is rewritten. What is written to the
//! stream, by the embedding too, is measured by what readers make of it: the same with `K` of the readers' rows on the
//! other side, `tr(K E M E^T)`, M the mean squares of the inputs. Without the first a rotation would be judged by one side
//! alone; without K an error in a channel that nobody reads would count like any other.

use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;

use super::{Method, Rounding};
use crate::artifact::{StoredModel, StoredTensor};
use crate::backend::cpu::kernels::Isa;
use crate::error::Result;
use crate::model::hybrid_pattern::BlockKind;
use crate::model::nemotron_h::stream_readers;
use crate::parallel;
use crate::quantize::feedback::{self, Feedback, InputMoments, can_feed_back};
use crate::quantize::{is_searched, quantize_rows};
use crate::rewrite::{
    Mixer, Packed, RewriteSettings, RewriteStatistics, Rewrites, Rewritten, Rotation, SquareMatrix,
    padded, product_on,
};

/// Blocks of each kind that are tried, evenly spread.
const BLOCKS_OF_A_KIND: usize = 3;
/// Rows of a reader, and of the embedding, that are rounded.
const SAMPLE_ROWS: usize = 256;
/// Columns of a writer that are rounded, in whole blocks of its type.
const SAMPLE_COLUMNS: usize = 512;
/// Views that are multiplied by one task.
const VIEWS_AT_ONCE: usize = 64;
/// Experts of a stack that are tried, evenly spread.
const SAMPLE_EXPERTS: usize = 4;
/// What a rotation must leave of the loss without one to be chosen: it costs compatibility with adapters.
const CLEARLY_BETTER: f64 = 0.98;

/// What is known before a rotation is chosen.
pub struct RotationTrial<'a> {
    /// The model as it is stored.
    pub model: &'a StoredModel,
    /// All other rewrites.
    pub settings: &'a RewriteSettings,
    /// Statistics of the original network.
    pub statistics: &'a RewriteStatistics,
    /// How weights will be rounded.
    pub rounding: Rounding,
    /// What a tensor will be stored as.
    pub type_of: &'a (dyn Fn(&str) -> GgmlType + Sync),
    /// Who multiplies in f64, if not this computer.
    pub mixer: Option<&'a dyn Mixer>,
    /// Called before every block; an error ends the trial.
    pub watch: &'a (dyn Fn() -> Result<()> + Sync),
}

/// What rounding would lose under a rotation.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct RotationLoss {
    /// The rotation.
    pub rotation: Rotation,
    /// Sum of the relative losses of what was tried.
    pub loss: f64,
}

/// The rewrites that lose least.
#[derive(Debug, Default)]
pub struct RotationChoice {
    /// With the rotation that was chosen.
    pub rewrites: Rewrites,
    /// Of every rotation that was tried; empty where there was nothing to choose.
    pub losses: Vec<RotationLoss>,
}

impl RotationChoice {
    /// Rewrites whose rotation was decided before.
    pub fn without_trial(rewrites: Rewrites) -> Self {
        Self {
            rewrites,
            losses: Vec::new(),
        }
    }
}

impl RotationTrial<'_> {
    /// Tries all rotations; none is kept unless another leaves clearly less loss. Runs in rayon's current pool.
    ///
    /// # Errors
    /// Statistics are missing or of another model, a file cannot be read, whatever `watch` returns.
    pub fn choose(&self) -> Result<RotationChoice> {
        let plain = self.rewrites(Rotation::None)?;
        let is_rounded = |tensor: &&StoredTensor| is_searched((self.type_of)(&tensor.name));
        // A rotation changes every tensor, those that are to stay floats too.
        let nothing_to_choose = self.settings.floats.is_some()
            || Rewrites::obstacle(self.model, self.settings.with_mtp).is_some()
            || !self
                .model
                .tensors()
                .iter()
                .any(|tensor| is_rounded(&tensor));
        if nothing_to_choose {
            return Ok(RotationChoice::without_trial(plain));
        }
        let mut kept = (self.loss(&plain)?, plain);
        let mut losses = vec![RotationLoss {
            rotation: Rotation::None,
            loss: kept.0,
        }];
        let mut bar = CLEARLY_BETTER * kept.0;
        for rotation in [Rotation::Hadamard, Rotation::Klt] {
            let rewrites = self.rewrites(rotation)?;
            let loss = self.loss(&rewrites)?;
            losses.push(RotationLoss { rotation, loss });
            if loss < bar {
                (bar, kept) = (loss, (loss, rewrites));
            }
        }
        Ok(RotationChoice {
            rewrites: kept.1,
            losses,
        })
    }

    fn rewrites(&self, rotation: Rotation) -> Result<Rewrites> {
        let settings = RewriteSettings {
            rotation,
            ..self.settings.clone()
        };
        Rewrites::choose_on(self.mixer, self.model, &settings, self.statistics)
    }

    /// Sum of the relative losses of readers, writers and embedding.
    fn loss(&self, rewrites: &Rewrites) -> Result<f64> {
        let trial = Rotated {
            trial: self,
            rewritten: Rewritten {
                stored: self.model,
                rewrites,
                mixer: self.mixer,
            },
        };
        let mut views = Views {
            hidden: self.model.config().hidden_size,
            values: Vec::new(),
        };
        let mut loss = 0.0;
        let blocks = self.blocks();
        for block in &blocks {
            (self.watch)()?;
            let names = stream_readers(self.kind(*block), self.model.config());
            let names = names
                .iter()
                .map(|name| format!("blk.{block}.{name}.weight"));
            let names: Vec<String> = names.collect();
            let norm = format!("blk.{block}.attn_norm.weight");
            loss += trial.readers(*block, &norm, &names, &mut views)?;
        }
        let (end, head) = (
            self.model.config().pattern.kinds().len(),
            "output.weight".to_owned(),
        );
        loss += trial.readers(end, "output_norm.weight", &[head], &mut views)?;
        for block in &blocks {
            (self.watch)()?;
            for name in writers(self.kind(*block), self.has_latent()) {
                loss += trial.writer(*block, name, &views)?;
            }
        }
        Ok(loss + trial.embedding(&views)?)
    }

    fn kind(&self, block: usize) -> BlockKind {
        self.model.config().pattern.kinds()[block]
    }

    fn has_latent(&self) -> bool {
        let moe = self.model.config().moe.as_ref();
        moe.is_some_and(|moe| moe.moe_latent_size.is_some())
    }

    /// Some blocks of every kind, in order.
    fn blocks(&self) -> Vec<usize> {
        let kinds = self.model.config().pattern.kinds();
        let mut chosen = Vec::new();
        for kind in [
            BlockKind::Mamba,
            BlockKind::Attention,
            BlockKind::Mlp,
            BlockKind::Moe,
        ] {
            let of_kind: Vec<usize> = (0..kinds.len())
                .filter(|block| kinds[*block] == kind)
                .collect();
            chosen.extend(spread(of_kind.len(), BLOCKS_OF_A_KIND).map(|index| of_kind[index]));
        }
        chosen.sort_unstable();
        chosen
    }

    /// Errors of rows as the conversion will make them, with one pass of descent at most.
    fn errors(
        &self,
        ty: GgmlType,
        columns: usize,
        rows: &[f32],
        inputs: Option<(&InputMoments, &[f32])>,
    ) -> Vec<f32> {
        let mut bytes = vec![0; ty.bytes_for(rows.len() as u64).unwrap_or(0) as usize];
        match (self.rounding.method, inputs) {
            (Method::Gptq, Some((moments, _))) if can_feed_back(ty) => {
                let how = Feedback::of_inputs(moments, self.rounding.passes.min(1));
                feedback::quantize_rows(Isa::detect(), ty, rows, how, &mut bytes);
            }
            (Method::Gptq | Method::Imatrix, Some((_, importance))) => {
                nearest(ty, columns, rows, Some(importance), &mut bytes);
            }
            _ => nearest(ty, columns, rows, None, &mut bytes),
        }
        errors_of(ty, &bytes, rows)
    }

    /// `tr(A M A^T)`, without the damping that rounding adds to M: that is not the same in every basis.
    fn energy(&self, rows: &[f32], moments: &SquareMatrix) -> Result<f64> {
        let rows: Vec<f64> = rows.iter().map(|value| f64::from(*value)).collect();
        let images = product_on(self.mixer, &rows, moments.size(), moments)?;
        Ok(rows.iter().zip(&images).map(|(a, b)| a * b).sum())
    }
}

/// A model under one of the rotations.
struct Rotated<'a> {
    trial: &'a RotationTrial<'a>,
    rewritten: Rewritten<'a>,
}

/// Rows of readers as the stream before their norm meets them, each counted so that all readers of the trial count alike:
/// what they make of an error is what it costs.
struct Views {
    hidden: usize,
    /// `[view, hidden]`.
    values: Vec<f64>,
}

impl Rotated<'_> {
    /// Relative loss of all readers of a norm; adds what they see of the stream to `views`.
    fn readers(
        &self,
        block: usize,
        norm: &str,
        names: &[String],
        views: &mut Views,
    ) -> Result<f64> {
        let weight = self.rewritten.rows(norm, 0, &[0], |value| value)?;
        let moments = self.moments(block, &weight)?;
        let diagonal = moments.values().iter().step_by(weight.len() + 1);
        let importance: Vec<f32> = diagonal.map(|square| *square as f32).collect();
        let damping = self.trial.rounding.damping();
        let inputs = InputMoments::new(Isa::detect(), weight.len(), moments.values(), damping);
        let mut loss = 0.0;
        for name in names {
            let Some(tensor) = self.trial.model.tensor(name) else {
                continue;
            };
            let ty = (self.trial.type_of)(name);
            let mut shares = Share::default();
            for matrix in spread(tensor.matrices, SAMPLE_EXPERTS) {
                let rows: Vec<usize> = spread(tensor.rows, SAMPLE_ROWS).collect();
                let rows = self
                    .rewritten
                    .rows(name, matrix, &rows, |value| value as f32)?;
                let inputs = inputs.as_ref().map(|inputs| (inputs, &importance[..]));
                let energy = self.trial.energy(&rows, &moments)?;
                let error = match is_searched(ty) {
                    true => {
                        let errors = self.trial.errors(ty, moments.size(), &rows, inputs);
                        self.trial.energy(&errors, &moments)?
                    }
                    false => 0.0,
                };
                shares.add(error, energy);
                let counted = 1.0 / energy.max(f64::MIN_POSITIVE).sqrt();
                let rows = rows.chunks_exact(weight.len());
                let terms = rows.flat_map(|row| row.iter().zip(&weight));
                let seen = terms.map(|(w, g)| f64::from(*w) * g * counted);
                views.values.extend(seen);
            }
            loss += shares.relative();
        }
        Ok(loss)
    }

    /// `G R^T M R G`: second moments of a norm's output, G its weight.
    fn moments(&self, block: usize, weight: &[f64]) -> Result<SquareMatrix> {
        let size = weight.len();
        let stored = self.trial.statistics.residual[block].read()?.into_owned();
        let stored = SquareMatrix::new(size, stored);
        let rotated = match self.rewritten.rewrites.rotation() {
            None => stored,
            Some(rotation) => {
                let image = product_on(self.trial.mixer, rotation.transposed(), size, &stored)?;
                SquareMatrix::new(size, product_on(self.trial.mixer, &image, size, rotation)?)
            }
        };
        let value = |(at, value): (usize, &f64)| value * weight[at / size] * weight[at % size];
        let values = rotated.values().iter().enumerate().map(value);
        Ok(SquareMatrix::new(size, values.collect()))
    }

    /// Relative loss of a matrix that writes to the stream, on some of its columns.
    fn writer(&self, block: usize, name: &str, views: &Views) -> Result<f64> {
        let name = format!("blk.{block}.{name}.weight");
        let ty = (self.trial.type_of)(&name);
        let tensor = self.trial.model.tensor(&name);
        let Some(tensor) = tensor.filter(|_| is_searched(ty)) else {
            return Ok(0.0);
        };
        let unit = ty.block_elements();
        let units = spread(tensor.columns / unit, SAMPLE_COLUMNS.div_ceil(unit));
        let columns: Vec<usize> = units.flat_map(|at| at * unit..(at + 1) * unit).collect();
        let all: Vec<usize> = (0..tensor.rows).collect();
        let mut shares = Share::default();
        for matrix in spread(tensor.matrices, SAMPLE_EXPERTS) {
            let values = self
                .rewritten
                .rows(&name, matrix, &all, |value| value as f32)?;
            let rows = values.chunks_exact(tensor.columns);
            let chosen: Vec<f32> = rows
                .flat_map(|row| columns.iter().map(|column| row[*column]))
                .collect();
            let squares = self.mean_squares(tensor, matrix);
            let squares: Vec<f32> = columns.iter().map(|column| squares[*column]).collect();
            let importance = match self.trial.rounding.method {
                Method::Rtn => None,
                Method::Imatrix | Method::Gptq => Some(&squares[..]),
            };
            let mut bytes = vec![0; ty.bytes_for(chosen.len() as u64).unwrap_or(0) as usize];
            nearest(ty, columns.len(), &chosen, importance, &mut bytes);
            let errors = errors_of(ty, &bytes, &chosen);
            shares.add(
                seen(views, &errors, &squares),
                seen(views, &chosen, &squares),
            );
        }
        Ok(shares.relative())
    }

    /// Mean squares of the inputs of a matrix before which channels have a scale and an order.
    fn mean_squares(&self, tensor: &StoredTensor, matrix: usize) -> Vec<f32> {
        let width = tensor.columns;
        let stored = self.trial.statistics.inputs.get(&tensor.name);
        let stored =
            stored.and_then(|stored| stored.mean_square.get(matrix * width..(matrix + 1) * width));
        let Some(stored) = stored else {
            return vec![1.0; width];
        };
        let space = producer(&tensor.name).and_then(|name| self.rewritten.rewrites.space(&name));
        let scale = space.and_then(|space| space.scale_of(matrix));
        let order = space.and_then(|space| space.order_of(matrix));
        let square = |channel: usize| {
            let source = order.map_or(channel, |order| order[channel] as usize);
            let scale = scale.map_or(1.0, |scale| scale[source]);
            (stored[source] / (scale * scale)) as f32
        };
        (0..width).map(square).collect()
    }

    /// Relative loss of the embedding, whose rows are written to the stream as they are.
    fn embedding(&self, views: &Views) -> Result<f64> {
        let name = "token_embd.weight";
        let ty = (self.trial.type_of)(name);
        let tensor = self.trial.model.tensor(name);
        let Some(tensor) = tensor.filter(|_| is_searched(ty)) else {
            return Ok(0.0);
        };
        let rows: Vec<usize> = spread(tensor.rows, SAMPLE_ROWS).collect();
        let rows = self.rewritten.rows(name, 0, &rows, |value| value as f32)?;
        let errors = self.trial.errors(ty, tensor.columns, &rows, None);
        let columns = rows.len() / tensor.columns.max(1);
        let ones = vec![1.0; columns];
        let turned = |values: &[f32]| transposed(values, tensor.columns);
        let mut shares = Share::default();
        shares.add(
            seen(views, &turned(&errors), &ones),
            seen(views, &turned(&rows), &ones),
        );
        Ok(shares.relative())
    }
}

/// Writers of a block whose inputs are the same under every rotation of the stream; those behind values of attention and
/// behind latent spaces are rotated with it, and only mean squares of theirs are known.
fn writers(kind: BlockKind, has_latent: bool) -> &'static [&'static str] {
    match kind {
        BlockKind::Mamba => &["ssm_out"],
        BlockKind::Attention => &[],
        BlockKind::Mlp => &["ffn_down"],
        BlockKind::Moe if has_latent => &["ffn_down_shexp"],
        BlockKind::Moe => &["ffn_down_exps", "ffn_down_shexp"],
    }
}

/// The space that a writer reads.
fn producer(writer: &str) -> Option<String> {
    let name = writer.strip_suffix(".weight")?;
    let (block, stem) = name.rsplit_once('.')?;
    let producer = match stem {
        "ssm_out" => "ssm_norm".to_owned(),
        _ => stem.replace("ffn_down", "ffn_up"),
    };
    Some(format!("{block}.{producer}"))
}

/// At most `count` of `0..of`, evenly spread.
fn spread(of: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(of);
    (0..count).map(move |index| index * of / count)
}

/// Errors and what they are errors of, summed.
#[derive(Default)]
struct Share {
    error: f64,
    energy: f64,
}

impl Share {
    fn add(&mut self, error: f64, energy: f64) {
        self.error += error;
        self.energy += energy;
    }

    fn relative(&self) -> f64 {
        self.error / self.energy.max(f64::MIN_POSITIVE)
    }
}

/// To the nearest, rows by themselves.
fn nearest(ty: GgmlType, columns: usize, rows: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let row_bytes = out.len() / (rows.len() / columns).max(1);
    let rows = rows.chunks(columns).zip(out.chunks_mut(row_bytes.max(1)));
    parallel::for_each(rows, |(row, out)| {
        let _ = quantize_rows(ty, columns, row, importance, out);
    });
}

/// Stored less wanted.
fn errors_of(ty: GgmlType, bytes: &[u8], rows: &[f32]) -> Vec<f32> {
    let mut errors = vec![0.0; rows.len()];
    dequantize(ty, bytes, &mut errors).expect("the type was written just now");
    errors
        .iter_mut()
        .zip(rows)
        .for_each(|(error, row)| *error -= row);
    errors
}

/// `tr(V A D A^T V^T)`: what readers V see of columns A `[hidden, columns]` of a writer whose inputs have mean squares D.
fn seen(views: &Views, columns: &[f32], squares: &[f32]) -> f64 {
    let (hidden, width) = (views.hidden, squares.len());
    let columns = Packed::of(hidden, width, |row, column| {
        f64::from(columns[row * width + column])
    });
    let parts = views.values.chunks(VIEWS_AT_ONCE * hidden);
    let sums = parallel::map(parts, |views| -> Vec<f64> {
        let images = columns.product(views, views.len() / hidden);
        let images = images.chunks_exact(padded(width));
        let counted = images.map(|image| {
            let terms = image.iter().zip(squares);
            terms.map(|(x, square)| x * x * f64::from(*square)).sum()
        });
        counted.collect()
    });
    sums.iter().flatten().sum()
}

/// `[rows, columns]` as `[columns, rows]`.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    (0..values.len())
        .map(|at| values[at % rows * columns + at / rows])
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use nemoconv_fixtures::nano;

    use super::*;
    use crate::artifact::MemoryTensor;
    use crate::rewrite::{ChannelStatistics, RewrittenModel};

    /// The nano model, the weights of its readers changed by `change(column, value)`.
    fn model(change: impl Fn(usize, f32) -> f32) -> StoredModel {
        let stored = std::sync::Arc::new(StoredModel::open(nano().to_str().unwrap()).unwrap());
        let plain = RewrittenModel::new(std::sync::Arc::clone(&stored), Default::default());
        let tensors = stored.tensors().iter().map(|tensor| {
            let is_reader = ["ssm_in", "attn_q", "attn_k", "attn_v", "ffn_up"]
                .iter()
                .any(|name| tensor.name.contains(name));
            let mut values = Vec::new();
            for matrix in 0..tensor.matrices {
                values.extend(plain.matrix(&tensor.name, matrix).unwrap());
            }
            if is_reader {
                for (at, value) in values.iter_mut().enumerate() {
                    *value = change(at % tensor.columns, *value);
                }
            }
            let shape = [tensor.matrices, tensor.rows, tensor.columns];
            MemoryTensor::of_f32(tensor.name.clone(), shape, &values)
        });
        let config = stored.config().clone();
        StoredModel::in_memory(Path::new("changed"), config, tensors.collect()).unwrap()
    }

    /// Of a stream whose channels are equally loud, each by itself.
    fn statistics(model: &StoredModel) -> RewriteStatistics {
        let size = model.config().hidden_size;
        let identity: Vec<f64> = (0..size * size)
            .map(|at| f64::from(at / size == at % size))
            .collect();
        let inputs: BTreeMap<_, _> = model
            .tensors()
            .iter()
            .map(|tensor| {
                let channels = tensor.matrices * tensor.columns;
                let statistics = ChannelStatistics {
                    mean_square: vec![1.0; channels],
                    max_abs: vec![1.0; channels],
                };
                (tensor.name.clone(), statistics)
            })
            .collect();
        RewriteStatistics {
            residual: vec![identity.into(); model.config().pattern.kinds().len() + 1],
            inputs,
        }
    }

    fn choice(model: &StoredModel, ty: GgmlType, threads: usize) -> (Rotation, Vec<RotationLoss>) {
        let statistics = statistics(model);
        let trial = RotationTrial {
            model,
            settings: &RewriteSettings::default(),
            statistics: &statistics,
            rounding: Rounding::default(),
            type_of: &|_| ty,
            mixer: None,
            watch: &|| Ok(()),
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let choice = pool.build().unwrap().install(|| trial.choose().unwrap());
        (choice.rewrites.settings().rotation, choice.losses)
    }

    #[test]
    fn outliers_in_the_stream_are_rotated_away() {
        let loud = model(|column, value| value * if column % 32 == 5 { 30.0 } else { 1.0 });
        let (rotation, losses) = choice(&loud, GgmlType::Q4_0, 1);
        assert_ne!(rotation, Rotation::None, "{losses:?}");
        assert_eq!(losses.len(), 3);
        assert!(losses[1].loss < 0.8 * losses[0].loss, "{losses:?}");
        assert_eq!(choice(&loud, GgmlType::Q4_0, 3), (rotation, losses));
    }

    #[test]
    fn without_outliers_nothing_is_rotated() {
        let (rotation, losses) = choice(&model(|_, value| value), GgmlType::Q4_0, 2);
        assert_eq!(rotation, Rotation::None, "{losses:?}");
        let (none, all) = choice(&model(|_, value| value), GgmlType::F16, 2);
        assert_eq!((none, all.len()), (Rotation::None, 0));
    }

    #[test]
    fn a_writer_reads_the_space_of_its_producer() {
        let check = |writer: &str, space: &str| {
            assert_eq!(producer(&format!("blk.7.{writer}.weight")).unwrap(), space);
        };
        check("ssm_out", "blk.7.ssm_norm");
        check("ffn_down_exps", "blk.7.ffn_up_exps");
        check("ffn_down", "blk.7.ffn_up");
    }
}
