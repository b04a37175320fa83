//! The spine of a packed folder: every tensor, piece by piece, to its place in a shard.
//!
//! Enters: an open checkpoint, a [`PackedPlan`], rounded tensors if there was a calibration. Leaves: written and re-read
//! bytes. Pieces are independent of each other, so any number of threads gives the same bytes; memory holds one piece per
//! thread, in GPTQ's layout one matrix.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use nemoconv_formats::block::dequantize;
use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::packed::{Inputs, Role};
use nemoconv_formats::{Dtype, GgmlType};
use xxhash_rust::xxh3::xxh3_64;

use super::calibrated::workspace::Workspace;
use super::tile::{Scratch, Tile, grown, nonfinite_in, source_row};
use super::{Conduct, Counters, Progress, Summary, in_parallel, refuse};
use crate::error::{Error, Fault, Result};
use crate::model::nemotron_h::{ValueRule, is_bias_behind_ssm_in};
use crate::plan::PlannedTensor;
use crate::plan::packed::{ActivationClip, Content, PackedPlan};
use crate::plan::sources;
use crate::quantize::input_scale::INPUT_STEPS;
use crate::quantize::integer::Nearest;
use crate::quantize::quantize_rows;
use crate::rewrite::RewrittenModel;
use crate::write::packed::folder::PackedFolder;
use crate::write::packed::parts::{Rows, rows_together};

/// Weights of a piece: 1 MiB as f32, so that it stays in a core's second-level cache.
const PIECE_WEIGHTS: usize = 1 << 18;

/// What a calibration left.
#[derive(Clone, Copy)]
pub struct Rounded<'a> {
    /// The weights that were rounded.
    pub weights: &'a RewrittenModel,
    /// Integer rows of every quantized tensor.
    pub workspace: &'a Workspace,
    /// Biases behind `ssm_in` took back its mean errors.
    pub bias_absorption: bool,
    /// What the largest code of static inputs stands for.
    pub clip: ActivationClip,
}

/// Everything a conversion works on.
pub struct PackedJob<'a> {
    /// Where values come from.
    pub checkpoint: &'a Checkpoint,
    /// What becomes of them.
    pub plan: &'a PackedPlan,
    /// What a calibration left, if there was one.
    pub rounded: Option<Rounded<'a>>,
    /// How codes are chosen without one.
    pub nearest: Nearest,
    /// Where bytes go.
    pub folder: &'a PackedFolder,
    /// Told how far the work is.
    pub progress: &'a dyn Progress,
    /// Raised to stop.
    pub stop: &'a AtomicBool,
}

/// A part of the work.
#[derive(Debug, Clone, Copy)]
enum Piece {
    /// Bytes of a tensor as they are, from the first on.
    Copy {
        tensor: usize,
        first: usize,
        bytes: usize,
    },
    /// Values of a float tensor.
    Values(FloatRows),
    /// Rows of a quantized linear.
    Linear {
        linear: usize,
        first: usize,
        rows: usize,
    },
}

/// Rows of one matrix of a float tensor.
#[derive(Debug, Clone, Copy)]
struct FloatRows {
    /// Index into [`PackedPlan::tensors`].
    tensor: usize,
    /// Which matrix.
    piece: usize,
    first: usize,
    count: usize,
}

/// Buffers that a worker keeps: fresh ones would be given back to the system and asked for again with every piece.
#[derive(Debug, Default)]
struct Buffers {
    tile: Scratch,
    /// Weights of a linear's rows.
    values: Vec<f32>,
    /// The same as integer rows.
    integers: Vec<u8>,
    /// A part of them, as stored.
    part: Vec<u8>,
}

/// Where bytes went, and their digest.
struct Written {
    shard: usize,
    offset: u64,
    bytes: usize,
    digest: u64,
}

