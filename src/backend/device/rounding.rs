//! Rows that a device rounds with error feedback, from the first sweep to the loss.
//!
//! Enters: what rows should be, parts of second moments and of their factor. Leaves: values of codes and scales. Knows no
//! weights.

use std::collections::BTreeMap;
use std::ops::Range;

use nemoconv_device::{
    Array, CodeValues as DeviceValues, FEEDBACK_CHUNK, FeedbackGrid, FeedbackRows, MatmulLayout,
    ScaleLattice, ScaleSearch, Tries,
};

use super::{OnDevice, or_no_room};
use crate::error::{Error, Result};
use crate::quantize::feedback::{
    CodeValues, GridDescription, Lattice, RoundingRows, RowsRounded, ScaleFloat, Search, Sweep,
};

/// Of so many rows less one is tried until there is room.
const FEWER: usize = 8;
/// Parts of second moments that there must be room for beside those that are kept.
const PARTS_BESIDE: u64 = 4;

/// Rows on a device.
pub struct RoundingOnDevice<'a> {
    on: &'a OnDevice,
    grid: FeedbackGrid,
    columns: usize,
    capacity: usize,
    rows: FeedbackRows,
    /// Pairs of floats, by row.
    losses: Array,
    /// Second moments that were sent, by the first column of their chunk.
    moments: BTreeMap<usize, Array>,
}

impl<'a> RoundingOnDevice<'a> {
    /// As many of `rows` rows as there is room for; nothing where there is none.
    pub fn new(
        on: &'a OnDevice,
        grid: &GridDescription,
        rows: usize,
        columns: usize,
    ) -> Result<Option<Self>> {
        let device = on.device();
        let limits = device.description().limits;
        // A chunk of all rows is one view, an array one allocation.
        let of_views = (limits.view_bytes - limits.view_alignment) / (4 * FEEDBACK_CHUNK as u64);
        let of_allocations = limits.allocation_bytes / (4 * columns.max(1)) as u64;
        let mut capacity = rows.min(of_views.min(of_allocations) as usize);
        let takes = |rows| device.feedback_bytes(rows, columns, grid.sub);
        while capacity > 0 && takes(capacity) > device.free_bytes() {
            capacity -= capacity.div_ceil(FEWER);
        }
        while capacity > 0 {
            let there = device.feedback_rows(capacity, columns, grid.sub);
            if let Some(rows) = or_no_room(there.map_err(Error::from))? {
                return Ok(Some(Self {
                    on,
                    grid: for_device(grid),
                    columns,
                    capacity,
                    rows,
                    losses: device.zeros(2 * capacity)?,
                    moments: BTreeMap::new(),
                }));
            }
            capacity -= capacity.div_ceil(FEWER);
        }
        Ok(None)
    }

    /// As many columns as one view of errors may span.
    fn columns_in_a_view(&self) -> usize {
        let limits = self.on.device().description().limits;
        let values = (limits.view_bytes - limits.view_alignment) / 4;
        (values as usize / self.rows.rows().max(1)).max(1)
    }

    /// Errors of columns `0..inputs` times `part [inputs, width]`: `[width, row]`.
    fn products(&self, inputs: usize, part: &Array, width: usize) -> Result<Array> {
        let device = self.on.counted("row_products");
        let rows = self.rows.rows();
        let mut out = device.zeros(width * rows)?;
        let step = self.columns_in_a_view();
        for first in (0..inputs).step_by(step) {
            let count = step.min(inputs - first);
            let layout = MatmulLayout {
                a: [first * width, 1, width],
                b: [first * rows, rows, 1],
                beta: 1.0,
                is_fused: true,
                ..MatmulLayout::linear(width, count, rows, 0, rows)
            };
            device.matmul(&layout, part, &self.rows.errors, &mut out)?;
        }
        Ok(out)
    }

    /// Second moments `[columns, chunk]`, sent once where there is room to keep them.
    fn with_moments(
        &mut self,
        chunk: &Range<usize>,
        moments: &dyn Fn() -> Vec<f32>,
        run: impl FnOnce(&mut Self, &Array) -> Result<()>,
    ) -> Result<()> {
        let part = match self.moments.remove(&chunk.start) {
            Some(part) => part,
            None => self.on.device().upload(&moments())?,
        };
        run(self, &part)?;
        // The next part, and products with it, need their room too.
        if self.on.has_room(PARTS_BESIDE * 4 * part.len() as u64) {
            self.moments.insert(chunk.start, part);
        }
        Ok(())
    }
}

