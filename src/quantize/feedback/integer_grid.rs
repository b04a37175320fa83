//! Integer grids as error feedback sees them.
//!
//! Enters: the targets of a group, one row per lane; for 8 bits the rows themselves. Leaves: scales to try, integer rows.
//! 4-bit groups choose their scale when they are reached, by simulated feedback over the whole group. With 8 bits the scale
//! hardly matters and may span a row: it is chosen beforehand.

use pulp::Simd;

use super::super::ScaleOverflow;
use nemoconv_formats::packed::Width;

use super::super::integer::{IntegerGrid, highest, lowest};
use super::super::lanes::Lanes;
use super::super::super_block::Sweep;
use super::super::symmetric::{Codebook, NearestWhole, Whole};
use super::description::Search;
use super::grid::{FeedbackGrid, Lattice, RoundedRow};
use super::scales::{Candidates, Scales};
use super::sweep::{Half, ROWS, Row};

/// 4-bit codes, a scale and perhaps a zero point per `SUB` columns.
pub struct Groups<const SUB: usize>(pub IntegerGrid);

/// Steps that are tried, relative to the one whose codes just reach the extremes.
const STEPS: Sweep = Sweep::new(1.06, -0.02, 20);
/// The same beside three zero points each.
const STEPS_WITH_ZERO: Sweep = Sweep::new(1.06, -0.06, 8);

impl<const SUB: usize> FeedbackGrid for Groups<SUB> {
    type Codebook = Signed<8>;
    const BLOCK: usize = SUB;
    const SUB: usize = SUB;

    #[inline(always)]
    fn lattice(&self) -> Lattice {
        match self.0.has_zero_point {
            true => Lattice::ZeroPoint(self.0.scale, lowest(Width::Four), highest(Width::Four)),
            false => Lattice::Own(self.0.scale),
        }
    }

    fn search(&self) -> Search {
        match self.0.has_zero_point {
            true => Search::Ranges(STEPS_WITH_ZERO, self.0.scale),
            false => Search::Magnitudes(STEPS, self.0.scale),
        }
    }

    #[inline(always)]
    fn candidates<S: Simd>(
        &self,
        _: &Scales<S>,
        targets: &[Lanes<S>],
        _: &[Lanes<S>],
        out: &mut Candidates,
    ) {
        let zero = targets[0].like(0.0);
        let (mut low, mut high) = (zero, zero);
        for target in targets {
            low = low.min(*target);
            high = high.max(*target);
        }
        let (lowest, highest) = (lowest(Width::Four), highest(Width::Four));
        if !self.0.has_zero_point {
            let positive = (high * zero.like(1.0 / highest)).max(low * zero.like(1.0 / lowest));
            // The side of -8 has one code more: the larger of the two, whichever it is.
            let negative = (low * zero.like(1.0 / highest)).min(high * zero.like(1.0 / lowest));
            for reach in [positive, negative] {
                for k in 0..STEPS.tries {
                    let d = self.0.scale.nearest(reach * zero.like(STEPS.at(k)));
                    out.push(Scales::of_block(d, zero));
                }
            }
            return;
        }
        let reach = (high - low) * zero.like(1.0 / (highest - lowest));
        let middle = (high + low) * zero.like(0.5);
        for k in 0..STEPS_WITH_ZERO.tries {
            let d = self
                .0
                .scale
                .nearest(reach * zero.like(STEPS_WITH_ZERO.at(k)));
            let center = zero.like(0.5 * (lowest + highest)) - middle * d.recip_or_zero();
            for shift in [-0.5, 0.0, 0.5] {
                let min = (center + zero.like(shift))
                    .max(zero.like(lowest))
                    .min(zero.like(highest));
                out.push(Scales {
                    min: min.round(),
                    ..Scales::of_block(d, d)
                });
            }
        }
    }

    fn row_bytes(&self, columns: usize) -> usize {
        self.0.row_bytes(columns)
    }

    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
        pack(&self.0, SUB, row, out)
    }
}

/// 8-bit codes, scales of any span.
pub struct Rows(pub IntegerGrid);