impl PackedJob<'_> {
    /// Writes every tensor and reads everything back; the caller publishes the folder.
    ///
    /// # Errors
    /// Weights that are refused (all of them are counted first), writes that fail, bytes that do not read back, a raised
    /// `stop`.
    pub fn run(&self, conduct: Conduct) -> Result<Summary> {
        let pieces = self.pieces();
        let index = Index::of(self.plan);
        let counters = Counters::new(self.plan.plan.tensors.len());
        counters.add_outcomes(
            &self.plan.plan,
            self.rounded.map(|rounded| rounded.workspace),
        );
        let writer = Writer {
            job: self,
            index: &index,
            counters: &counters,
            written: Mutex::new(Vec::new()),
        };
        self.progress.begin("writing", self.plan.tensor_bytes());
        in_parallel(
            conduct.threads,
            pieces.len(),
            self.stop,
            |buffers, index| writer.piece(buffers, pieces[index]),
        )?;
        self.progress.end();
        let written = writer.written.into_inner().expect("no worker panics");
        let summary = counters.summary(&self.plan.plan);
        refuse(&summary, conduct)?;
        self.folder.sync(self.plan)?;
        self.progress.begin("verifying", self.plan.tensor_bytes());
        in_parallel(
            conduct.threads,
            written.len(),
            self.stop,
            |scratch: &mut Scratch, index| self.verify(scratch, &written[index]),
        )?;
        self.progress.end();
        Ok(summary)
    }

    /// All pieces, in order of tensors; a linear is one piece with all its parts.
    fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (index, tensor) in self.plan.tensors.iter().enumerate() {
            match tensor.content {
                Content::Copied { .. } => {
                    let all = tensor.bytes() as usize;
                    for first in (0..all).step_by(4 * PIECE_WEIGHTS) {
                        let bytes = (4 * PIECE_WEIGHTS).min(all - first);
                        pieces.push(Piece::Copy {
                            tensor: index,
                            first,
                            bytes,
                        });
                    }
                }
                Content::Values { tensor, piece, .. } => {
                    pieces.extend(self.float_pieces(index, tensor, piece));
                }
                Content::Packed {
                    linear,
                    role: Role::Codes,
                } => {
                    pieces.extend(self.pieces_of(linear));
                }
                Content::Packed { .. } => {}
            }
        }
        pieces
    }

    fn float_pieces(&self, index: usize, planned: usize, piece: Option<usize>) -> Vec<Piece> {
        let tensor = &self.plan.plan.tensors[planned];
        let all = tensor.stored.rows;
        // Vectors, which the network may see as rows, and interleaved heads come whole.
        let is_matrix = tensor.dims.len() > 1 && tensor.dims[0] as usize == tensor.stored.columns;
        let step = match is_matrix && tensor.rule.value == ValueRule::Copy {
            true => (PIECE_WEIGHTS / tensor.stored.columns.max(1)).max(1),
            false => all.max(1),
        };
        let matrices = piece.map_or(0..tensor.pieces.len(), |piece| piece..piece + 1);
        let rows = |piece: usize| {
            (0..all).step_by(step).map(move |first| {
                Piece::Values(FloatRows {
                    tensor: index,
                    piece,
                    first,
                    count: step.min(all - first),
                })
            })
        };
        matrices.flat_map(rows).collect()
    }

    fn pieces_of(&self, index: usize) -> impl Iterator<Item = Piece> {
        let (linear, tensor) = (&self.plan.linears[index], self.tensor_of(index));
        let layout = self.plan.schemes[index]
            .as_ref()
            .map(|scheme| scheme.scheme.layout);
        let together = match (layout, tensor.rule.value) {
            (Some(layout), ValueRule::Copy) => rows_together(&layout, linear.rows),
            // Heads are put back in the checkpoint's order within a piece.
            _ => linear.rows.max(1),
        };
        let step = (PIECE_WEIGHTS / linear.columns.max(1))
            .max(1)
            .next_multiple_of(together);
        let all = linear.rows;
        (0..all).step_by(step).map(move |first| Piece::Linear {
            linear: index,
            first,
            rows: step.min(all - first),
        })
    }

    fn tensor_of(&self, linear: usize) -> &PlannedTensor {
        &self.plan.plan.tensors[self.plan.linears[linear].tensor]
    }

    fn verify(&self, scratch: &mut Scratch, written: &Written) -> Result<()> {
        let bytes = scratch.bytes(written.bytes);
        self.folder.read_at(written.shard, written.offset, bytes)?;
        if xxh3_64(bytes) != written.digest {
            let fault = Fault::new("does not read back as it was written")
                .in_file(&self.plan.shards[written.shard].name)
                .at(written.offset);
            let hint = "check the disk, then run the conversion again";
            return Err(Error::Verify(fault.hint(hint)));
        }
        self.progress.advance(bytes.len() as u64);
        Ok(())
    }
}

