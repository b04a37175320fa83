//! The spine: every tensor of a plan, tile by tile, from the checkpoint to its place in the artifact.
//!
//! Enters: an open checkpoint, a [`Plan`], an [`Artifact`] with all offsets known. Leaves: written and re-read
//! bytes, [`Summary`]. Tiles are independent of each other and of who computes them, so any number of threads gives
//! the same bytes; memory holds one tile per thread.

pub mod calibrated;
mod exact;
pub mod packed;
pub(crate) mod tile;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nemoconv_formats::checkpoint::Checkpoint;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Fault, Result};
use crate::plan::Plan;
use crate::write::gguf::artifact::Artifact;
use crate::write::gguf::parts::Slot;
use calibrated::workspace::Workspace;
use tile::{Made, Scratch, Tile, tiles};

/// Told how far the work is, in stored bytes. Called from several threads.
pub trait Progress: Sync {
    /// A stage of `total_bytes` begins.
    fn begin(&self, stage: &str, total_bytes: u64);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
    /// The stage is over.
    fn end(&self);
}

/// What the user allows and how many hands there are.
#[derive(Debug, Clone, Copy)]
pub struct Conduct {
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Write NaN and infinite weights as they are.
    pub allow_nonfinite: bool,
    /// Write infinities where a value or scale does not fit F16.
    pub allow_overflow: bool,
}

/// Values a tensor should not have had.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Oddities {
    /// GGUF name.
    pub tensor: String,
    /// NaN and infinite weights in the checkpoint.
    pub nonfinite: u64,
    /// Values or scales too large for F16.
    pub overflows: u64,
    /// Rows of a packed source that were rounded again because F16 does not hold their scales.
    pub rounded_rows: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// Tensors with values they should not have had, in file order.
    pub oddities: Vec<Oddities>,
}

/// Estimate of the peak memory of [`convert`], bytes.
pub fn peak_bytes(plan: &Plan, threads: usize) -> u64 {
    let tiles = plan
        .tensors
        .iter()
        .map(Scratch::bytes_for)
        .max()
        .unwrap_or(0);
    let importance: usize = plan
        .tensors
        .iter()
        .filter_map(|t| t.importance.as_ref())
        .map(Vec::len)
        .sum();
    (tiles * threads + 4 * importance) as u64
}

/// Writes every tensor and reads everything back; the caller publishes the artifact. Tensors that `finished` holds are
/// taken from there, all others are made from the checkpoint.
///
/// # Errors
/// Weights that are refused (all of them are counted first), writes that fail, bytes that do not read back,
/// a raised `stop`.
#[allow(
    clippy::too_many_arguments,
    reason = "what goes in, what comes out, and who looks on"
)]
pub fn convert(
    checkpoint: &Checkpoint,
    plan: &Plan,
    finished: Option<&Workspace>,
    artifact: &Artifact,
    slots: &[Slot],
    conduct: Conduct,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Summary> {
    let tiles = tiles(plan);
    let digests: Vec<AtomicU64> = tiles.iter().map(|_| AtomicU64::new(0)).collect();
    let counters = Counters::new(plan.tensors.len());
    counters.add_outcomes(plan, finished);
    let job = Job {
        checkpoint,
        plan,
        finished,
        artifact,
        slots,
        tiles: &tiles,
        digests: &digests,
        progress,
    };

    progress.begin("writing", plan.tensor_bytes());
    in_parallel(conduct.threads, tiles.len(), stop, |scratch, index| {
        job.write(scratch, index, &counters)
    })?;
    progress.end();
    let summary = counters.summary(plan);
    refuse(&summary, conduct)?;

    artifact.sync()?;
    progress.begin("verifying", plan.tensor_bytes());
    in_parallel(conduct.threads, tiles.len(), stop, |scratch, index| {
        job.verify(scratch, index)
    })?;
    progress.end();
    Ok(summary)
}

/// Everything the workers share.
struct Job<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    finished: Option<&'a Workspace>,
    artifact: &'a Artifact<'a>,
    slots: &'a [Slot],
    tiles: &'a [Tile],
    /// Of each tile as it was sent to the disk.
    digests: &'a [AtomicU64],
    progress: &'a dyn Progress,
}