impl RoundingRows for RoundingOnDevice<'_> {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn begin(&mut self, wanted: &[f32], scales: Option<&[f32]>) -> Result<()> {
        let rows = wanted.len() / self.columns;
        let device = self.on.device();
        device.feedback_begin(&mut self.rows, rows, wanted, scales)?;
        self.losses = device.zeros(2 * rows)?;
        Ok(())
    }

    fn sweep(&mut self, chunk: Range<usize>, factor: &[f32], pivots: &[f32]) -> Result<()> {
        let device = self.on.device();
        let (factor, pivots) = (device.upload(factor)?, device.upload(pivots)?);
        let width = chunk.len();
        let repairs = self.products(chunk.start, &factor, width)?;
        let inner = (&factor, chunk.start * width);
        let device = self.on.counted("feedback_sweep");
        let (grid, rows) = (&self.grid, &mut self.rows);
        Ok(device.feedback_sweep(grid, rows, chunk, &repairs, inner, &pivots)?)
    }

    fn descend(&mut self, chunk: Range<usize>, moments: &dyn Fn() -> Vec<f32>) -> Result<()> {
        let at = chunk.clone();
        self.with_moments(&at, moments, |this, part| {
            let gradient = this.products(this.columns, part, chunk.len())?;
            let inner = (part, chunk.start * chunk.len());
            let device = this.on.counted("feedback_descent");
            let (grid, rows) = (&this.grid, &mut this.rows);
            Ok(device.feedback_descent(grid, rows, chunk, &gradient, inner)?)
        })
    }

    fn add_loss(&mut self, chunk: Range<usize>, moments: &dyn Fn() -> Vec<f32>) -> Result<()> {
        let at = chunk.clone();
        self.with_moments(&at, moments, |this, part| {
            let gradient = this.products(this.columns, part, chunk.len())?;
            let device = this.on.counted("feedback_loss");
            Ok(device.feedback_loss(&this.rows, chunk, &gradient, &mut this.losses)?)
        })
    }

    fn finish(&mut self) -> Result<RowsRounded> {
        let device = self.on.device();
        let rows = self.rows.rows();
        let losses = device.download_all(&self.losses)?;
        let scales = rows * self.columns / self.grid.sub * 4;
        Ok(RowsRounded {
            values: device.download(&self.rows.values, 0..rows * self.columns)?,
            scales: device.download(&self.rows.scales, 0..scales)?,
            loss: losses.iter().map(|part| f64::from(*part)).sum(),
        })
    }
}

/// The grid as kernels take it.
fn for_device(grid: &GridDescription) -> FeedbackGrid {
    let none = Tries::default();
    let mut found = FeedbackGrid {
        values: match grid.values {
            CodeValues::Whole => DeviceValues::Whole,
            CodeValues::Uneven => DeviceValues::Uneven,
            CodeValues::Floats => DeviceValues::Floats,
        },
        first: grid.first,
        last: grid.last,
        sub: grid.sub,
        search: ScaleSearch::Preset,
        a: none,
        b: none,
        around: none,
        scales: 0.0,
        reach: 0,
        factors_reach: 0,
        factors: none,
        rounds: 0,
        lattice: lattice_for_device(grid.lattice),
        has_bf16_scales: matches!(
            grid.search,
            Search::Magnitudes(_, ScaleFloat::Bf16) | Search::Ranges(_, ScaleFloat::Bf16)
        ),
    };
    match grid.search {
        Search::Ends(first, last) => {
            found.search = ScaleSearch::Ends;
            (found.a, found.b) = (tries(first), tries(last));
        }
        Search::Lines(d, min) => {
            found.search = ScaleSearch::Lines;
            (found.a, found.b) = (tries(d), tries(min));
        }
        Search::Powers => found.search = ScaleSearch::Powers,
        Search::Affine(affine) => {
            found.search = ScaleSearch::Affine;
            (found.a, found.b) = (tries(affine.plain), tries(affine.drift));
            (found.scales, found.factors) = (affine.scales, tries(affine.factors));
            found.rounds = count(affine.rounds);
        }
        Search::Symmetric(symmetric, reach) => {
            found.search = ScaleSearch::Symmetric;
            (found.a, found.b) = (tries(symmetric.first), tries(symmetric.last));
            found.around = tries(symmetric.around);
            (found.scales, found.factors) = (symmetric.scales, tries(symmetric.factors));
            (found.reach, found.factors_reach) = (reach, count(symmetric.reach));
            found.rounds = count(symmetric.rounds);
        }
        Search::Magnitudes(steps, _) => {
            (found.search, found.a) = (ScaleSearch::Magnitudes, tries(steps));
        }
        Search::Ranges(steps, _) => {
            (found.search, found.a) = (ScaleSearch::Ranges, tries(steps));
        }
        Search::Preset => {}
    }
    found
}

fn lattice_for_device(lattice: Lattice) -> ScaleLattice {
    match lattice {
        Lattice::Fixed => ScaleLattice::Fixed,
        Lattice::Own(_) => ScaleLattice::Own,
        Lattice::HalfWithMin => ScaleLattice::OwnWithMin,
        Lattice::ZeroPoint(_, low, high) => ScaleLattice::ZeroPoint(low, high),
        Lattice::Whole(low, high, min) => ScaleLattice::Multiples(low, high, min),
    }
}

fn tries(sweep: Sweep) -> Tries {
    Tries::new(sweep.first, sweep.step, count(sweep.tries))
}

/// Few enough for the parameters of kernels.
fn count(tries: usize) -> u32 {
    u32::try_from(tries).expect("some tens of tries")
}
