//! Eigenvectors of a symmetric matrix.
//!
//! Enters: a symmetric matrix in f64. Leaves: its eigenvalues, largest first, and orthonormal eigenvectors, the same
//! bits on every CPU and for any number of threads: sums run in a fixed order, and of the mathematical functions only the
//! square root is used, which is exact everywhere.
//!
//! Source: Householder tridiagonalization and QL with implicit shifts, Golub and Van Loan, "Matrix Computations",
//! sections 8.3.1 and 8.3.3; EISPACK `tred2` and `tql2`. The reflections and rotations act on columns of the vectors
//! that know nothing of each other, so they are recorded and then applied to panels of columns in parallel.

use super::matrix::SquareMatrix;
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::multiversion::multiversion;
use crate::parallel;

/// Partial sums of a dot product; fixed, so that its bits do not depend on the width of vectors.
const LANES: usize = 8;
/// Columns of the vectors that a task carries through all rotations.
const PANEL: usize = 32;
/// Rows of the matrix that a task reflects.
const ROWS: usize = 16;
/// Rotations that are recorded before they are applied.
const BATCH: usize = 1 << 16;
/// Sweeps for one eigenvalue; two are usual.
const MAX_SWEEPS: usize = 60;

/// Decomposes a symmetric matrix, of which only the lower triangle counts: `matrix = V diag(values) V^T`. Values come
/// largest first; column i of V belongs to value i, and its first entry that is not tiny is positive. `None` if the matrix
/// holds a value that is not finite or the iteration does not end, which finite matrices have not been seen to do.
pub fn symmetric(matrix: &SquareMatrix) -> Option<(Vec<f64>, SquareMatrix)> {
    if !matrix.values().iter().all(|value| value.is_finite()) {
        return None;
    }
    let size = matrix.size();
    let mut tridiagonal = Tridiagonal::of(matrix);
    let mut panels: Vec<Panel> = (0..size)
        .step_by(PANEL)
        .map(|first| Panel::identity(size, first))
        .collect();
    let reflections = std::mem::take(&mut tridiagonal.reflections);
    parallel::for_each(&mut panels, |panel| {
        let isa = Isa::detect();
        reflections.iter().for_each(|r| panel.reflect(isa, r));
    });
    tridiagonal.diagonalize(&mut panels)?;
    Some(sorted(tridiagonal.diagonal, &panels))
}

/// Puts the largest value first and fixes the sign of every vector.
fn sorted(values: Vec<f64>, panels: &[Panel]) -> (Vec<f64>, SquareMatrix) {
    let size = values.len();
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    let mut vectors = vec![0.0; size * size];
    for (column, from) in order.iter().enumerate() {
        let entry = |row: usize| panels[row / PANEL].values[from * PANEL + row % PANEL];
        let first = (0..size).map(entry).find(|entry| entry.abs() > 1e-8);
        let sign = match first {
            Some(entry) if entry < 0.0 => -1.0,
            _ => 1.0,
        };
        for row in 0..size {
            vectors[row * size + column] = sign * entry(row);
        }
    }
    let values = order.iter().map(|index| values[*index]).collect();
    (values, SquareMatrix::new(size, vectors))
}

/// `I - beta v v^T`, `v` zero before `first`.
struct Reflection {
    first: usize,
    vector: Vec<f64>,
    beta: f64,
}

/// Some columns of the transposed vectors: entry `[vector][column]`.
struct Panel {
    values: Vec<f64>,
}

/// Mixes vectors `index` and `index + 1`.
#[derive(Clone, Copy)]
struct Rotation {
    index: usize,
    cosine: f64,
    sine: f64,
}

impl Panel {
    fn identity(size: usize, first: usize) -> Self {
        let mut values = vec![0.0; size * PANEL];
        for column in 0..PANEL.min(size - first) {
            values[(first + column) * PANEL + column] = 1.0;
        }
        Self { values }
    }

