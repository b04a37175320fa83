//! A machine that mixes rows and columns of matrices in f64: nearly all of the work of rewriting.
//!
//! Enters: a stored matrix, what mixes its axes. Leaves: parts of the mixed matrix, with the bits that this computer would
//! give them. Knows no order of channels and no network.

use std::ops::Range;

use super::matrix::SquareMatrix;
use crate::error::Result;

/// What becomes of a matrix: `Q_r^T (diag(b_r) (values (diag(b_c) Q_c diag(a_c))))`, each Q the same for every run of its size.
pub struct Mixing<'a> {
    /// `[rows, columns]`; of rows that are mixed, whole runs.
    pub values: &'a [f32],
    /// What mixes columns, if anything does.
    pub columns: Option<&'a SquareMatrix>,
    /// A factor of every column before.
    pub columns_before: Vec<f64>,
    /// A factor of every column after.
    pub columns_after: Vec<f64>,
    /// What mixes rows, if anything does, and a factor of every row before.
    pub rows: Option<(&'a SquareMatrix, Vec<f64>)>,
}

impl Mixing<'_> {
    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        let columns = self.columns_before.len();
        [self.values.len() / columns.max(1), columns]
    }

    /// Rows and columns that are mixed with each other: a part has whole multiples of both.
    pub fn runs(&self) -> [usize; 2] {
        let rows = self.rows.as_ref().map(|(rows, _)| *rows);
        [rows, self.columns].map(|matrix| matrix.map_or(1, SquareMatrix::size))
    }
}

/// Some rows and columns of a mixed matrix.
pub struct MixedPart {
    /// Which rows.
    pub rows: Range<usize>,
    /// Which columns.
    pub columns: Range<usize>,
    /// `[rows, columns]`.
    pub values: Vec<f64>,
}

/// A machine that mixes matrices of finite values as this computer would: each sum in index order, nothing fused.
pub trait Mixer: Send + Sync {
    /// Gives every part of the mixed matrix once; `false` where there is no room for them, and this computer mixes, whatever
    /// was given before.
    ///
    /// # Errors
    /// The machine fails.
    fn mix(&self, mixing: &Mixing, take: &mut dyn FnMut(MixedPart)) -> Result<bool>;

    /// `a [_, size]` times `b`; nothing where there is no room for it.
    ///
    /// # Errors
    /// The machine fails.
    fn product(&self, a: &[f64], b: &SquareMatrix) -> Result<Option<Vec<f64>>>;
}
