//! Rounding with error feedback against plain loops in f64. Every grid against the CPU's is tested where the CPU's is.

use nemoconv_device::{
    CodeValues, Device, FeedbackGrid, FeedbackRows, ScaleLattice, ScaleSearch, Tries,
};

use crate::drivers::all;
use crate::{TOLERANCE, check, numbers};

/// Whole numbers from -8 to 7 with scales that were chosen beforehand.
const PRESET: FeedbackGrid = FeedbackGrid {
    values: CodeValues::Whole,
    first: -8.0,
    last: 7.0,
    sub: 32,
    search: ScaleSearch::Preset,
    a: NONE,
    b: NONE,
    around: NONE,
    scales: 0.0,
    reach: 0,
    factors_reach: 0,
    factors: NONE,
    rounds: 0,
    lattice: ScaleLattice::Fixed,
    has_bf16_scales: false,
};
const NONE: Tries = Tries::new(0.0, 0.0, 0);

/// That of Q4_0.
pub const Q4_0: FeedbackGrid = FeedbackGrid {
    search: ScaleSearch::Ends,
    a: Tries::new(-1.4, 0.1, 25),
    b: Tries::new(1.0, -0.2, 9),
    lattice: ScaleLattice::Own,
    ..PRESET
};
/// That of Q4_K.
pub const Q4_K: FeedbackGrid = FeedbackGrid {
    first: 0.0,
    last: 15.0,
    search: ScaleSearch::Affine,
    a: Tries::new(-0.6, 0.3, 5),
    b: Tries::new(-0.9, 0.3, 7),
    scales: 63.0,
    factors: Tries::new(-4.0, 0.25, 33),
    rounds: 3,
    lattice: ScaleLattice::Multiples(0.0, 63.0, Some(63.0)),
    ..PRESET
};

/// Columns that have nothing in common, `[n, n]`.
pub fn identity(n: usize) -> Vec<f32> {
    (0..n * n)
        .map(|at| if at / n == at % n { 1.0 } else { 0.0 })
        .collect()
}

/// Scales that are searched: without feedback every sub-block keeps less error than with the scale that just reaches its
/// largest weight.
#[test]
fn searched_scales_are_better_than_those_that_reach() {
    let (rows, width) = (9, 256);
    let wanted = numbers(rows * width, 3);
    for (name, device) in all() {
        for grid in [Q4_0, Q4_K] {
            let mut state = device.feedback_rows(rows, width, grid.sub).unwrap();
            device
                .feedback_begin(&mut state, rows, &wanted, None)
                .unwrap();
            let repairs = device.zeros(rows * width).unwrap();
            let matrix = device.upload(&identity(width)).unwrap();
            // No feedback: the factor has nothing above its diagonal.
            let none = device.zeros(width * width).unwrap();
            let pivots = device.upload(&vec![1.0; width]).unwrap();
            device
                .feedback_sweep(&grid, &mut state, 0..width, &repairs, (&none, 0), &pivots)
                .unwrap();
            let loss = |state: &FeedbackRows| -> f64 {
                let errors = device.download_all(&state.errors).unwrap();
                errors.iter().map(|error| f64::from(error * error)).sum()
            };
            let swept = loss(&state);
            let gradient = device
                .upload(&device.download_all(&state.errors).unwrap())
                .unwrap();
            device
                .feedback_descent(&grid, &mut state, 0..width, &gradient, (&matrix, 0))
                .unwrap();
            let descended = loss(&state);
            let reaching = reaching_loss(&wanted, rows, grid.sub);
            assert!(
                swept < 0.9 * reaching && descended <= swept,
                "{name}: {descended}, {swept} and {reaching}"
            );
        }
    }
}

/// With the largest magnitude of each sub-block at the code of -8.
fn reaching_loss(wanted: &[f32], rows: usize, sub: usize) -> f64 {
    let mut loss = 0.0;
    for row in 0..rows {
        let row: Vec<f32> = wanted.chunks(rows).map(|column| column[row]).collect();
        for block in row.chunks(sub) {
            let largest = |most: f32, x: &f32| if x.abs() > most.abs() { *x } else { most };
            let step = block.iter().fold(0.0, largest) / -8.0;
            let errors = block
                .iter()
                .map(|x| x - step * (x / step).round().clamp(-8.0, 7.0));
            loss += errors.map(|error| f64::from(error * error)).sum::<f64>();
        }
    }
    loss
}