    fn reflect(&mut self, isa: Isa, reflection: &Reflection) {
        let values = &mut self.values[reflection.first * PANEL..];
        reflect(isa, values, &reflection.vector, reflection.beta);
    }
}

multiversion! {
    /// Applies a reflection to every column of a panel.
    fn reflect(values: &mut [f64], vector: &[f64], beta: f64) = reflect_body;
}

#[inline(always)]
fn reflect_body(values: &mut [f64], vector: &[f64], beta: f64) {
    let (rows, _) = values.as_chunks_mut::<PANEL>();
    let mut dots = [0.0; PANEL];
    for (row, v) in rows.iter().zip(vector) {
        for (dot, x) in dots.iter_mut().zip(row) {
            *dot += x * v;
        }
    }
    for (row, v) in rows.iter_mut().zip(vector) {
        let factor = beta * v;
        for (x, dot) in row.iter_mut().zip(&dots) {
            *x -= factor * dot;
        }
    }
}

multiversion! {
    /// Applies rotations to every column of a panel.
    fn rotate(values: &mut [f64], rotations: &[Rotation]) = rotate_body;
}

#[inline(always)]
fn rotate_body(values: &mut [f64], rotations: &[Rotation]) {
    let (rows, _) = values.as_chunks_mut::<PANEL>();
    for rotation in rotations {
        let Rotation { cosine, sine, .. } = *rotation;
        let Some([low, high]) = rows.get_mut(rotation.index..rotation.index + 2) else {
            continue;
        };
        for (low, high) in low.iter_mut().zip(high) {
            let (a, b) = (*low, *high);
            *high = sine * a + cosine * b;
            *low = cosine * a - sine * b;
        }
    }
}

multiversion! {
    /// Sum of products.
    fn dot(a: &[f64], b: &[f64]) -> f64 = dot_body;
}

#[inline(always)]
fn dot_body(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    rest.fold(sums.iter().sum(), |sum, product| sum + product)
}

multiversion! {
    /// `row -= a v + b w`.
    fn subtract(row: &mut [f64], a: f64, v: &[f64], b: f64, w: &[f64]) = subtract_body;
}

#[inline(always)]
fn subtract_body(row: &mut [f64], a: f64, v: &[f64], b: f64, w: &[f64]) {
    for ((x, v), w) in row.iter_mut().zip(v).zip(w) {
        *x -= a * v + b * w;
    }
}

/// A tridiagonal matrix and the reflections that led to it.
struct Tridiagonal {
    diagonal: Vec<f64>,
    /// Entry i is beside diagonal entries i and i + 1; the last is 0.
    beside: Vec<f64>,
    reflections: Vec<Reflection>,
}

impl Tridiagonal {
    fn of(matrix: &SquareMatrix) -> Self {
        let size = matrix.size();
        let mut rows: Vec<Vec<f64>> = (0..size)
            .map(|row| {
                let below = |column: usize| match column <= row {
                    true => matrix.row(row)[column],
                    false => matrix.row(column)[row],
                };
                (0..size).map(below).collect()
            })
            .collect();
        let mut beside = vec![0.0; size];
        let mut reflections = Vec::new();
        for step in 0..size.saturating_sub(2) {
            let first = step + 1;
            let column: Vec<f64> = rows[step][first..].to_vec();
            let (reflection, norm) = reflection(first, column);
            beside[step] = norm;
            let Some(reflection) = reflection else {
                continue;
            };
            reflect_both_sides(&mut rows[first..], &reflection);
            reflections.push(reflection);
        }
        if size > 1 {
            beside[size - 2] = rows[size - 1][size - 2];
        }
        let diagonal = rows.iter().enumerate().map(|(i, row)| row[i]).collect();
        Self {
            diagonal,
            beside,
            reflections,
        }
    }

