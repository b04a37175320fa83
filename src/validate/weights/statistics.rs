//! Sums over one tensor, tile by tile: error against the reference, values that are no numbers, blocks out of line.
//!
//! Enters: dequantized rows of both sides. Leaves: [`Statistics`]. Tiles are added in file order, so the figures do
//! not depend on the number of threads.

use super::block_facts::BlockFacts;
use super::expectation::Expectation;

/// One weight: matrix of the stack, row, column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    pub matrix: usize,
    pub row: usize,
    pub column: usize,
}

/// How many, and the first.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counted {
    pub count: u64,
    pub first: Option<At>,
}

impl Counted {
    pub fn add(&mut self, at: At) {
        self.count += 1;
        self.first.get_or_insert(at);
    }

    fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.first = self.first.or(other.first);
    }
}

/// Counts by factors of two.
#[derive(Debug, Clone, PartialEq)]
pub struct Octaves([u64; 64]);

impl Default for Octaves {
    fn default() -> Self {
        Self([0; 64])
    }
}

impl Octaves {
    const LOWEST: f64 = -40.0;

    fn add(&mut self, value: f64) {
        let octave = (value.log2() - Self::LOWEST).clamp(0.0, 63.0);
        self.0[octave as usize] += 1;
    }

    fn merge(&mut self, other: &Self) {
        for (count, more) in self.0.iter_mut().zip(other.0) {
            *count += more;
        }
    }

    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The lower edge of the octave of the median.
    pub fn median(&self) -> Option<f64> {
        let half = self.count().div_ceil(2);
        let mut below = 0;
        let octave = self.0.iter().position(|count| {
            below += count;
            below >= half && half > 0
        })?;
        Some((octave as f64 + Self::LOWEST).exp2())
    }
}

/// The extremes of a factor that should be 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Gains {
    pub least: Option<(f64, At)>,
    pub largest: Option<(f64, At)>,
}

impl Gains {
    fn add(&mut self, gain: f64, at: At) {
        self.merge(Self {
            least: Some((gain, at)),
            largest: Some((gain, at)),
        });
    }

    fn merge(&mut self, other: Self) {
        let negative = |gain: (f64, At)| (-gain.0, gain.1);
        let least = larger(self.least.map(negative), other.least.map(negative));
        self.least = least.map(negative);
        self.largest = larger(self.largest, other.largest);
    }
}

/// Sums over one matrix of a stack.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MatrixSums {
    pub error2: f64,
    pub reference2: f64,
    pub artifact2: f64,
    /// Largest magnitude of the artifact, padding included.
    pub largest: f32,
}

impl MatrixSums {
    fn merge(&mut self, other: &Self) {
        self.error2 += other.error2;
        self.reference2 += other.reference2;
        self.artifact2 += other.artifact2;
        self.largest = self.largest.max(other.largest);
    }
}

/// Rows kept by number; more than these are only counted.
const MAX_BAD_ROWS: usize = 1 << 14;

/// What is known of one tensor. Sums cover weights that are finite on both sides.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Statistics {
    /// Weights compared.
    pub weights: u64,
    /// Of the whole tensor.
    pub sums: MatrixSums,
    /// Sum of products.
    pub dot: f64,
    /// Sums of magnitudes: artifact, reference.
    pub magnitudes: (f64, f64),
    /// Sum over weights of the square of what errors are measured by.
    pub yardstick2: f64,
    /// Largest |difference|.
    pub max_abs_error: f64,
    /// Weights that differ by more than the reading of a lossless type may.
    pub differing: Counted,
    /// NaN and infinite weights of the artifact.
    pub nonfinite: Counted,
    /// Those of the reference.
    pub reference_nonfinite: u64,
    /// Weights that widening added and that are not 0.
    pub padding: Counted,
    /// Units whose error is above what the type explains.
    pub outliers: Counted,
    /// Their part of the error.
    pub outlier_error2: f64,
    /// The worst unit: its error by its yardstick.
    pub worst: Option<(f64, At)>,
    /// Blocks and units that decode to too much or too little of the reference.
    pub out_of_gain: Counted,
    /// Least and largest gain of a unit: the factor by which its values are those of the reference.
    pub unit_gains: Gains,
    /// The same of whole blocks.
    pub block_gains: Gains,
    /// Error of units by their yardsticks.
    pub unit_errors: Octaves,
    /// Largest magnitude of each block of the artifact.
    pub block_sizes: Octaves,
    /// The largest of them.
    pub largest_block: Option<(f64, At)>,
    /// Rows that are nothing like those of the reference.
    pub bad_rows: Vec<At>,
    /// How many.
    pub bad_row_count: u64,
    /// Per matrix.
    pub matrices: Vec<MatrixSums>,
    /// Scales and codes.
    pub facts: BlockFacts,
}

