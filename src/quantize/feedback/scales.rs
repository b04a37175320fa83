//! Scales of the sub-blocks of sixteen rows, and those that are tried for them.
//!
//! Enters: lanes. Leaves: rows of scales as `[d, dmin, scale, min]`. Knows no type, and chooses nothing.

use pulp::Simd;

use super::super::lanes::{Lanes, Mask};
use super::sweep::{ROWS, Row, write};

/// Most candidates of a sub-block.
pub const MAX_CANDIDATES: usize = 40;

/// The scales of one sub-block of every lane.
#[derive(Clone, Copy, Debug)]
pub struct Scales<S: Simd> {
    /// Scale of the scale; an f16.
    pub d: Lanes<S>,
    /// Scale of the minimum; an f16, 0 in types without.
    pub dmin: Lanes<S>,
    /// Whole multiple of `d`.
    pub scale: Lanes<S>,
    /// Whole multiple of `dmin`.
    pub min: Lanes<S>,
}

impl<S: Simd> Scales<S> {
    /// Distance of the values of neighbouring whole numbers.
    #[inline(always)]
    pub fn step(&self) -> Lanes<S> {
        self.d * self.scale
    }

    /// What is subtracted from every value.
    #[inline(always)]
    pub fn offset(&self) -> Lanes<S> {
        self.dmin * self.min
    }

    /// `other` where the mask holds.
    #[inline(always)]
    pub fn or_where(self, mask: Mask<S>, other: &Self) -> Self {
        Self {
            d: mask.select(other.d, self.d),
            dmin: mask.select(other.dmin, self.dmin),
            scale: mask.select(other.scale, self.scale),
            min: mask.select(other.min, self.min),
        }
    }

    /// Those of the rows from `lane` on, of sixteen.
    #[inline(always)]
    pub fn read(simd: S, rows: &[Row; 4], lane: usize) -> Self {
        let [d, dmin, scale, min] = rows;
        let read = |row: &Row| Lanes::read(simd, &row[lane..]);
        Self {
            d: read(d),
            dmin: read(dmin),
            scale: read(scale),
            min: read(min),
        }
    }

    /// Puts them where [`Self::read`] finds them.
    #[inline(always)]
    pub fn write(&self, rows: &mut [Row; 4], lane: usize) {
        let parts = [self.d, self.dmin, self.scale, self.min];
        for (row, part) in rows.iter_mut().zip(parts) {
            write(&mut row[lane..], part);
        }
    }

    /// Both factors fixed, no multiples chosen yet.
    #[inline(always)]
    pub fn head(d: Lanes<S>, dmin: Lanes<S>) -> Self {
        let zero = d.like(0.0);
        Self {
            d,
            dmin,
            scale: zero,
            min: zero,
        }
    }

    /// A block with a scale and minimum of its own.
    #[inline(always)]
    pub fn of_block(d: Lanes<S>, dmin: Lanes<S>) -> Self {
        let one = d.like(1.0);
        Self {
            d,
            dmin,
            scale: one,
            min: one,
        }
    }
}

/// Scales to try for a sub-block of sixteen rows, each `[d, dmin, scale, min]`.
pub struct Candidates {
    all: [[Row; 4]; MAX_CANDIDATES],
    count: usize,
    lane: usize,
}

impl Candidates {
    /// None yet.
    pub fn none() -> Self {
        Self {
            all: [[[0.0; ROWS]; 4]; MAX_CANDIDATES],
            count: 0,
            lane: 0,
        }
    }

    /// Begins again, with the rows from `lane` on: as many for each of them as for the first.
    #[inline(always)]
    pub fn restart(&mut self, lane: usize) {
        (self.count, self.lane) = (0, lane);
    }

    /// One more.
    #[inline(always)]
    pub fn push<S: Simd>(&mut self, scales: Scales<S>) {
        scales.write(&mut self.all[self.count], self.lane);
        self.count += 1;
    }

    /// The candidates, the last one repeated to a multiple of `group`.
    #[inline(always)]
    pub fn in_groups(&mut self, group: usize) -> &[[Row; 4]] {
        let last = self.all[self.count - 1];
        while !self.count.is_multiple_of(group) {
            self.all[self.count] = last;
            self.count += 1;
        }
        &self.all[..self.count]
    }
}