/// What belongs to what, found once.
struct Index {
    /// By tensor: shard and offset.
    places: HashMap<usize, (usize, u64)>,
    /// By linear: its tensors.
    parts: Vec<Vec<(usize, Role)>>,
    /// By checkpoint tensor: the planned tensor that it fills.
    planned: HashMap<usize, usize>,
}

impl Index {
    fn of(plan: &PackedPlan) -> Self {
        let shards = plan.shards.iter().enumerate();
        let places = shards.flat_map(|(shard, layout)| {
            let slots = layout.slots.iter();
            slots.map(move |(index, offset)| (*index, (shard, *offset)))
        });
        let mut parts = vec![Vec::new(); plan.linears.len()];
        for (index, tensor) in plan.tensors.iter().enumerate() {
            if let Content::Packed { linear, role } = tensor.content {
                parts[linear].push((index, role));
            }
        }
        let planned = plan.plan.tensors.iter().enumerate();
        let planned = planned.flat_map(|(index, tensor)| {
            let sources = tensor.pieces.iter().filter_map(|piece| match piece {
                sources::Piece::Tensor { source, .. } => Some(*source),
                sources::Piece::Packed(linear) => linear.positions().next(),
                sources::Piece::Zeros | sources::Piece::SecondScale(_) => None,
            });
            sources.map(move |source| (source, index))
        });
        Self {
            places: places.collect(),
            parts,
            planned: planned.collect(),
        }
    }
}

/// What the workers share.
struct Writer<'a> {
    job: &'a PackedJob<'a>,
    index: &'a Index,
    counters: &'a Counters,
    written: Mutex<Vec<Written>>,
}

