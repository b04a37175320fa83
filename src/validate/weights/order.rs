//! Whether rows or experts that are wrong where they are would be right elsewhere.
//!
//! Enters: a tensor with rows that are nothing like the reference's. Leaves: where those rows come from. Rows are known
//! by random projections, of which a few words per row are kept.

use std::collections::BTreeMap;

use super::statistics::{At, Statistics};
use super::{Job, Pair};
use crate::error::Result;

/// Projections of one row: cosines between signatures are those of the rows, give or take 1 / sqrt(32).
type Signature = [f32; 32];
/// Two rows are the same if their signatures agree so well; unrelated rows do by a chance of 1 in 10^6.
const SAME: f32 = 0.85;
/// Enough for a row whose neighbour is known.
const ALIKE: f32 = 0.5;
/// And for one some rows further.
const ALIKE_BEYOND_GAP: f32 = 0.75;
/// A row that comes from elsewhere is that much nearer to its source than to its place, in squared distance.
const MIN_GAIN: f32 = 2.0;
/// Rows in a run that rounding made unrecognizable.
const MAX_GAP: usize = 16;
/// Rows of an expert by which it is known.
const ROWS_OF_EXPERT: usize = 64;
/// Matrices of a stack whose rows are searched.
const MAX_MATRICES: usize = 4;
/// Shorter rows have no signature to speak of.
const MIN_COLUMNS: usize = 8;
/// Rows whose signatures are kept; the largest vocabularies have half as many.
const MAX_ROWS: usize = 1 << 19;
/// Wrong rows that are searched for.
const MAX_QUERIES: usize = 2048;

/// Rows `at..at + count` of one matrix hold rows `from..` of the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub matrix: usize,
    pub at: usize,
    pub from: usize,
    pub count: usize,
}

/// Where wrong values come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Whole matrices: (expert, the expert of the reference that it holds).
    Experts(Vec<(usize, usize)>),
    /// Rows.
    Rows(Vec<Run>),
    /// They match no rows of the reference.
    Unknown,
}

/// Looks for the wrong rows of `statistics` among the rows of the reference.
pub fn find(job: &Job, pair: &Pair, statistics: &Statistics) -> Result<Order> {
    if pair.ours.columns < MIN_COLUMNS || pair.ours.rows > MAX_ROWS {
        return Ok(Order::Unknown);
    }
    let wrong: Vec<usize> = wrong_matrices(statistics);
    if job.tensor.matrices > 1 && !wrong.is_empty() {
        let experts = experts(job, pair, &wrong)?;
        if 2 * experts.len() > wrong.len() {
            return Ok(Order::Experts(experts));
        }
    }
    let mut by_matrix: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for at in &statistics.bad_rows {
        by_matrix.entry(at.matrix).or_default().push(at.row);
    }
    let (mut runs, mut sought, mut matched) = (Vec::new(), 0, 0);
    for (matrix, mut rows) in by_matrix.into_iter().take(MAX_MATRICES) {
        rows.truncate(MAX_QUERIES);
        sought += rows.len();
        let found = rows_of(job, pair, matrix, &rows)?;
        let inside = |row: &&usize| {
            let holds = |run: &Run| (run.at..run.at + run.count).contains(*row);
            found.iter().any(holds)
        };
        matched += rows.iter().filter(inside).count();
        runs.extend(found);
    }
    Ok(match 2 * matched > sought {
        true => Order::Rows(runs),
        false => Order::Unknown,
    })
}

/// Matrices more than half of whose weight is error.
fn wrong_matrices(statistics: &Statistics) -> Vec<usize> {
    let matrices = statistics.matrices.iter().enumerate();
    matrices
        .filter(|(_, sums)| sums.artifact2 > 0.0 && sums.error2 > 0.5 * sums.reference2)
        .map(|(matrix, _)| matrix)
        .collect()
}

fn experts(job: &Job, pair: &Pair, wrong: &[usize]) -> Result<Vec<(usize, usize)>> {
    let rows = pair.ours.rows.min(ROWS_OF_EXPERT);
    let signatures = |ours: bool, matrix: usize| -> Result<Vec<Signature>> {
        signatures(job, pair, ours, matrix, rows)
    };
    let mut reference = Vec::with_capacity(job.tensor.matrices);
    for matrix in 0..job.tensor.matrices {
        reference.push(signatures(false, matrix)?);
    }
    let mut found = Vec::new();
    for &expert in wrong {
        let own = signatures(true, expert)?;
        let mean = |other: &Vec<Signature>| {
            let cosines = own.iter().zip(other).map(|(a, b)| cosine(a, b));
            cosines.sum::<f32>() / rows.max(1) as f32
        };
        let best = (0..reference.len())
            .map(|index| (index, mean(&reference[index])))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((from, agreement)) = best
            && from != expert
            && agreement > SAME
        {
            found.push((expert, from));
        }
    }
    Ok(found)
}