    /// Makes everything beside the diagonal vanish, and applies to the panels what does it.
    fn diagonalize(&mut self, panels: &mut [Panel]) -> Option<()> {
        let mut recorded = Vec::new();
        for index in 0..self.diagonal.len() {
            for sweep in 0.. {
                let end = self.end_of_part(index);
                if end == index {
                    break;
                }
                if sweep == MAX_SWEEPS {
                    return None;
                }
                self.sweep(index, end, &mut recorded);
                if recorded.len() >= BATCH {
                    apply(panels, &mut recorded);
                }
            }
        }
        apply(panels, &mut recorded);
        Some(())
    }

    /// The last row of the part that still hangs together from `index` on.
    fn end_of_part(&self, index: usize) -> usize {
        let last = self.diagonal.len() - 1;
        let is_split = |row: &usize| {
            let near = self.diagonal[*row].abs() + self.diagonal[row + 1].abs();
            self.beside[*row].abs() <= f64::EPSILON * near
        };
        (index..last).find(is_split).unwrap_or(last)
    }

    /// One QL sweep with Wilkinson's shift over rows `first..=last`.
    fn sweep(&mut self, first: usize, last: usize, recorded: &mut Vec<Rotation>) {
        let (d, e) = (&mut self.diagonal, &mut self.beside);
        let ratio = (d[first + 1] - d[first]) / (2.0 * e[first]);
        let root = length(ratio, 1.0).copysign(ratio);
        let mut g = d[last] - d[first] + e[first] / (ratio + root);
        let (mut sine, mut cosine, mut shift) = (1.0, 1.0, 0.0);
        for index in (first..last).rev() {
            let f = sine * e[index];
            let b = cosine * e[index];
            let r = length(f, g);
            e[index + 1] = r;
            if r == 0.0 {
                // The part has split by underflow; the sweep ends here.
                d[index + 1] -= shift;
                e[last] = 0.0;
                return;
            }
            sine = f / r;
            cosine = g / r;
            g = d[index + 1] - shift;
            let r = (d[index] - g) * sine + 2.0 * cosine * b;
            shift = sine * r;
            d[index + 1] = g + shift;
            g = cosine * r - b;
            recorded.push(Rotation {
                index,
                cosine,
                sine,
            });
        }
        d[first] -= shift;
        e[first] = g;
        e[last] = 0.0;
    }
}

fn apply(panels: &mut [Panel], recorded: &mut Vec<Rotation>) {
    let rotations = std::mem::take(recorded);
    parallel::for_each(panels, |panel| {
        rotate(Isa::detect(), &mut panel.values, &rotations);
    });
}

/// `sqrt(a^2 + b^2)` without overflow.
fn length(a: f64, b: f64) -> f64 {
    let (a, b) = (a.abs(), b.abs());
    let (large, small) = if a > b { (a, b) } else { (b, a) };
    if large == 0.0 {
        return 0.0;
    }
    let ratio = small / large;
    large * (1.0 + ratio * ratio).sqrt()
}

/// The reflection that makes `column` a multiple of the first unit vector, and that multiple; no reflection where the
/// column already is one.
fn reflection(first: usize, mut column: Vec<f64>) -> (Option<Reflection>, f64) {
    let scale = column.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    let is_done = column[1..].iter().all(|x| *x == 0.0);
    if is_done {
        return (None, column[0]);
    }
    column.iter_mut().for_each(|x| *x /= scale);
    let norm = dot_body(&column, &column).sqrt().copysign(column[0]);
    column[0] += norm;
    let beta = 1.0 / (norm * column[0]);
    let reflection = Reflection {
        first,
        vector: column,
        beta,
    };
    (Some(reflection), -norm * scale)
}

