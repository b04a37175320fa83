//! Kernels that round rows with error feedback: scales and codes of a chunk of columns.

use std::ops::Range;

use super::{groups_of, word};
use crate::array::{Array, Device};
use crate::driver::View;
use crate::error::Result;
use crate::kernels;

/// Columns of a chunk at most, and of a super-block.
pub const FEEDBACK_CHUNK: usize = 256;

/// Evenly spaced values that are tried.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Tries {
    /// The first one.
    pub first: f32,
    /// From one to the next.
    pub step: f32,
    /// How many.
    pub count: u32,
}

impl Tries {
    /// `count` values from `first` on, `step` apart.
    pub const fn new(first: f32, step: f32, count: u32) -> Self {
        Self { first, step, count }
    }
}

/// What codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeValues {
    /// Whole numbers.
    Whole,
    /// The uneven values of IQ4_NL.
    Uneven,
    /// E2M1, doubled.
    Floats,
}

/// How the scales that are tried are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleSearch {
    /// The largest weight at values around the first (`a`) and the last (`b`).
    Ends,
    /// Around the best line: relative changes of the scale (`a`) and steps of the minimum (`b`).
    Lines,
    /// Powers of two.
    Powers,
    /// Whole multiples of two factors, first fits as `a` and `b` say.
    Affine,
    /// Whole multiples of one factor, first fits as `a`, `b` and `around` say.
    Symmetric,
    /// Floats that reach the larger side, by the factors of `a`.
    Magnitudes,
    /// Floats and zero points that span the range, by the factors of `a`.
    Ranges,
    /// Chosen beforehand.
    Preset,
}

/// How scales may move once codes are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScaleLattice {
    /// Not at all.
    Fixed,
    /// Floats.
    Own,
    /// Two floats.
    OwnWithMin,
    /// Floats, and zero points within these bounds.
    ZeroPoint(f32, f32),
    /// Whole multiples within these bounds; of a minimum up to the last.
    Multiples(f32, f32, Option<f32>),
}

/// A type as the kernels of rounding see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FeedbackGrid {
    /// Values of codes.
    pub values: CodeValues,
    /// Value of the first code.
    pub first: f32,
    /// Value of the last code.
    pub last: f32,
    /// Columns that share scales: 16, 32, 64 or 128.
    pub sub: usize,
    /// How scales are found.
    pub search: ScaleSearch,
    /// See [`ScaleSearch`].
    pub a: Tries,
    /// See [`ScaleSearch`].
    pub b: Tries,
    /// See [`ScaleSearch`].
    pub around: Tries,
    /// Largest whole multiple, or one more where multiples have signs.
    pub scales: f32,
    /// Signed multiples that are tried beside the nearest one.
    pub reach: u32,
    /// The same while factors are chosen.
    pub factors_reach: u32,
    /// Places of the largest step among the multiples of a factor.
    pub factors: Tries,
    /// How often factors are fitted.
    pub rounds: u32,
    /// How scales move.
    pub lattice: ScaleLattice,
    /// Whether scales are BF16 instead of F16.
    pub has_bf16_scales: bool,
}

impl FeedbackGrid {
    /// The kernels' structure.
    fn words(&self) -> Vec<u32> {
        let (lattice, low, high, min) = match self.lattice {
            ScaleLattice::Fixed => (0, 0.0, 0.0, None),
            ScaleLattice::Own => (1, 0.0, 0.0, None),
            ScaleLattice::OwnWithMin => (2, 0.0, 0.0, None),
            ScaleLattice::ZeroPoint(low, high) => (3, low, high, None),
            ScaleLattice::Multiples(low, high, min) => (4, low, high, min),
        };
        let tries = |tries: Tries| [tries.first.to_bits(), tries.step.to_bits(), tries.count];
        let mut words = vec![self.search as u32, self.values as u32, word(self.sub)];
        words.extend([u32::from(self.has_bf16_scales)]);
        words.extend([self.first.to_bits(), self.last.to_bits()]);
        words.extend([self.a, self.b, self.around].into_iter().flat_map(tries));
        words.extend([self.scales.to_bits(), self.reach]);
        words.extend(tries(self.factors));
        words.extend([self.rounds, self.factors_reach, lattice]);
        words.extend([low, high, min.unwrap_or(-1.0)].map(f32::to_bits));
        words
    }

    /// Whether super-blocks have factors, which are chosen first.
    fn has_factors(&self) -> bool {
        matches!(self.search, ScaleSearch::Affine | ScaleSearch::Symmetric)
    }
}

/// Rows while they are rounded.
pub struct FeedbackRows {
    rows: usize,
    sub: usize,
    /// What they should be, `[column, row]`.
    pub wanted: Array,
    /// Wanted less rounded, `[column, row]`.
    pub errors: Array,
    /// Values of codes, `[column, row]`.
    pub values: Array,
    /// `[sub-block][d, dmin, scale, min][row]`.
    pub scales: Array,
}

impl FeedbackRows {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn of_columns(&self, array: &Array, columns: &Range<usize>) -> (View, u32) {
        array.part(columns.start * self.rows..columns.end * self.rows)
    }

    fn scales_of(&self, columns: &Range<usize>) -> (View, u32) {
        let subs = columns.start / self.sub..columns.end / self.sub;
        self.scales
            .part(subs.start * 4 * self.rows..subs.end * 4 * self.rows)
    }
}

impl Device {
    /// Room for `rows` rows of `columns` columns.
    ///
    /// # Errors
    /// Out of memory.
    pub fn feedback_rows(&self, rows: usize, columns: usize, sub: usize) -> Result<FeedbackRows> {
        Ok(FeedbackRows {
            rows,
            sub,
            wanted: self.uninitialized(rows * columns)?,
            errors: self.uninitialized(rows * columns)?,
            values: self.uninitialized(rows * columns)?,
            scales: self.uninitialized(rows * columns / sub * 4)?,
        })
    }