impl Writer<'_> {
    fn piece(&self, buffers: &mut Buffers, piece: Piece) -> Result<()> {
        match piece {
            Piece::Copy {
                tensor,
                first,
                bytes,
            } => self.copy(&mut buffers.tile, tensor, first, bytes),
            Piece::Values(rows) => self.values(&mut buffers.tile, rows),
            Piece::Linear {
                linear,
                first,
                rows,
            } => self.linear(buffers, linear, first, rows),
        }
    }

    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let (shard, start) = self.index.places[&tensor];
        let offset = start + offset;
        self.job.folder.write_at(shard, offset, bytes)?;
        self.job.progress.advance(bytes.len() as u64);
        self.written
            .lock()
            .expect("no worker panics")
            .push(Written {
                shard,
                offset,
                bytes: bytes.len(),
                digest: xxh3_64(bytes),
            });
        Ok(())
    }

    fn copy(&self, scratch: &mut Scratch, tensor: usize, first: usize, count: usize) -> Result<()> {
        let Content::Copied { source } = self.job.plan.tensors[tensor].content else {
            return Ok(());
        };
        let entry = &self.job.checkpoint.tensors()[source];
        let bytes = scratch.bytes(count);
        self.job.checkpoint.read_at(entry, first, bytes)?;
        if let Some(planned) = self.index.planned.get(&source) {
            self.counters
                .count(*planned, nonfinite_in(entry.dtype, bytes), 0);
        }
        self.write(tensor, first as u64, bytes)
    }

    /// Rows of a float tensor whose values may not be those of the checkpoint: made where they are not, copied where they
    /// are.
    fn values(&self, scratch: &mut Scratch, rows: FloatRows) -> Result<()> {
        let tensor = &self.job.plan.tensors[rows.tensor];
        let Content::Values {
            tensor: planned,
            piece,
            source,
        } = tensor.content
        else {
            return Ok(());
        };
        let stored = &self.job.plan.plan.tensors[planned].stored;
        let before = match piece {
            Some(_) => 0,
            None => rows.piece * stored.rows,
        };
        let offset = (before + rows.first) * stored.columns * tensor.dtype.bytes();
        let entry = &self.job.checkpoint.tensors()[source];
        let (values, is_changed) = self.floats(scratch, planned, &rows)?;
        let mut bytes = vec![0; values.len() * tensor.dtype.bytes()];
        if is_changed || entry.dtype != tensor.dtype {
            let ty = match tensor.dtype {
                Dtype::F32 => GgmlType::F32,
                Dtype::F16 => GgmlType::F16,
                _ => GgmlType::BF16,
            };
            let overflows = quantize_rows(ty, values.len(), &values, None, &mut bytes).0;
            self.counters.count(planned, 0, overflows);
        } else {
            self.job.checkpoint.read_at(entry, offset, &mut bytes)?;
        }
        self.write(rows.tensor, offset as u64, &bytes)
    }

    /// Values in the checkpoint's order, and whether they are others than there.
    fn floats(
        &self,
        scratch: &mut Scratch,
        planned: usize,
        rows: &FloatRows,
    ) -> Result<(Vec<f32>, bool)> {
        let tensor = &self.job.plan.plan.tensors[planned];
        let tile = Tile::new(planned, rows.piece, rows.first, rows.count);
        let made = tile.make(self.job.checkpoint, tensor, scratch)?;
        let mut stored = vec![0.0; rows.count * tensor.stored.columns];
        dequantize(tensor.ty, made.bytes, &mut stored)?;
        self.counters.count(planned, made.nonfinite, 0);
        let Some(rounded) = self.job.rounded else {
            return Ok((in_checkpoint_order(tensor, &stored).into_owned(), false));
        };
        let has_absorbed = rounded.bias_absorption && is_bias_behind_ssm_in(&tensor.name);
        let rewritten = match rows.count < tensor.stored.rows {
            _ if has_absorbed => {
                let mut bytes = vec![0; tensor.bytes() as usize];
                rounded.workspace.read_at(&tensor.name, 0, &mut bytes)?;
                let mut values = vec![0.0; stored.len()];
                dequantize(tensor.ty, &bytes, &mut values)?;
                values
            }
            true => rounded
                .weights
                .rows(&tensor.name, rows.piece, rows.first, rows.count)?,
            false => rounded.weights.matrix(&tensor.name, rows.piece)?,
        };
        let is_changed = rewritten != stored;
        Ok((
            in_checkpoint_order(tensor, &rewritten).into_owned(),
            is_changed,
        ))
    }

    fn linear(&self, buffers: &mut Buffers, index: usize, first: usize, rows: usize) -> Result<()> {
        let plan = self.job.plan;
        let Some(scheme) = &plan.schemes[index] else {
            return Ok(());
        };
        let (linear, planned) = (&plan.linears[index], self.job.tensor_of(index));
        let row_bytes = scheme.grid.row_bytes(linear.columns);
        match self.job.rounded {
            Some(rounded) => {
                let integers = grown(&mut buffers.integers, rows * row_bytes);
                let at = (linear.piece * linear.rows + first) * row_bytes;
                let name = &planned.name;
                rounded.workspace.read_at(name, at as u64, integers)?;
            }
            None => self.nearest(buffers, index, first, rows)?,
        }
        let Buffers { integers, part, .. } = buffers;
        let parts = Rows {
            layout: &scheme.scheme.layout,
            grid: &scheme.grid,
            all_rows: linear.rows,
            columns: linear.columns,
            first,
            rows: &in_checkpoint_order(planned, &integers[..rows * row_bytes]),
        };
        for &(tensor, role) in &self.index.parts[index] {
            let belongs_to_all = matches!(role, Role::Shape | Role::GroupIndex | Role::InputScale);
            if belongs_to_all && first > 0 {
                continue;
            }
            let offset = match role {
                Role::InputScale => {
                    part.clear();
                    part.extend(self.input_scale(index, &scheme.scheme.inputs)?);
                    0
                }
                role => parts.part(role, part)?,
            };
            self.write(tensor, offset, part)?;
        }
        Ok(())
    }

    /// Integer rows of the checkpoint's weights, nearest codes, in `buffers.integers`.
    fn nearest(
        &self,
        buffers: &mut Buffers,
        index: usize,
        first: usize,
        rows: usize,
    ) -> Result<()> {
        let plan = self.job.plan;
        let (linear, tensor) = (&plan.linears[index], self.job.tensor_of(index));
        let grid = plan.schemes[index]
            .as_ref()
            .expect("the linear is quantized")
            .grid;
        let row_bytes = grid.row_bytes(linear.columns);
        let integers = grown(&mut buffers.integers, rows * row_bytes);
        // Where all of a matrix belongs together, its weights still need not lie beside each other as floats.
        let step = (PIECE_WEIGHTS / linear.columns.max(1)).max(1);
        for (index, integers) in integers.chunks_mut(step * row_bytes).enumerate() {
            let (first, rows) = (first + index * step, integers.len() / row_bytes);
            let tile = Tile::new(linear.tensor, linear.piece, first, rows);
            let made = tile.make(self.job.checkpoint, tensor, &mut buffers.tile)?;
            let values = grown(&mut buffers.values, rows * linear.columns);
            dequantize(tensor.ty, made.bytes, values)?;
            let nonfinite = made.nonfinite;
            let overflow = grid.quantize_rows(linear.columns, values, self.job.nearest, integers);
            self.counters.count(linear.tensor, nonfinite, overflow.0);
        }
        Ok(())
    }

    /// The scale of static inputs, BF16.
    fn input_scale(&self, index: usize, inputs: &Inputs) -> Result<[u8; 2]> {
        let name = &self.job.tensor_of(index).name;
        let outcomes = self
            .job
            .rounded
            .iter()
            .flat_map(|rounded| rounded.workspace.outcomes());
        let clip = self.job.rounded.map(|rounded| rounded.clip);
        let largest = outcomes
            .filter(|outcome| outcome.tensor == *name)
            .find_map(|outcome| match clip {
                Some(ActivationClip::Mse) => outcome.input_clip.or(outcome.largest_input),
                _ => outcome.largest_input,
            });
        let Some(largest) = largest.filter(|_| *inputs == Inputs::Int8PerTensor) else {
            let fault = Fault::new("static inputs need a scale, which only a calibration gives")
                .in_tensor(name);
            return Err(Error::Plan(
                fault.hint("name a text with `--calibration`, or choose w8a8"),
            ));
        };
        let scale = half::bf16::from_f32(largest / INPUT_STEPS as f32);
        Ok(scale.to_le_bytes())
    }
}

/// Rows of a matrix, those of interleaved heads put back where the checkpoint has them.
fn in_checkpoint_order<'a, T: Copy + Default>(
    tensor: &PlannedTensor,
    rows: &'a [T],
) -> Cow<'a, [T]> {
    if tensor.rule.value == ValueRule::Copy {
        return Cow::Borrowed(rows);
    }
    let length = rows.len() / tensor.stored.rows.max(1);
    let mut ordered = vec![T::default(); rows.len()];
    for (row, from) in rows.chunks_exact(length).enumerate() {
        let to = source_row(tensor, row) * length;
        ordered[to..to + length].copy_from_slice(from);
    }
    Cow::Owned(ordered)
}
