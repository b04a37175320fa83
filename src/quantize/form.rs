//! What the bytes of a stored matrix are: blocks of a ggml type, or integer rows.
//!
//! Enters: rows and what is known of their inputs. Leaves: bytes, and the weights that bytes stand for. One word for both
//! families of artifacts, so that calibration knows neither.

use std::fmt;

use super::feedback::{self, Feedback, Rounded, RowProducts};
use super::integer::{IntegerGrid, Nearest};
use super::{ScaleOverflow, is_searched, quantize_rows};
use crate::backend::cpu::kernels::Isa;
use crate::formats::{GgmlType, Result, block};

/// How a matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Blocks of a ggml type.
    Block(GgmlType),
    /// Integer rows.
    Integer(IntegerGrid),
}

impl Form {
    /// Bytes of a row.
    pub fn row_bytes(&self, columns: usize) -> usize {
        match self {
            Self::Block(ty) => columns / ty.block_elements() * ty.block_bytes(),
            Self::Integer(grid) => grid.row_bytes(columns),
        }
    }

    /// Bits per weight in the artifact.
    pub fn bits_per_weight(&self, columns: usize) -> f64 {
        match self {
            Self::Block(ty) => ty.bits_per_weight(),
            Self::Integer(grid) => grid.bits_per_weight(columns),
        }
    }

    /// Whether codes are chosen: false for floats.
    pub fn is_searched(&self) -> bool {
        match self {
            Self::Block(ty) => is_searched(*ty),
            Self::Integer(_) => true,
        }
    }

    /// Whether [`Self::feed_back`] knows the form of such rows.
    pub fn can_feed_back(&self, columns: usize) -> bool {
        match self {
            Self::Block(ty) => feedback::can_feed_back(*ty),
            Self::Integer(grid) => feedback::can_feed_back_integers(grid, columns),
        }
    }

    /// Rounds whole rows to the grid that the search finds, errors weighted by `importance` where the form's search knows
    /// weights.
    pub fn nearest(
        &self,
        columns: usize,
        rows: &[f32],
        importance: Option<&[f32]>,
    ) -> (Vec<u8>, ScaleOverflow) {
        let mut bytes = vec![0; rows.len() / columns * self.row_bytes(columns)];
        let overflow = match self {
            Self::Block(ty) => quantize_rows(*ty, columns, rows, importance, &mut bytes),
            Self::Integer(grid) => {
                grid.quantize_rows(columns, rows, Nearest::ToStoredScale, &mut bytes)
            }
        };
        (bytes, overflow)
    }

    /// Rounds whole rows with error feedback.
    pub fn feed_back(&self, isa: Isa, rows: &[f32], how: Feedback) -> (Vec<u8>, Rounded) {
        let columns = how.moments.in_features();
        let mut bytes = vec![0; rows.len() / columns * self.row_bytes(columns)];
        let rounded = match self {
            Self::Block(ty) => feedback::quantize_rows(isa, *ty, rows, how, &mut bytes),
            Self::Integer(grid) => feedback::quantize_integers(isa, *grid, rows, how, &mut bytes),
        };
        (bytes, rounded)
    }

    /// The same, with products of errors on another machine.
    ///
    /// # Errors
    /// The machine fails.
    pub fn feed_back_on(
        &self,
        machine: &dyn RowProducts,
        rows: &[f32],
        how: Feedback,
    ) -> crate::error::Result<(Vec<u8>, Rounded)> {
        let columns = how.moments.in_features();
        let mut bytes = vec![0; rows.len() / columns * self.row_bytes(columns)];
        let rounded = match self {
            Self::Block(ty) => feedback::quantize_rows_on(machine, *ty, rows, how, &mut bytes),
            Self::Integer(grid) => {
                feedback::quantize_integers_on(machine, *grid, rows, how, &mut bytes)
            }
        };
        Ok((bytes, rounded?))
    }

    /// The weights that bytes stand for, into `out`.
    ///
    /// # Errors
    /// A ggml type that cannot be decoded.
    pub fn dequantize(&self, columns: usize, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        match self {
            Self::Block(ty) => block::dequantize(*ty, bytes, out),
            Self::Integer(grid) => {
                grid.dequantize(columns, bytes, out);
                Ok(())
            }
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(ty) => f.pad(ty.name()),
            Self::Integer(grid) => grid.fmt(f),
        }
    }
}