/// Columns that [`Rows`] goes over at a time.
pub const ROWS_SUB: usize = 32;
/// Steps that are tried, relative to the one whose codes just reach the extremes.
const ROW_STEPS: Sweep = Sweep::new(1.0, -0.025, 17);

impl FeedbackGrid for Rows {
    type Codebook = Signed<128>;
    const BLOCK: usize = ROWS_SUB;
    const SUB: usize = ROWS_SUB;

    #[inline(always)]
    fn lattice(&self) -> Lattice {
        Lattice::Fixed
    }

    fn search(&self) -> Search {
        Search::Preset
    }

    fn preset(&self, half: &mut Half, pivots: &[f32]) {
        let columns = half.wanted.len();
        let size = self.0.group_columns(columns);
        for first in (0..columns).step_by(size) {
            let scales = self.best_scales(&half.wanted[first..first + size], &pivots[first..]);
            for sub in &mut half.scales[first / ROWS_SUB..(first + size) / ROWS_SUB] {
                *sub = [scales, [0.0; ROWS], [1.0; ROWS], [0.0; ROWS]];
            }
        }
    }

    #[inline(always)]
    fn candidates<S: Simd>(
        &self,
        head: &Scales<S>,
        _: &[Lanes<S>],
        _: &[Lanes<S>],
        out: &mut Candidates,
    ) {
        out.push(*head);
    }

    fn row_bytes(&self, columns: usize) -> usize {
        self.0.row_bytes(columns)
    }

    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
        pack(&self.0, ROWS_SUB, row, out)
    }
}

impl Rows {
    /// For each lane the scale of least weighted squared error without feedback.
    fn best_scales(&self, wanted: &[Row], pivots: &[f32]) -> Row {
        let (lowest, highest) = (lowest(Width::Eight), highest(Width::Eight));
        let mut reach = [0.0_f32; ROWS];
        for row in wanted {
            for (reach, x) in reach.iter_mut().zip(row) {
                *reach = reach.max(x / highest).max(x / lowest);
            }
        }
        let (mut best, mut least) = ([0.0; ROWS], [f32::INFINITY; ROWS]);
        for k in 0..ROW_STEPS.tries {
            let scales = reach.map(|reach| self.0.scale.rounded(reach * ROW_STEPS.at(k)));
            let inverses = scales.map(|scale| if scale > 0.0 { 1.0 / scale } else { 0.0 });
            let mut losses = [0.0; ROWS];
            for (row, pivot) in wanted.iter().zip(pivots) {
                for lane in 0..ROWS {
                    let q = (row[lane] * inverses[lane]).round_ties_even();
                    let error = row[lane] - scales[lane] * q.max(lowest).min(highest);
                    losses[lane] += pivot * error * error;
                }
            }
            for lane in 0..ROWS {
                if losses[lane] < least[lane] {
                    (best[lane], least[lane]) = (scales[lane], losses[lane]);
                }
            }
        }
        best
    }
}

/// The whole numbers from `-HALF` to `HALF - 1`, each its own code.
pub struct Signed<const HALF: i32>;

impl<const HALF: i32> Codebook for Signed<HALF> {
    const FIRST: f32 = Whole::<HALF>::FIRST;
    const LAST: f32 = Whole::<HALF>::LAST;
    type Nearest = NearestWhole;
    const NEAREST: NearestWhole = Whole::<HALF>::NEAREST;

    #[inline(always)]
    fn code<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        Whole::<HALF>::nearest(x)
    }
}

/// Packs an integer row, scales read from sub-blocks of `sub` columns.
fn pack(grid: &IntegerGrid, sub: usize, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
    let columns = row.half.wanted.len();
    let size = grid.group_columns(columns);
    let mut out = grid.split_mut(columns, out);
    let mut cut = 0;
    for group in 0..grid.groups(columns) {
        let [scale, _, _, zero] = row.scales(group * size / sub);
        cut += u64::from(grid.scale.is_saturated(scale));
        out.set_scale(grid.scale, group, scale, zero);
    }
    for (column, code) in out.codes.iter_mut().enumerate() {
        *code = row.value(column) as i8;
    }
    ScaleOverflow(cut)
}