/// One chunk of rows, `[column, row]`.
struct Case {
    rows: usize,
    width: usize,
    sub: usize,
    wanted: Vec<f32>,
    repairs: Vec<f32>,
    /// `[width, width]`: a factor, or second moments.
    matrix: Vec<f32>,
    pivots: Vec<f32>,
    /// A scale per sub-block and row.
    steps: Vec<f32>,
}

impl Case {
    fn new(rows: usize, width: usize, sub: usize) -> Self {
        let half = |values: Vec<f32>| values.into_iter().map(|x| x * 0.1).collect();
        let symmetric = |at: usize| {
            let (i, j) = (at / width, at % width);
            match i == j {
                true => 1.0,
                false => numbers(1, (i.min(j) * width + i.max(j)) as u64)[0] * 0.05,
            }
        };
        let steps = numbers(rows * width / sub, 5).into_iter();
        Self {
            rows,
            width,
            sub,
            wanted: numbers(rows * width, 1),
            repairs: half(numbers(rows * width, 2)),
            matrix: (0..width * width).map(symmetric).collect(),
            pivots: numbers(width, 4).into_iter().map(|x| x.abs()).collect(),
            steps: steps.map(|x| 0.2 + 0.05 * x).collect(),
        }
    }

    fn grid(&self) -> FeedbackGrid {
        FeedbackGrid {
            sub: self.sub,
            ..PRESET
        }
    }

    fn step(&self, column: usize, row: usize) -> f64 {
        f64::from(self.steps[column / self.sub * self.rows + row])
    }

    /// `[sub-block][d, dmin, scale, min][row]`.
    fn scales(&self) -> Vec<f32> {
        let subs = self.steps.chunks(self.rows.max(1));
        let constant = |value: f32| vec![value; self.rows];
        subs.flat_map(|d| [d.to_vec(), constant(0.0), constant(1.0), constant(0.0)].concat())
            .collect()
    }

    fn begin(&self, device: &Device) -> FeedbackRows {
        let room = device.feedback_rows(self.rows, self.width, self.sub);
        let mut rows = room.unwrap();
        let scales = self.scales();
        device
            .feedback_begin(&mut rows, self.rows, &self.wanted, Some(&scales))
            .unwrap();
        rows
    }

    fn sweep(&self, device: &Device) -> FeedbackRows {
        let mut rows = self.begin(device);
        let [repairs, matrix, pivots] =
            [&self.repairs, &self.matrix, &self.pivots].map(|values| device.upload(values));
        device
            .feedback_sweep(
                &self.grid(),
                &mut rows,
                0..self.width,
                &repairs.unwrap(),
                (&matrix.unwrap(), 0),
                &pivots.unwrap(),
            )
            .unwrap();
        rows
    }