impl Statistics {
    /// ||a - b|| / ||b||.
    pub fn relative_error(&self) -> f64 {
        ratio(self.sums.error2, self.sums.reference2).sqrt()
    }

    /// a b / (||a|| ||b||).
    pub fn cosine(&self) -> f64 {
        match (self.sums.artifact2 * self.sums.reference2).sqrt() {
            0.0 if self.sums.error2 == 0.0 => 1.0,
            0.0 => 0.0,
            norms => self.dot / norms,
        }
    }

    /// Signal to noise in decibels; infinite without error.
    pub fn snr_db(&self) -> f64 {
        -20.0 * self.relative_error().log10()
    }

    /// Root mean square error by the yardstick of the type, outliers apart.
    pub fn yardstick_error(&self) -> f64 {
        let error2 = (self.sums.error2 - self.outlier_error2).max(0.0);
        ratio(error2, self.yardstick2).sqrt()
    }

    /// The extremes of what units and blocks decode to, by the reference.
    pub fn gain_range(&self) -> (f64, f64) {
        let both = [self.unit_gains, self.block_gains];
        let least = both.iter().filter_map(|gains| gains.least);
        let largest = both.iter().filter_map(|gains| gains.largest);
        (
            least.map(|gain| gain.0).fold(1.0, f64::min),
            largest.map(|gain| gain.0).fold(1.0, f64::max),
        )
    }

    /// Adds a later tile. `blocks_before`: blocks between the tensor's and the tile's beginning.
    pub fn merge(&mut self, tile: Self, matrix: usize, blocks_before: u64) {
        self.weights += tile.weights;
        self.sums.merge(&tile.sums);
        self.dot += tile.dot;
        self.magnitudes.0 += tile.magnitudes.0;
        self.magnitudes.1 += tile.magnitudes.1;
        self.yardstick2 += tile.yardstick2;
        self.max_abs_error = self.max_abs_error.max(tile.max_abs_error);
        self.differing.merge(tile.differing);
        self.nonfinite.merge(tile.nonfinite);
        self.reference_nonfinite += tile.reference_nonfinite;
        self.padding.merge(tile.padding);
        self.outliers.merge(tile.outliers);
        self.outlier_error2 += tile.outlier_error2;
        self.worst = larger(self.worst, tile.worst);
        self.out_of_gain.merge(tile.out_of_gain);
        self.unit_gains.merge(tile.unit_gains);
        self.block_gains.merge(tile.block_gains);
        self.unit_errors.merge(&tile.unit_errors);
        self.block_sizes.merge(&tile.block_sizes);
        self.largest_block = larger(self.largest_block, tile.largest_block);
        let room = MAX_BAD_ROWS.saturating_sub(self.bad_rows.len());
        self.bad_rows.extend(tile.bad_rows.into_iter().take(room));
        self.bad_row_count += tile.bad_row_count;
        if self.matrices.len() <= matrix {
            self.matrices.resize(matrix + 1, MatrixSums::default());
        }
        self.matrices[matrix].merge(&tile.sums);
        self.facts.merge(&tile.facts, blocks_before);
    }

    /// Looks at one stored row without a reference.
    pub fn artifact_row(&mut self, at: At, values: &[f32], block: usize) {
        for (index, block_values) in values.chunks(block).enumerate() {
            let column = index * block;
            let mut size = 0f32;
            for (offset, value) in block_values.iter().enumerate() {
                if value.is_finite() {
                    size = size.max(value.abs());
                } else {
                    self.nonfinite.add(At {
                        column: column + offset,
                        ..at
                    });
                }
            }
            self.sums.largest = self.sums.largest.max(size);
            if size > 0.0 {
                self.block_sizes.add(f64::from(size));
                let place = At { column, ..at };
                self.largest_block = larger(self.largest_block, Some((f64::from(size), place)));
            }
        }
    }

