//! Sums of outer products of gradients at the outputs of matrices.

use std::collections::BTreeMap;
use std::ops::Range;

use super::block::OutputObserver;
use super::matrix::Matrix;
use crate::backend::cpu::kernels::Isa;
use crate::calibrate::cells::{Merge, Tree};
use crate::calibrate::second_moments::SecondMoments;

/// Most rows whose second moments are collected together: above it, squares of `out_features` are out of proportion to
/// the weights.
pub const MAX_BLOCK_ROWS: usize = 4096;

/// Second moments of the gradient at consecutive outputs of a matrix: one diagonal block of all of them.
#[derive(Debug, Clone, PartialEq)]
pub struct RowBlock {
    /// Which outputs, which are rows of the matrix; [`MAX_BLOCK_ROWS`] at most.
    pub rows: Range<usize>,
    /// `sum of g g^T` over tokens, `[rows, rows]`.
    pub moments: SecondMoments,
}

/// The blocks of a matrix, in order; every row is in one. What lies between blocks is not collected.
#[derive(Debug, Clone, PartialEq)]
pub struct RowBlocks(pub Vec<RowBlock>);

impl RowBlocks {
    /// Of gradients `[tokens, out_features]`.
    pub fn of(gradient: &[f32], out_features: usize) -> Self {
        let block = |rows: Range<usize>| {
            let mut moments = SecondMoments::empty(rows.len());
            let columns = columns(gradient, out_features, rows.clone());
            moments.add(Isa::detect(), &columns);
            RowBlock { rows, moments }
        };
        Self(cut(out_features).map(block).collect())
    }
}

impl Merge for RowBlocks {
    fn merge(&mut self, later: Self) {
        for (block, later) in self.0.iter_mut().zip(later.0) {
            block.moments.merge(later.moments);
        }
    }
}

/// Which rows form the blocks.
fn cut(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let firsts = (0..rows).step_by(MAX_BLOCK_ROWS);
    firsts.map(move |first| first..rows.min(first + MAX_BLOCK_ROWS))
}

/// Bytes of the second moments of one matrix.
pub fn bytes_of(out_features: usize) -> u64 {
    let squares = cut(out_features).map(|rows| (rows.len() * rows.len()) as u64);
    size_of::<f64>() as u64 * squares.sum::<u64>()
}

fn columns(values: &[f32], stride: usize, range: Range<usize>) -> Vec<f32> {
    let rows = values.chunks_exact(stride);
    rows.flat_map(|row| &row[range.clone()]).copied().collect()
}

/// Sums up what it is shown, one call per matrix and cell.
#[derive(Default)]
pub struct Collector {
    trees: BTreeMap<(String, usize), Tree<RowBlocks>>,
}

impl Collector {
    /// By tensor and matrix.
    pub fn finish(self) -> impl Iterator<Item = ((String, usize), RowBlocks)> {
        let trees = self.trees.into_iter();
        trees.filter_map(|(key, tree)| Some((key, tree.finish()?)))
    }
}

impl OutputObserver for Collector {
    fn output(&mut self, matrix: &Matrix, index: usize, _: &[f32], gradient: &[f32]) {
        let key = (matrix.name().to_string(), index);
        let found = RowBlocks::of(gradient, matrix.out_features());
        self.trees.entry(key).or_default().push(found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_matrices_are_cut() {
        let wide = MAX_BLOCK_ROWS + 2;
        let mut gradient = vec![0.0; 2 * wide];
        (
            gradient[0],
            gradient[MAX_BLOCK_ROWS],
            gradient[MAX_BLOCK_ROWS + 1],
        ) = (2.0, 3.0, 5.0);
        let found = RowBlocks::of(&gradient, wide);
        let rows: Vec<_> = found.0.iter().map(|block| block.rows.clone()).collect();
        assert_eq!(rows, [0..MAX_BLOCK_ROWS, MAX_BLOCK_ROWS..wide]);
        assert_eq!(found.0[0].moments.sums[..2], [4.0, 0.0]);
        assert_eq!(found.0[1].moments.sums[..2], [9.0, 15.0]);
        assert_eq!(found.0[1].moments.tokens, 2);
        let held: usize = found
            .0
            .iter()
            .map(|block| 8 * block.moments.sums.len())
            .sum();
        assert_eq!(bytes_of(wide), held as u64);
    }
}
