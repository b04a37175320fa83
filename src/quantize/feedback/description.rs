//! A grid in plain numbers: what a machine has to know that runs the sweep and the descent itself.

use super::super::affine::AffineGrid;
use super::super::integer::ScaleFloat;
use super::super::super_block::Sweep;
use super::super::symmetric::{CodeValues, SymmetricGrid};
use super::grid::Lattice;

/// What tells the grids of error feedback apart, in plain numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GridDescription {
    /// Values of codes.
    pub values: CodeValues,
    /// Value of the first code.
    pub first: f32,
    /// Value of the last code.
    pub last: f32,
    /// Columns that share scales.
    pub sub: usize,
    /// How scales are found.
    pub search: Search,
    /// How they move afterwards.
    pub lattice: Lattice,
}

/// How the scales of a sub-block are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Search {
    /// The largest weight at values around the first and around the last.
    Ends(Sweep, Sweep),
    /// Around the best scale and minimum: relative changes of the scale, changes of the minimum in steps.
    Lines(Sweep, Sweep),
    /// Powers of two.
    Powers,
    /// Multiples of two factors.
    Affine(AffineGrid),
    /// Multiples of one factor: so many beside the nearest one, of either sign.
    Symmetric(SymmetricGrid, u32),
    /// Floats of either sign, relative to the one whose codes just reach the larger side.
    Magnitudes(Sweep, ScaleFloat),
    /// Floats relative to the one whose codes just span the range, with three zero points each.
    Ranges(Sweep, ScaleFloat),
    /// Chosen before the first pass, on the weights themselves.
    Preset,
}