    /// Compares one row; both sides are in the terms of the unwidened model.
    pub fn compare_row(&mut self, at: At, artifact: &[f32], reference: &[f32], measure: &Measure) {
        let expectation = &measure.expectation;
        let (mut row, dot_before) = (MatrixSums::default(), self.dot);
        let size_of_row = match expectation.by_row {
            true => mean_size(reference, expectation.block),
            false => 0.0,
        };
        let blocks = artifact.chunks(expectation.block);
        for (index, (a, b)) in blocks.zip(reference.chunks(expectation.block)).enumerate() {
            let size = size_of(b);
            let yardstick = size + expectation.quantum();
            let yardsticks = Yardsticks {
                own: yardstick,
                judged: size.max(size_of_row) + expectation.quantum(),
            };
            let slack = match yardstick > 0.0 {
                true => yardsticks.judged / yardstick,
                false => 1.0,
            };
            let place = |offset: usize| At {
                column: index * expectation.block + offset,
                ..at
            };
            let before = (self.dot, row.reference2);
            let units = a.chunks(expectation.unit).zip(b.chunks(expectation.unit));
            for (unit, (a, b)) in units.enumerate() {
                let place = place(unit * expectation.unit);
                let before = (self.dot, row.reference2);
                self.compare_unit(place, a, b, yardsticks, measure, &mut row);
                let power = row.reference2 - before.1;
                if power > a.len() as f64 * (UNIT_TO_SPEAK_OF * yardstick).powi(2) {
                    let gain = (self.dot - before.0) / power;
                    let expected = Expectation::loosened(expectation.unit_gain, slack);
                    self.gain(gain, expected, place);
                    self.unit_gains.add(gain, place);
                }
            }
            let power = row.reference2 - before.1;
            if size > 64.0 * expectation.quantum() && power > 0.0 {
                let gain = (self.dot - before.0) / power;
                let expected = Expectation::loosened(expectation.block_gain, slack);
                self.gain(gain, expected, place(0));
                self.block_gains.add(gain, place(0));
            }
        }
        let steps = artifact.len() as f64 * (2.0 * expectation.step()).powi(2);
        let far = row.error2 > expectation.bad_row.powi(2) * row.reference2;
        let norms = (row.artifact2 * row.reference2).sqrt();
        let unlike = artifact.len() >= MIN_ROW && self.dot - dot_before < UNLIKE * norms;
        let bad = (far || unlike) && row.error2 > steps;
        if bad {
            self.bad_row_count += 1;
            if self.bad_rows.len() < MAX_BAD_ROWS {
                self.bad_rows.push(at);
            }
        }
        self.sums.merge(&row);
    }

    fn gain(&mut self, gain: f64, (least, largest): (f64, f64), at: At) {
        if !(least..=largest).contains(&gain) {
            self.out_of_gain.add(at);
        }
    }

    fn compare_unit(
        &mut self,
        at: At,
        artifact: &[f32],
        reference: &[f32],
        yardsticks: Yardsticks,
        measure: &Measure,
        row: &mut MatrixSums,
    ) {
        let (mut error2, mut count) = (0f64, 0u64);
        for (offset, (a, b)) in artifact.iter().zip(reference).enumerate() {
            let (a, b) = (f64::from(*a), f64::from(*b));
            self.reference_nonfinite += u64::from(!b.is_finite());
            if !a.is_finite() || !b.is_finite() {
                continue;
            }
            count += 1;
            let error = a - b;
            error2 += error * error;
            row.artifact2 += a * a;
            row.reference2 += b * b;
            self.dot += a * b;
            self.magnitudes.0 += a.abs();
            self.magnitudes.1 += b.abs();
            self.max_abs_error = self.max_abs_error.max(error.abs());
            if measure.lossless && error.abs() > LOSSLESS * b.abs() {
                let column = at.column + offset;
                self.differing.add(At { column, ..at });
            }
        }
        row.error2 += error2;
        self.weights += count;
        self.yardstick2 += count as f64 * yardsticks.own * yardsticks.own;
        if count == 0 || error2 == 0.0 {
            return;
        }
        let error = match yardsticks.judged > 0.0 {
            true => (error2 / count as f64).sqrt() / yardsticks.judged,
            false => f64::INFINITY,
        };
        self.unit_errors.add(error);
        self.worst = larger(self.worst, Some((error, at)));
        if error > measure.expectation.unit_ceiling {
            self.outliers.add(at);
            self.outlier_error2 += error2;
        }
    }
}