/// `A <- H A H` of the rows from `first` on.
fn reflect_both_sides(rows: &mut [Vec<f64>], reflection: &Reflection) {
    let Reflection {
        first,
        vector,
        beta,
    } = reflection;
    let isa = Isa::detect();
    let mut products = vec![0.0; rows.len()];
    let parts = products.chunks_mut(ROWS).zip(rows.chunks(ROWS));
    parallel::for_each(parts, |(products, rows)| {
        for (product, row) in products.iter_mut().zip(rows) {
            *product = beta * dot(isa, &row[*first..], vector);
        }
    });
    let half = 0.5 * beta * dot(isa, &products, vector);
    let pairs = products.iter_mut().zip(vector);
    pairs.for_each(|(product, v)| *product -= half * v);
    let factors = vector.chunks(ROWS).zip(products.chunks(ROWS));
    parallel::for_each(rows.chunks_mut(ROWS).zip(factors), |(rows, factors)| {
        let factors = factors.0.iter().zip(factors.1);
        for (row, (v, product)) in rows.iter_mut().zip(factors) {
            subtract(isa, &mut row[*first..], *v, &products, *product, vector);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::random::SplitMix64;
    use super::*;

    fn random_symmetric(size: usize, rank: usize) -> SquareMatrix {
        let mut random = SplitMix64::new(5);
        let mut values = vec![0.0; size * size];
        for _ in 0..rank {
            let v: Vec<f64> = (0..size).map(|_| random.next_uniform()).collect();
            for row in 0..size {
                for column in 0..size {
                    values[row * size + column] += v[row] * v[column];
                }
            }
        }
        SquareMatrix::new(size, values)
    }

    fn check(matrix: &SquareMatrix) {
        let size = matrix.size();
        let (values, vectors) = symmetric(matrix).unwrap();
        let largest = values.iter().fold(1e-300_f64, |max, x| max.max(x.abs()));
        assert!(values.is_sorted_by(|a, b| a >= b));
        let image = matrix.times(&vectors);
        let transposed = SquareMatrix::new(size, vectors.transposed().to_vec());
        let gram = transposed.times(&vectors);
        for row in 0..size {
            for (column, value) in values.iter().enumerate() {
                let expected = value * vectors.row(row)[column];
                let found = image.row(row)[column];
                assert!((found - expected).abs() < 1e-13 * largest * size as f64);
                let found = gram.row(row)[column] - f64::from(row == column);
                assert!(found.abs() < 1e-13, "[{row}, {column}] of {size}: {found}");
            }
        }
    }

    #[test]
    fn vectors_diagonalize() {
        for (size, rank) in [(1, 1), (2, 2), (3, 1), (33, 40), (64, 20), (130, 300)] {
            check(&random_symmetric(size, rank));
        }
        check(&SquareMatrix::new(3, vec![0.0; 9]));
        let diagonal = (0..25)
            .map(|i| f64::from(i % 6 == 0) * f64::from(i))
            .collect();
        check(&SquareMatrix::new(5, diagonal));
    }

    #[test]
    fn instructions_change_no_bit() {
        let matrix = random_symmetric(45, 60);
        let of = |isa| {
            let (mut row, mut panel) = (
                matrix.row(0).to_vec(),
                matrix.values()[..8 * PANEL].to_vec(),
            );
            let rotation = Rotation {
                index: 3,
                cosine: 0.6,
                sine: 0.8,
            };
            subtract(isa, &mut row, 0.3, matrix.row(1), 0.7, matrix.row(2));
            reflect(isa, &mut panel, &row[..8], 0.1);
            rotate(isa, &mut panel, &[rotation]);
            (dot(isa, matrix.row(3), &row), row, panel)
        };
        assert_eq!(of(Isa::Portable), of(Isa::detect()));
    }

    #[test]
    fn threads_change_nothing() {
        let matrix = random_symmetric(100, 150);
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            pool.install(|| symmetric(&matrix)).unwrap()
        };
        assert_eq!(of(1), of(3));
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let matrix = SquareMatrix::new(2, vec![1.0, 0.0, f64::NAN, 1.0]);
        assert!(symmetric(&matrix).is_none());
    }
}