    /// Bytes that `rows` rows of `columns` columns take while they are rounded: their arrays, and for a chunk of columns its
    /// products and the part of a matrix that they are made with.
    pub fn feedback_bytes(&self, rows: usize, columns: usize, sub: usize) -> u64 {
        let taken = |values: usize| self.taken_bytes(4 * values as u64);
        let arrays = 3 * taken(rows * columns) + taken(rows * columns / sub * 4) + taken(2 * rows);
        let chunk = FEEDBACK_CHUNK.min(columns);
        // One product may still be in use when the next one is made.
        arrays + 2 * taken(chunk * rows) + 2 * taken(chunk * columns) + taken(chunk)
    }

    /// Begins with other rows, at most as many as there is room for: `wanted [column, row]`; `scales [sub-block][d, dmin,
    /// scale, min][row]` where they are chosen beforehand.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// There is no room for so many.
    pub fn feedback_begin(
        &self,
        into: &mut FeedbackRows,
        rows: usize,
        wanted: &[f32],
        scales: Option<&[f32]>,
    ) -> Result<()> {
        into.rows = rows;
        self.write(&mut into.wanted, 0, wanted)?;
        match scales {
            Some(scales) => self.write(&mut into.scales, 0, scales),
            None => Ok(()),
        }
    }

    /// Rounds a chunk of columns: `repairs [column, row]` is what errors before it change of what is wanted, `factor` holds
    /// the factor of the second moments within the chunk from `factor_first` on, `pivots [column]` what an error counts.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn feedback_sweep(
        &self,
        grid: &FeedbackGrid,
        rows: &mut FeedbackRows,
        chunk: Range<usize>,
        repairs: &Array,
        (factor, factor_first): (&Array, usize),
        pivots: &Array,
    ) -> Result<()> {
        let width = chunk.len();
        assert!(width <= FEEDBACK_CHUNK && width.is_multiple_of(grid.sub));
        assert!(repairs.len() == width * rows.rows && pivots.len() == width);
        let (wanted, wanted_first) = rows.of_columns(&rows.wanted, &chunk);
        let (errors, errors_first) = rows.of_columns(&rows.errors, &chunk);
        let (values, values_first) = rows.of_columns(&rows.values, &chunk);
        assert_eq!(errors_first, values_first, "arrays of one shape");
        let (scales, scales_first) = rows.scales_of(&chunk);
        if grid.has_factors() {
            assert_eq!(width, FEEDBACK_CHUNK, "a chunk is a super-block");
            let mut words = vec![word(rows.rows), wanted_first, scales_first, 0];
            words.extend(grid.words());
            let views = [wanted, repairs.view(), pivots.view(), scales];
            self.launch(&kernels::FEEDBACK_FACTORS, word(rows.rows), &views, &words)?;
        }
        let (factor, factor_first) = factor.part(factor_first..factor_first + width * width);
        let mut words = vec![word(rows.rows), word(width), wanted_first, factor_first];
        words.extend([errors_first, scales_first, 0, 0]);
        words.extend(grid.words());
        let (repairs, pivots) = (repairs.view(), pivots.view());
        let views = [wanted, repairs, factor, pivots, errors, values, scales];
        self.launch(&kernels::FEEDBACK_SWEEP, word(rows.rows), &views, &words)
    }

    /// Moves scales and codes of a chunk of columns: `gradient [column, row]` is errors times second moments, `moments` holds
    /// these within the chunk from `moments_first` on.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn feedback_descent(
        &self,
        grid: &FeedbackGrid,
        rows: &mut FeedbackRows,
        chunk: Range<usize>,
        gradient: &Array,
        (moments, moments_first): (&Array, usize),
    ) -> Result<()> {
        let width = chunk.len();
        assert!(width <= FEEDBACK_CHUNK && width.is_multiple_of(grid.sub));
        assert_eq!(gradient.len(), width * rows.rows);
        let (wanted, columns_first) = rows.of_columns(&rows.wanted, &chunk);
        let (errors, _) = rows.of_columns(&rows.errors, &chunk);
        let (values, _) = rows.of_columns(&rows.values, &chunk);
        let (scales, scales_first) = rows.scales_of(&chunk);
        let (moments, moments_first) = moments.part(moments_first..moments_first + width * width);
        let mut words = vec![word(rows.rows), word(width), columns_first, moments_first];
        words.extend([scales_first, 0, 0, 0]);
        words.extend(grid.words());
        let views = [wanted, gradient.view(), moments, errors, values, scales];
        self.launch(&kernels::FEEDBACK_DESCENT, word(rows.rows), &views, &words)
    }

    /// Adds errors times `gradient` of a chunk to `losses`, a pair of floats per row.
    ///
    /// # Errors
    /// Device lost.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn feedback_loss(
        &self,
        rows: &FeedbackRows,
        chunk: Range<usize>,
        gradient: &Array,
        losses: &mut Array,
    ) -> Result<()> {
        assert_eq!(gradient.len(), chunk.len() * rows.rows);
        assert_eq!(losses.len(), 2 * rows.rows);
        let kernel = &kernels::FEEDBACK_LOSS;
        let (errors, errors_first) = rows.of_columns(&rows.errors, &chunk);
        // The last one is a zero that compilers must not know.
        let words = [word(rows.rows), word(chunk.len()), errors_first, 0];
        let views = [errors, gradient.view(), losses.view()];
        self.launch(kernel, groups_of(rows.rows, kernel.threads), &views, &words)
    }
}