/// What the errors of a block are measured by.
#[derive(Debug, Clone, Copy)]
struct Yardsticks {
    /// The block's own: tensors are judged by it.
    own: f64,
    /// The same, or that of its row where that is larger: units are judged by it.
    judged: f64,
}

/// The largest magnitude.
fn size_of(block: &[f32]) -> f64 {
    let finite = block.iter().filter(|value| value.is_finite());
    f64::from(finite.fold(0f32, |size, value| size.max(value.abs())))
}

/// The mean of the largest magnitudes of a row's blocks.
fn mean_size(row: &[f32], block: usize) -> f64 {
    let sizes = row.chunks(block).map(size_of);
    sizes.sum::<f64>() / row.len().div_ceil(block).max(1) as f64
}

/// By what a tensor is judged.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// What its type explains.
    pub expectation: Expectation,
    /// The stored type holds every value of the reference.
    pub lossless: bool,
}

/// Two ways to compute `-exp(x)` or to undo a factor differ by less.
const LOSSLESS: f64 = 1.0 / (1 << 20) as f64;

/// Rows with a smaller cosine are other rows, if they are long enough for a cosine to tell.
const UNLIKE: f64 = 0.35;
const MIN_ROW: usize = 64;

/// A unit whose weights are smaller than this part of its block's largest may round to nothing.
const UNIT_TO_SPEAK_OF: f64 = 0.125;

fn ratio(error2: f64, reference2: f64) -> f64 {
    match (error2, reference2) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::INFINITY,
        _ => error2 / reference2,
    }
}

fn larger(one: Option<(f64, At)>, other: Option<(f64, At)>) -> Option<(f64, At)> {
    match (one, other) {
        (Some(one), Some(other)) if other.0 > one.0 => Some(other),
        (None, other) => other,
        (one, _) => one,
    }
}

#[cfg(test)]
mod tests {
    use nemoconv_formats::GgmlType;

    use super::super::expectation::{self, Rounding};
    use super::*;

    /// A row of 32 blocks, its last one a quarter as large as the others and off by `error` times that.
    fn off_in_the_last_block(rounding: Rounding, error: f32) -> Statistics {
        let sign = |column: usize| if column.is_multiple_of(2) { 1.0 } else { -1.0 };
        let mut reference: Vec<f32> = (0..1024).map(sign).collect();
        reference[992..].iter_mut().for_each(|value| *value *= 0.25);
        let mut stored = reference.clone();
        for (column, value) in stored[992..].iter_mut().enumerate() {
            *value += 0.25 * error * sign(column / 2);
        }
        let measure = Measure {
            expectation: expectation::of(GgmlType::Q4_0, rounding).unwrap(),
            lossless: false,
        };
        let at = At {
            matrix: 0,
            row: 0,
            column: 0,
        };
        let mut statistics = Statistics::default();
        statistics.compare_row(at, &stored, &reference, &measure);
        statistics
    }

    /// Where columns are sorted by how much they matter, the last block of a row gets what all others lost: with a short
    /// text and a single pass up to 2.4 times its own largest weight, on nemotron-h-tiny as Q4_0.
    #[test]
    fn feedback_may_move_a_small_block_by_what_its_row_loses() {
        let outliers = |rounding, error| off_in_the_last_block(rounding, error).outliers.count;
        assert_eq!(outliers(Rounding::FedBack, 2.4), 0);
        assert_eq!(outliers(Rounding::Steered, 2.4), 1);
        assert_eq!(outliers(Rounding::FedBack, 8.0), 1);
        let fine = off_in_the_last_block(Rounding::FedBack, 2.4);
        assert_eq!(fine.out_of_gain.count, 0);
    }

    #[test]
    fn medians_are_those_of_octaves() {
        let mut octaves = Octaves::default();
        assert_eq!(octaves.median(), None);
        for value in [0.3, 0.3, 0.4, 100.0] {
            octaves.add(value);
        }
        assert_eq!(octaves.median(), Some(0.25));
        let (none, zero) = (Statistics::default(), 0.0);
        assert_eq!((none.relative_error(), none.cosine()), (zero, 1.0));
    }
}