fn rows_of(job: &Job, pair: &Pair, matrix: usize, wrong: &[usize]) -> Result<Vec<Run>> {
    let own = signatures(job, pair, true, matrix, pair.ours.rows)?;
    let reference = signatures(job, pair, false, matrix, pair.ours.rows)?;
    let search = Search { own, reference };
    let mut runs: Vec<Run> = Vec::new();
    for &row in wrong {
        let free = runs.last().map_or(0, |run| run.at + run.count);
        if row < free {
            continue;
        }
        if let Some(from) = search.find(row) {
            runs.push(search.run(matrix, row, from, free));
        }
    }
    Ok(runs)
}

/// Rows of both sides.
struct Search {
    own: Vec<Signature>,
    reference: Vec<Signature>,
}

impl Search {
    /// The row of the reference that a row holds, if it is another.
    fn find(&self, row: usize) -> Option<usize> {
        let agreement = |from: usize| (from, cosine(&self.own[row], &self.reference[from]));
        let all = (0..self.reference.len()).map(agreement);
        let (from, agreement) = all.max_by(|a, b| a.1.total_cmp(&b.1))?;
        (from != row && agreement > SAME && self.explains(row, from)).then_some(from)
    }

    /// Whether a row of the reference leaves far less of `row` over than the one that belongs there. Where a few columns
    /// outweigh the rest, all rows are alike, and what coarse rounding makes of one may lean towards any of them.
    fn explains(&self, row: usize, from: usize) -> bool {
        let left_over = |from: usize| distance2(&self.own[row], &self.reference[from]);
        MIN_GAIN * left_over(from) < left_over(row)
    }

    /// The neighbours that came along, down to row `free`.
    fn run(&self, matrix: usize, row: usize, from: usize, free: usize) -> Run {
        let moved = |row: usize, from: usize, alike: f32| {
            let Some((own, source)) = self.own.get(row).zip(self.reference.get(from)) else {
                return false;
            };
            cosine(own, source) > cosine(own, &self.reference[row]).max(alike)
        };
        let mut run = Run {
            matrix,
            at: row,
            from,
            count: 1,
        };
        while run.at > free && run.from > 0 && moved(run.at - 1, run.from - 1, ALIKE) {
            (run.at, run.from, run.count) = (run.at - 1, run.from - 1, run.count + 1);
        }
        let after = |run: &Run, gap: usize| {
            let (row, from) = (run.at + run.count + gap, run.from + run.count + gap);
            moved(row, from, if gap == 0 { ALIKE } else { ALIKE_BEYOND_GAP })
        };
        while let Some(gap) = (0..MAX_GAP).find(|gap| after(&run, *gap)) {
            run.count += gap + 1;
        }
        run
    }
}

/// Signatures of the first `rows` rows of one matrix, of either side.
fn signatures(
    job: &Job,
    pair: &Pair,
    ours: bool,
    matrix: usize,
    rows: usize,
) -> Result<Vec<Signature>> {
    let (model, tensor) = match ours {
        true => (job.artifact, job.tensor),
        false => (pair.reference, pair.tensor),
    };
    let step = (super::TILE_WEIGHTS / tensor.columns.max(1)).max(1);
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    let mut signatures = Vec::with_capacity(rows);
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        values.resize(count * tensor.columns, 0.0);
        model.dequantize_rows(tensor, matrix, first, &mut bytes, &mut values)?;
        let rows = values.chunks_exact(tensor.columns);
        signatures.extend(rows.map(|row| signature(&row[..pair.ours.columns])));
    }
    Ok(signatures)
}

/// Each column adds its value with signs that depend on the column alone.
fn signature(row: &[f32]) -> Signature {
    let mut sums = [0f32; 32];
    for (column, value) in row.iter().enumerate() {
        let signs = signs(column as u64);
        let value = if value.is_finite() { *value } else { 0.0 };
        for (bit, sum) in sums.iter_mut().enumerate() {
            *sum += if signs >> bit & 1 == 1 { value } else { -value };
        }
    }
    sums
}

/// SplitMix64 of the column (Steele, Lea and Flood, OOPSLA 2014).
fn signs(column: u64) -> u64 {
    let z = column.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn distance2(a: &Signature, b: &Signature) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

fn cosine(a: &Signature, b: &Signature) -> f32 {
    let dot = |a: &Signature, b: &Signature| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    match (dot(a, a) * dot(b, b)).sqrt() {
        0.0 => 0.0,
        norms => dot(a, b) / norms,
    }
}

/// The first row of a run, as a place.
pub fn place(run: &Run) -> At {
    At {
        matrix: run.matrix,
        row: run.at,
        column: 0,
    }
}
