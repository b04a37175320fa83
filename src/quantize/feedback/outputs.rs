//! Feedback between rows: errors of rows already rounded are repaired by those to come, as far as the rest of the network
//! takes one output for another.
//!
//! Enters: `G = E[g g^T]`, second moments of the gradients at a matrix's outputs. Leaves: how much of an error in row i row
//! r repairs. With M of the inputs the loss is `tr(G E M E^T)`.
//!
//! Source: YAQA, arXiv:2505.22988, the two-sided form of LDLQ. We depart from it: rows go in blocks, so that the lanes of a
//! block stay independent; the rows of a block lie far apart in the matrix, where gradients have little in common.

use super::cholesky::factor;
use super::moments::Damping;
use super::sweep::ROWS;
use crate::backend::cpu::gram::{CHUNK_ROWS, Columns, products};
use crate::backend::cpu::kernels::Isa;

/// Blocks that a matrix is cut into at least, if its rows are many enough.
const BLOCKS: usize = 64;
/// Most rows of a block: what there is for threads to share.
const MAX_BLOCK_ROWS: usize = 256;

/// Second moments of output gradients, factored: of consecutive rows of a matrix.
#[derive(Debug, Clone)]
pub struct OutputFactor {
    /// Which row comes when.
    order: Vec<usize>,
    /// `[row that was rounded][row that repairs]`, both by when they come.
    feedback: Vec<f32>,
    block_rows: usize,
}

impl OutputFactor {
    /// Prepares `matrix`, `[n, n]` symmetric, of which the part with column >= row is read.
    ///
    /// Gives `None` where it holds values that are no numbers, is zero, or is not positive definite with any damping.
    pub fn new(isa: Isa, n: usize, matrix: &[f64], damping: Damping) -> Option<Self> {
        assert_eq!(matrix.len(), n * n);
        let unit = (0..n).map(|i| matrix[i * n + i]).sum::<f64>() / n as f64;
        if !(unit.is_finite() && unit > 0.0) {
            return None;
        }
        let block_rows = (n / BLOCKS)
            .next_multiple_of(ROWS)
            .clamp(ROWS, MAX_BLOCK_ROWS);
        let order = strided(n, n.div_ceil(block_rows));
        let value = |a: usize, b: usize, damping: f64| {
            let (i, j) = (order[a].min(order[b]), order[a].max(order[b]));
            let share = matrix[i * n + j] / unit;
            (share + if i == j { damping } else { 0.0 }) as f32
        };
        let mut tried = damping.first;
        loop {
            if let Some(factor) = factor(isa, n, |a, b| value(a, b, tried)) {
                let at = |at: usize| factor.feedback.at(at / n, at % n);
                return Some(Self {
                    feedback: (0..n * n).map(at).collect(),
                    block_rows,
                    order,
                });
            }
            if tried >= damping.last {
                return None;
            }
            tried = (tried * 10.0).max(1e-6);
        }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.order.len()
    }

    /// Rows in the order in which they are rounded, block after block.
    pub fn blocks(&self) -> impl Iterator<Item = &[usize]> {
        self.order.chunks(self.block_rows)
    }

    /// What rows `first..first + count`, by when they come, repair of the errors `[first, columns]` of all before them:
    /// `[count, columns]`.
    pub fn repairs(
        &self,
        isa: Isa,
        first: usize,
        count: usize,
        errors: &[f32],
        columns: usize,
    ) -> Vec<f32> {
        let mut out = vec![0.0; count * columns];
        let feedback = Columns {
            values: &self.feedback,
            stride: self.rows(),
            range: first..first + count,
        };
        let errors = Columns {
            values: errors,
            stride: columns,
            range: 0..columns,
        };
        for begin in (0..first).step_by(CHUNK_ROWS) {
            let rows = begin..(begin + CHUNK_ROWS).min(first);
            let add = |out: &mut f32, sum: f32| *out += sum;
            products(isa, rows, &errors, &feedback, false, &mut out, columns, add);
        }
        out
    }
}

/// `0..n` such that each of `blocks` runs holds numbers far apart.
fn strided(n: usize, blocks: usize) -> Vec<usize> {
    let blocks = blocks.max(1);
    (0..blocks)
        .flat_map(|first| (first..n).step_by(blocks))
        .collect()
}