impl Job<'_> {
    fn write(&self, scratch: &mut Scratch, index: usize, counters: &Counters) -> Result<()> {
        let tile = self.tiles[index];
        let tensor = &self.plan.tensors[tile.tensor];
        let made = match self
            .finished
            .filter(|finished| finished.is_finished(&tensor.name))
        {
            Some(finished) => {
                let bytes = scratch.bytes(tile.rows * tensor.row_bytes());
                finished.read_at(&tensor.name, tile.offset(tensor), bytes)?;
                Made {
                    bytes,
                    nonfinite: 0,
                    overflows: 0,
                    rounded_rows: 0,
                }
            }
            None => tile.make(self.checkpoint, tensor, scratch)?,
        };
        counters.count(tile.tensor, made.nonfinite, made.overflows);
        counters.rounded_rows[tile.tensor].fetch_add(made.rounded_rows, Ordering::Relaxed);
        self.digests[index].store(xxh3_64(made.bytes), Ordering::Relaxed);
        let slot = self.slots[tile.tensor];
        self.artifact
            .write_at(slot.part, slot.offset + tile.offset(tensor), made.bytes)?;
        self.progress.advance(made.bytes.len() as u64);
        Ok(())
    }

    fn verify(&self, scratch: &mut Scratch, index: usize) -> Result<()> {
        let tile = self.tiles[index];
        let tensor = &self.plan.tensors[tile.tensor];
        let slot = self.slots[tile.tensor];
        let bytes = scratch.bytes(tile.rows * tensor.row_bytes());
        self.artifact
            .read_at(slot.part, slot.offset + tile.offset(tensor), bytes)?;
        if xxh3_64(bytes) != self.digests[index].load(Ordering::Relaxed) {
            let fault = Fault::new("does not read back as it was written").in_tensor(&tensor.name);
            return Err(Error::Verify(
                fault.hint("check the disk, then run the conversion again"),
            ));
        }
        self.progress.advance(bytes.len() as u64);
        Ok(())
    }
}

/// Hands numbers below `count` to threads until all are done, one fails or `stop` is raised.
fn in_parallel<S: Default>(
    threads: usize,
    count: usize,
    stop: &AtomicBool,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let worker = || {
        let mut scratch = S::default();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            let result = match stop.load(Ordering::Relaxed) {
                true => Err(Error::Interrupted),
                false => work(&mut scratch, index),
            };
            if let Err(error) = result {
                next.store(count, Ordering::Relaxed);
                failure
                    .lock()
                    .expect("no worker panics")
                    .get_or_insert(error);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(worker);
        }
        worker();
    });
    failure
        .into_inner()
        .expect("no worker panics")
        .map_or(Ok(()), Err)
}

/// Per tensor, added to by all threads.
struct Counters {
    nonfinite: Vec<AtomicU64>,
    overflows: Vec<AtomicU64>,
    rounded_rows: Vec<AtomicU64>,
}

impl Counters {
    fn new(tensors: usize) -> Self {
        let zeros = || (0..tensors).map(|_| AtomicU64::new(0)).collect();
        Self {
            nonfinite: zeros(),
            overflows: zeros(),
            rounded_rows: zeros(),
        }
    }

    /// More of a tensor.
    fn count(&self, tensor: usize, nonfinite: u64, overflows: u64) {
        self.nonfinite[tensor].fetch_add(nonfinite, Ordering::Relaxed);
        self.overflows[tensor].fetch_add(overflows, Ordering::Relaxed);
    }

    /// What was counted when finished tensors were made.
    fn add_outcomes(&self, plan: &Plan, finished: Option<&Workspace>) {
        for outcome in finished.iter().flat_map(|finished| finished.outcomes()) {
            let Some(index) = plan
                .tensors
                .iter()
                .position(|tensor| tensor.name == outcome.tensor)
            else {
                continue;
            };
            self.count(index, outcome.nonfinite, outcome.overflows);
        }
    }

    fn summary(self, plan: &Plan) -> Summary {
        let counts = self.nonfinite.into_iter().zip(self.overflows);
        let counts = counts.zip(self.rounded_rows);
        let oddities = plan.tensors.iter().zip(counts).map(
            |(tensor, ((nonfinite, overflows), rounded_rows))| Oddities {
                tensor: tensor.name.clone(),
                nonfinite: nonfinite.into_inner(),
                overflows: overflows.into_inner(),
                rounded_rows: rounded_rows.into_inner(),
            },
        );
        Summary {
            oddities: oddities
                .filter(|odd| odd.nonfinite + odd.overflows + odd.rounded_rows > 0)
                .collect(),
        }
    }
}

/// Refuses weights that are not numbers, then those that do not fit, unless the user allows them.
fn refuse(summary: &Summary, conduct: Conduct) -> Result<()> {
    let check = |count: fn(&Oddities) -> u64, what: &str, flag: &str| {
        let odd: Vec<_> = summary
            .oddities
            .iter()
            .filter(|odd| count(odd) > 0)
            .collect();
        let Some(first) = odd.first() else {
            return Ok(());
        };
        let total: u64 = odd.iter().map(|odd| count(odd)).sum();
        let what = format!(
            "has {} {what}; {total} in {} tensors",
            count(first),
            odd.len()
        );
        Err(Error::Weights(
            Fault::new(what)
                .in_tensor(&first.tensor)
                .hint(format!("`{flag}` writes them all the same")),
        ))
    };
    if !conduct.allow_nonfinite {
        check(
            |odd| odd.nonfinite,
            "NaN or infinite weights",
            "--allow-nonfinite",
        )?;
    }
    if !conduct.allow_overflow && !conduct.allow_nonfinite {
        check(
            |odd| odd.overflows,
            "values or scales too large for F16",
            "--allow-f16-overflow",
        )?;
    }
    Ok(())
}