    /// Values and errors of one row.
    fn swept(&self, row: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut values, mut errors) = (Vec::new(), Vec::<f64>::new());
        for j in 0..self.width {
            let at = j * self.rows + row;
            let wanted = f64::from(self.wanted[at]);
            let feedback = errors
                .iter()
                .enumerate()
                .map(|(i, error)| error * f64::from(self.matrix[i * self.width + j]));
            let target = wanted + f64::from(self.repairs[at]) + feedback.sum::<f64>();
            let step = self.step(j, row);
            values.push((target / step).clamp(-8.0, 7.0).round_ties_even());
            errors.push(wanted - step * values[j]);
        }
        (values, errors)
    }

    /// `E M` of a row.
    fn gradient(&self, errors: &[f64]) -> Vec<f64> {
        let column = |j: usize| {
            let terms = errors.iter().enumerate();
            terms
                .map(|(i, error)| error * f64::from(self.matrix[i * self.width + j]))
                .sum()
        };
        (0..self.width).map(column).collect()
    }

    /// The same after a pass over the codes.
    fn descended(&self, row: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut values, mut errors) = self.swept(row);
        for j in 0..self.width {
            let gradient = self.gradient(&errors)[j];
            let curvature = f64::from(self.matrix[j * self.width + j]);
            let wanted = f64::from(self.wanted[j * self.rows + row]);
            let step = self.step(j, row);
            let target = wanted - errors[j] + gradient / curvature;
            let value = (target / step).clamp(-8.0, 7.0).round_ties_even();
            let error = wanted - step * value;
            let change = error - errors[j];
            if change * (2.0 * gradient + change * curvature) < 0.0 {
                (values[j], errors[j]) = (value, error);
            }
        }
        (values, errors)
    }

    /// Rows as `[column, row]`.
    fn by_column(&self, row: impl Fn(usize) -> Vec<f64>) -> Vec<f64> {
        let rows: Vec<Vec<f64>> = (0..self.rows).map(row).collect();
        let column = |j: usize| rows.iter().map(move |row| row[j]);
        (0..self.width).flat_map(column).collect()
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let sizes = [
        (0, 32, 32),
        (1, 32, 32),
        (67, 32, 16),
        (5, 256, 64),
        (3, 128, 128),
        (33, 160, 32),
    ];
    sizes
        .into_iter()
        .map(|(rows, width, sub)| Case::new(rows, width, sub))
}

#[test]
fn errors_are_repaired_by_later_columns() {
    for (name, device) in all() {
        for case in cases() {
            let rows = case.sweep(&device);
            let (values, errors) = (
                device.download_all(&rows.values).unwrap(),
                device.download_all(&rows.errors).unwrap(),
            );
            check(
                &name,
                &values,
                &case.by_column(|row| case.swept(row).0),
                0.0,
            );
            let expected = case.by_column(|row| case.swept(row).1);
            check(&name, &errors, &expected, TOLERANCE);
        }
    }
}

#[test]
fn codes_move_to_where_the_loss_is_least() {
    for (name, device) in all() {
        for case in cases() {
            let mut rows = case.sweep(&device);
            let gradient = case.by_column(|row| case.gradient(&case.swept(row).1));
            let gradient: Vec<f32> = gradient.into_iter().map(|x| x as f32).collect();
            let gradient = device.upload(&gradient).unwrap();
            let matrix = device.upload(&case.matrix).unwrap();
            let chunk = 0..case.width;
            let grid = case.grid();
            device
                .feedback_descent(&grid, &mut rows, chunk, &gradient, (&matrix, 0))
                .unwrap();
            let values = device.download_all(&rows.values).unwrap();
            let expected = case.by_column(|row| case.descended(row).0);
            check(&name, &values, &expected, 0.0);
            let before = case.by_column(|row| case.swept(row).0);
            assert!(case.rows < 2 || expected != before, "{name}: nothing moves");
            let errors = device.download_all(&rows.errors).unwrap();
            let expected = case.by_column(|row| case.descended(row).1);
            check(&name, &errors, &expected, TOLERANCE);
        }
    }
}

#[test]
fn losses_are_summed_without_loss() {
    for (name, device) in all() {
        for case in cases() {
            let rows = case.sweep(&device);
            let gradient = device.upload(&case.repairs).unwrap();
            let begun: Vec<f32> = (0..case.rows).flat_map(|_| [1e6, 0.25]).collect();
            let mut losses = device.upload(&begun).unwrap();
            device
                .feedback_loss(&rows, 0..case.width, &gradient, &mut losses)
                .unwrap();
            let found = device.download_all(&losses).unwrap();
            for (row, pair) in found.chunks_exact(2).enumerate() {
                let (_, errors) = case.swept(row);
                let terms = errors.iter().enumerate();
                let sum: f64 = terms
                    .map(|(j, error)| error * f64::from(case.repairs[j * case.rows + row]))
                    .sum();
                let found = f64::from(pair[0]) + f64::from(pair[1]) - 1e6 - 0.25;
                let scale = errors.iter().map(|error| error.abs()).sum::<f64>();
                assert!(
                    (found - sum).abs() < TOLERANCE * scale,
                    "{name}: row {row} loses {found}, expected {sum}"
                );
            }
        }
    }
}
