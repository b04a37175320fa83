//! Which rewrites, with which parameters.
//!
//! Enters: a model, settings, statistics. Leaves: [`Rewrites`]. Reads weights in a fixed order, so that the same input
//! gives the same bits on every machine.

use std::borrow::Cow;
use std::sync::Arc;

use super::matrix::{SquareMatrix, product_on};
use super::mixer::Mixer;
use super::model::Rewritten;
use super::smoothing::scales;
use super::space::Space;
use super::spaces::{FINAL_NORM, Freedom, KnownSpace, known_spaces};
use super::{ChannelStatistics, Magnitude, RewriteSettings, RewriteStatistics, Rewrites, Rotation};
use super::{eigen, orthogonal};
use crate::artifact::{StoredModel, StoredTensor};
use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;
use crate::model::nemotron_h::stream_readers;
use crate::parallel;

/// Rows of a tensor by which the sizes of its columns are known after a rotation, evenly spread.
const SAMPLED_ROWS: usize = 1024;

impl Rewrites {
    /// Chooses rewrites. Runs in rayon's current pool; a Karhunen-Loeve rotation takes time with the cube of the width.
    ///
    /// # Errors
    /// The model cannot be rotated ([`Self::obstacle`]), statistics are missing or of another model, or a file cannot be
    /// read.
    pub fn choose(
        model: &StoredModel,
        settings: &RewriteSettings,
        statistics: &RewriteStatistics,
    ) -> Result<Self> {
        Self::choose_on(None, model, settings, statistics)
    }

    /// The same with products in f64 left to a machine, if there is one; the choice stays the same.
    ///
    /// # Errors
    /// As [`Self::choose`]; the machine fails.
    pub fn choose_on(
        mixer: Option<&dyn Mixer>,
        model: &StoredModel,
        settings: &RewriteSettings,
        statistics: &RewriteStatistics,
    ) -> Result<Self> {
        let rewrites = Self {
            settings: settings.clone(),
            ..Self::default()
        };
        if settings.rotation != Rotation::None
            && let Some(obstacle) = Self::obstacle(model, settings.with_mtp)
        {
            return Err(Error::Plan(obstacle.in_file(model.path())));
        }
        let mut choice = Choice {
            mixer,
            model,
            settings,
            statistics,
            rewrites,
        };
        choice.rotate()?;
        choice.fold_norms();
        for (block, kind) in model.config().pattern.kinds().iter().enumerate() {
            choice.block(block, *kind)?;
        }
        choice.smooth_norms()?;
        let mut rewrites = choice.rewrites;
        if let Some(floats) = &settings.floats {
            rewrites.spare_floats(model, floats)?;
        }
        Ok(rewrites)
    }

    /// Why the residual stream of a model cannot be rotated, if it cannot.
    pub fn obstacle(model: &StoredModel, with_mtp: bool) -> Option<Fault> {
        if model.tensor("output.weight").is_none() {
            let what = "cannot rotate the residual stream: the head is tied to the embedding, so the weight of the final norm has no matrix to be folded into";
            return Some(Fault::new(what).hint("leave the rotation out; all other rewrites apply"));
        }
        if with_mtp || has_mtp(model) {
            let what = "cannot rotate the residual stream with a multi-token-prediction head in the file: the head reads the weighted stream and ends in a norm that subtracts the mean";
            return Some(Fault::new(what).hint("drop the head with `--no-mtp`"));
        }
        None
    }
}

/// Whether the model holds the tensors of a multi-token-prediction head.
fn has_mtp(model: &StoredModel) -> bool {
    let block = model.config().pattern.kinds().len();
    let norm = format!("blk.{block}.nextn.hnorm.weight");
    model.tensor(&norm).is_some()
}

fn has_latent(config: &NemotronHConfig) -> bool {
    let moe = config.moe.as_ref();
    moe.is_some_and(|moe| moe.moe_latent_size.is_some())
}

struct Choice<'a> {
    mixer: Option<&'a dyn Mixer>,
    model: &'a StoredModel,
    settings: &'a RewriteSettings,
    statistics: &'a RewriteStatistics,
    rewrites: Rewrites,
}

impl Choice<'_> {
    /// The model under the rewrites chosen so far.
    fn rewritten(&self) -> Rewritten<'_> {
        Rewritten {
            stored: self.model,
            rewrites: &self.rewrites,
            mixer: self.mixer,
        }
    }

    fn config(&self) -> &NemotronHConfig {
        self.model.config()
    }

    fn fault(&self, what: impl Into<String>, tensor: &str) -> Error {
        let fault = Fault::new(what).in_tensor(tensor);
        Error::Plan(fault.in_file(self.model.path()))
    }

    fn rotates(&self) -> bool {
        self.settings.rotation != Rotation::None
    }

    /// R of the residual stream.
    fn rotate(&mut self) -> Result<()> {
        let (size, seed) = (self.config().hidden_size, self.settings.seed);
        self.rewrites.rotation = match self.settings.rotation {
            Rotation::None => None,
            Rotation::Hadamard => Some(random_hadamard(size, seed)),
            Rotation::Klt => {
                let (_, axes) = eigen::symmetric(&self.pooled_moments()?).ok_or_else(|| {
                    self.fault("the second moments have no eigenvectors", "residual")
                })?;
                Some(axes.times(&random_hadamard(size, seed)))
            }
        };
        Ok(())
    }

    /// Second moments of all blocks, each counted by the rows that read it: of routed experts those that a token visits.
    /// The head does not count, it is stored with more bits.
    fn pooled_moments(&self) -> Result<SquareMatrix> {
        let size = self.config().hidden_size;
        let mut pooled = vec![0.0; size * size];
        for (block, kind) in self.config().pattern.kinds().iter().enumerate() {
            let rows: usize = stream_readers(*kind, self.config())
                .iter()
                .filter_map(|name| self.model.tensor(&format!("blk.{block}.{name}.weight")))
                .map(|tensor| tensor.rows * self.visited(tensor))
                .sum();
            let weight = rows as f64;
            let moments = self.moments(block)?;
            pooled
                .iter_mut()
                .zip(moments.iter())
                .for_each(|(sum, m)| *sum += weight * m);
        }
        Ok(SquareMatrix::new(size, pooled))
    }

    /// Matrices of a stack that a token visits.
    fn visited(&self, tensor: &StoredTensor) -> usize {
        let chosen = self
            .config()
            .moe
            .as_ref()
            .map(|moe| moe.num_experts_per_tok);
        chosen.filter(|_| tensor.matrices > 1).unwrap_or(1)
    }

    /// Second moments of the normed stream before a block; the final norm's follow the last block.
    fn moments(&self, block: usize) -> Result<Cow<'_, [f64]>> {
        let size = self.config().hidden_size;
        let moments = self.statistics.residual.get(block);
        let moments = moments.filter(|moments| moments.len() == size * size);
        let missing = || {
            self.fault(
                "there are no second moments of this block's input",
                &format!("blk.{block}.attn_norm"),
            )
        };
        moments.ok_or_else(missing)?.read()
    }

    /// Statistics of the input of a matrix, one entry per channel of what is `needed` of them.
    fn input<T>(&self, name: &str, needed: fn(&ChannelStatistics) -> &[T]) -> Result<&[T]> {
        let statistics = self.statistics.inputs.get(name).map(needed);
        let tensor = self.rewritten().tensor(name)?;
        let channels = tensor.matrices * tensor.columns;
        statistics
            .filter(|statistics| statistics.len() == channels)
            .ok_or_else(|| self.fault("there are no statistics of this matrix's input", name))
    }

    fn mean_squares(&self, name: &str) -> Result<&[f64]> {
        self.input(name, |statistics| &statistics.mean_square)
    }

    /// Sizes of the channels of the input of a matrix.
    fn sizes(&self, name: &str) -> Result<Vec<f64>> {
        Ok(match self.settings.magnitude {
            Magnitude::RootMeanSquare => {
                let squares = self.mean_squares(name)?.iter();
                squares.map(|square| square.sqrt()).collect()
            }
            Magnitude::Maximum => {
                let sizes = self.input(name, |statistics| &statistics.max_abs)?.iter();
                sizes.map(|size| f64::from(*size)).collect()
            }
        })
    }

    /// Every norm gives its weight to its readers; the final one only where a head of its own reads it.
    fn fold_norms(&mut self) {
        if !self.rotates() && !self.settings.smoothing {
            return;
        }
        let size = self.config().hidden_size;
        for block in 0..self.config().pattern.kinds().len() {
            self.insert(format!("blk.{block}.attn_norm"), Space::unchanged(1, size));
        }
        if Rewrites::obstacle(self.model, self.settings.with_mtp).is_none() {
            self.insert(FINAL_NORM.to_owned(), Space::unchanged(1, size));
        }
    }

    fn insert(&mut self, name: String, space: Space) {
        self.rewrites.spaces.insert(name, space);
    }

    fn block(&mut self, block: usize, kind: BlockKind) -> Result<()> {
        let of = |name: &str| format!("blk.{block}.{name}");
        match kind {
            BlockKind::Mamba => self.ordered(of("ssm_norm"), &of("ssm_out.weight")),
            BlockKind::Mlp => self.ordered(of("ffn_up"), &of("ffn_down.weight")),
            BlockKind::Attention => {
                self.keys(block)?;
                self.values(block)
            }
            BlockKind::Moe => {
                self.ordered(of("ffn_up_exps"), &of("ffn_down_exps.weight"))?;
                self.ordered(of("ffn_up_shexp"), &of("ffn_down_shexp.weight"))?;
                match has_latent(self.config()) {
                    true => self.latent(block),
                    false => Ok(()),
                }
            }
        }
    }

    fn known(&self, name: &str) -> Result<KnownSpace> {
        let known = known_spaces(self.config()).get(name).copied();
        known.ok_or_else(|| self.fault("the network has no such space", name))
    }

    /// A space with scales and an order: before `ssm_out` and before down projections.
    fn ordered(&mut self, name: String, consumer: &str) -> Result<()> {
        if !self.settings.smoothing && !self.settings.sort {
            return Ok(());
        }
        let known = self.known(&name)?;
        let mut space = Space::unchanged(known.matrices, known.width);
        if self.settings.smoothing {
            space.scale = Some(self.balanced(consumer)?);
        }
        if let (true, Freedom::Order(run)) = (self.settings.sort, known.freedom) {
            space.order = Some(self.loudest_first(consumer, &space, run)?);
        }
        self.insert(name, space);
        Ok(())
    }

    /// Scales between the input of a matrix and its columns, for every matrix of a stack by itself.
    fn balanced(&self, consumer: &str) -> Result<Vec<f64>> {
        let sizes = self.sizes(consumer)?;
        let tensor = self.rewritten().tensor(consumer)?;
        let balance = self.settings.balance;
        let parts = parallel::try_map(0..tensor.matrices, |matrix| -> Result<Vec<f64>> {
            let columns = self.column_sizes(tensor, matrix)?;
            let sizes = &sizes[matrix * tensor.columns..][..tensor.columns];
            Ok(scales(sizes, &columns, balance))
        });
        Ok(parts?.concat())
    }

    /// Root mean square of every stored column.
    fn column_sizes(&self, tensor: &StoredTensor, matrix: usize) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; tensor.columns];
        let rows: Vec<usize> = (0..tensor.rows).collect();
        for rows in rows.chunks(64) {
            let values = self.rewritten().stored_rows(tensor, matrix, rows)?;
            add_squares(&mut sums, values.iter().map(|value| f64::from(*value)));
        }
        Ok(roots(&sums, tensor.rows))
    }

    /// Channels by descending mean square after their scales, within runs.
    fn loudest_first(&self, consumer: &str, space: &Space, run: usize) -> Result<Vec<u32>> {
        let mean_square = self.mean_squares(consumer)?;
        let loudness = |index: usize| {
            let scale = space.scale.as_ref().map_or(1.0, |scale| scale[index]);
            mean_square[index] / (scale * scale)
        };
        let width = space.width;
        let mut order = Vec::with_capacity(mean_square.len());
        for first in (0..mean_square.len()).step_by(run.max(1)) {
            let mut channels: Vec<usize> = (first..first + run).collect();
            channels.sort_by(|a, b| loudness(*b).total_cmp(&loudness(*a)).then(a.cmp(b)));
            order.extend(channels.iter().map(|channel| (channel % width) as u32));
        }
        Ok(order)
    }

    /// Keys and queries of a head as large as each other: what is left of either in an 8 or 16 bit cache.
    fn keys(&mut self, block: usize) -> Result<()> {
        if !self.settings.smoothing {
            return Ok(());
        }
        let keys = self.energies(block, "attn_k")?;
        let queries = self.energies(block, "attn_q")?;
        let queries = self.mean_over_queries(&queries);
        // The fourth root, because it is energies that are compared.
        let scale = |(key, query): (&f64, &f64)| match *key > 0.0 && *query > 0.0 {
            true => (key / query).sqrt().sqrt(),
            false => 1.0,
        };
        let space = Space {
            scale: Some(keys.iter().zip(&queries).map(scale).collect()),
            ..Space::unchanged(1, keys.len())
        };
        self.insert(format!("blk.{block}.attn_k"), space);
        Ok(())
    }

    fn values(&mut self, block: usize) -> Result<()> {
        let (name, consumer) = (
            format!("blk.{block}.attn_v"),
            format!("blk.{block}.attn_output.weight"),
        );
        let known = self.known(&name)?;
        let mut space = Space::unchanged(1, known.width);
        if self.settings.smoothing {
            let squares =
                |sizes: Vec<f64>| -> Vec<f64> { sizes.iter().map(|size| size * size).collect() };
            let sizes = self.mean_over_queries(&squares(self.sizes(&consumer)?));
            let tensor = self.rewritten().tensor(&consumer)?;
            let columns = self.mean_over_queries(&squares(self.column_sizes(tensor, 0)?));
            let (sizes, columns) = (roots(&sizes, 1), roots(&columns, 1));
            space.scale = Some(scales(&sizes, &columns, self.settings.balance));
        }
        self.insert_rotated(name, space, known);
        Ok(())
    }

    /// Channels of query heads to those of their key-value heads.
    fn mean_over_queries(&self, channels: &[f64]) -> Vec<f64> {
        let head = self.config().head_dim;
        let group = self.config().num_attention_heads / self.config().num_key_value_heads;
        let groups = channels.chunks_exact(head * group);
        groups
            .flat_map(|heads| {
                let sum =
                    move |channel: usize| heads.iter().skip(channel).step_by(head).sum::<f64>();
                (0..head).map(move |channel| sum(channel) / group as f64)
            })
            .collect()
    }

    /// Inserts a space that is rotated if the stream is, unless nothing happens to it.
    fn insert_rotated(&mut self, name: String, mut space: Space, known: KnownSpace) {
        if let (true, Freedom::Rotation(run)) = (self.rotates(), known.freedom) {
            let others = self.rewrites.spaces.values();
            let made = others.filter_map(|space| space.rotation.as_ref());
            let same = made
                .into_iter()
                .find(|rotation| rotation.size() == run)
                .cloned();
            let seed = self.settings.seed;
            space.rotation = Some(same.unwrap_or_else(|| Arc::new(random_hadamard(run, seed))));
        }
        if space.scale.is_some() || space.rotation.is_some() {
            self.insert(name, space);
        }
    }

    /// Both sides of the latent space of a block's experts.
    fn latent(&mut self, block: usize) -> Result<()> {
        let of = |name: &str| format!("blk.{block}.{name}");
        let (before, behind) = (of("ffn_latent_down"), of("ffn_down_exps"));
        let known = self.known(&before)?;
        let mut space = Space::unchanged(1, known.width);
        if self.settings.smoothing {
            let sizes = roots(&self.energies(block, "ffn_latent_down")?, 1);
            let columns = self.rewritten_column_sizes(&[of("ffn_up_exps.weight")])?;
            space.scale = Some(scales(&sizes, &columns, self.settings.balance));
        }
        self.insert_rotated(before, space, known);
        let mut space = Space::unchanged(1, known.width);
        if self.settings.smoothing {
            space.scale = Some(self.balanced(&of("ffn_latent_up.weight"))?);
        }
        self.insert_rotated(behind, space, known);
        Ok(())
    }

    /// Mean squares of the outputs of a reader of the original network: `diag(W G M G W^T)`.
    fn energies(&self, block: usize, reader: &str) -> Result<Vec<f64>> {
        let of = |name: &str| {
            self.rewritten()
                .tensor(&format!("blk.{block}.{name}.weight"))
        };
        let (tensor, norm) = (of(reader)?, of("attn_norm")?);
        let size = self.config().hidden_size;
        let moments = SquareMatrix::new(size, self.moments(block)?.into_owned());
        let rows: Vec<usize> = (0..tensor.rows).collect();
        let values = self.rewritten().stored_rows(tensor, 0, &rows)?;
        let weight = self.rewritten().stored_rows(norm, 0, &[0])?;
        let factors = weight.iter().cycle();
        let weighted = values
            .iter()
            .zip(factors)
            .map(|(w, g)| f64::from(*w) * f64::from(*g));
        let weighted: Vec<f64> = weighted.collect();
        let images = product_on(self.mixer, &weighted, size, &moments)?;
        let rows = weighted.chunks_exact(size).zip(images.chunks_exact(size));
        let dot = |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        Ok(rows.map(|rows| dot(rows).max(0.0)).collect())
    }

    /// Scales between the normed stream, rotated, and the columns of its readers, rotated too.
    fn smooth_norms(&mut self) -> Result<()> {
        if !self.settings.smoothing {
            return Ok(());
        }
        let kinds = self.config().pattern.kinds().to_vec();
        for (block, kind) in kinds.iter().enumerate() {
            let names = stream_readers(*kind, self.config());
            let names = names
                .iter()
                .map(|name| format!("blk.{block}.{name}.weight"));
            let names: Vec<String> = names.collect();
            self.smooth_norm(block, &format!("blk.{block}.attn_norm"), &names)?;
        }
        match self.rewrites.space(FINAL_NORM) {
            None => Ok(()),
            Some(_) => self.smooth_norm(kinds.len(), FINAL_NORM, &["output.weight".to_owned()]),
        }
    }

    fn smooth_norm(&mut self, block: usize, norm: &str, readers: &[String]) -> Result<()> {
        let sizes = self.stream_sizes(block)?;
        let columns = self.rewritten_column_sizes(readers)?;
        let scale = scales(&sizes, &columns, self.settings.balance);
        let space = Space {
            scale: Some(scale),
            ..Space::unchanged(1, sizes.len())
        };
        self.insert(norm.to_owned(), space);
        Ok(())
    }

    /// Root mean squares of the channels of the normed stream, rotated: `diag(R^T M R)`.
    fn stream_sizes(&self, block: usize) -> Result<Vec<f64>> {
        let moments = self.moments(block)?;
        let size = self.config().hidden_size;
        let Some(rotation) = &self.rewrites.rotation else {
            let diagonal = moments.iter().step_by(size + 1);
            return Ok(diagonal.map(|m| m.max(0.0).sqrt()).collect());
        };
        let images = product_on(self.mixer, &moments, size, rotation)?;
        let mut sums = vec![0.0; size];
        let rows = rotation
            .values()
            .chunks_exact(size)
            .zip(images.chunks_exact(size));
        for (row, image) in rows {
            for ((sum, r), m) in sums.iter_mut().zip(row).zip(image) {
                *sum += r * m;
            }
        }
        Ok(sums.iter().map(|sum| sum.max(0.0).sqrt()).collect())
    }

    /// Root mean square of every column of some tensors together under the rewrites chosen so far, by some of their rows.
    fn rewritten_column_sizes(&self, tensors: &[String]) -> Result<Vec<f64>> {
        let (mut sums, mut count) = (Vec::new(), 0);
        for name in tensors {
            let tensor = self.rewritten().tensor(name)?;
            sums.resize(tensor.columns, 0.0);
            let rows = sampled(tensor.rows, (SAMPLED_ROWS / tensor.matrices).max(1));
            for matrix in 0..tensor.matrices {
                let values = self.rewritten().rows(name, matrix, &rows, |value| value)?;
                add_squares(&mut sums, values.into_iter());
                count += rows.len();
            }
        }
        Ok(roots(&sums, count))
    }
}

/// At most `count` of `rows` rows, evenly spread.
fn sampled(rows: usize, count: usize) -> Vec<usize> {
    let count = count.min(rows);
    (0..count).map(|index| index * rows / count).collect()
}

/// Adds the squares of rows to the sums of their columns.
fn add_squares(sums: &mut [f64], values: impl Iterator<Item = f64>) {
    let columns = sums.len().max(1);
    for (index, value) in values.enumerate() {
        sums[index % columns] += value * value;
    }
}

fn roots(sums: &[f64], count: usize) -> Vec<f64> {
    let mean = sums.iter().map(|sum| sum / count.max(1) as f64);
    mean.map(f64::sqrt).collect()
}

/// `diag(+-1) H`.
fn random_hadamard(size: usize, seed: u64) -> SquareMatrix {
    let hadamard = orthogonal::hadamard(size, seed);
    let signs = orthogonal::signs(size, seed);
    let rows = hadamard.values().chunks_exact(size).zip(signs);
    let values = rows.flat_map(|(row, sign)| row.iter().map(move |x| sign * x));
    SquareMatrix::new(size, values.collect())
}
