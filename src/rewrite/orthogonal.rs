//! Orthogonal matrices of any size: Hadamard where one is known, random otherwise.
//!
//! Enters: a size and a seed. Leaves: a matrix whose rows are orthonormal to f64 precision, the same on every machine.
//!
//! Source: R. E. A. C. Paley, "On orthogonal matrices", 1933; Sylvester's doubling.

use super::matrix::SquareMatrix;
use super::random::SplitMix64;

/// Whether every entry of [`hadamard`] of this size is `+-1 / sqrt(size)`.
pub fn has_hadamard(size: usize) -> bool {
    base(size).is_some()
}

/// A normalized Hadamard matrix `H_2^a (x) H_m`, `m` of Paley's first or second construction; where none is known, of
/// the odd part a seeded random orthogonal matrix.
pub fn hadamard(size: usize, seed: u64) -> SquareMatrix {
    let (doublings, core) = match base(size) {
        Some((doublings, base)) => (doublings, base.matrix()),
        None => {
            let doublings = size.trailing_zeros();
            (doublings, random(size >> doublings, seed).values().to_vec())
        }
    };
    let doubled = (0..doublings).fold(core, |matrix, _| double(&matrix));
    let norms = doubled.chunks_exact(size.max(1));
    let mut values = Vec::with_capacity(doubled.len());
    for row in norms {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        values.extend(row.iter().map(|x| x / norm));
    }
    SquareMatrix::new(size, values)
}

/// Signs of a diagonal, seeded.
pub fn signs(size: usize, seed: u64) -> Vec<f64> {
    let mut random = SplitMix64::new(seed);
    (0..size).map(|_| random.next_sign()).collect()
}

/// Seeded random rows, made orthonormal one after the other, twice for precision (modified Gram-Schmidt).
pub fn random(size: usize, seed: u64) -> SquareMatrix {
    let mut random = SplitMix64::new(seed);
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(size);
    while rows.len() < size {
        let mut row: Vec<f64> = (0..size).map(|_| random.next_uniform()).collect();
        for other in rows.iter().chain(&rows) {
            let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        // A row that hardly leaves the span of the others is drawn again.
        if norm > 1e-6 {
            rows.push(row.iter().map(|x| x / norm).collect());
        }
    }
    SquareMatrix::new(size, rows.concat())
}

/// A Hadamard matrix that is not a doubling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    One,
    /// Of size `q + 1`, q a prime, 3 modulo 4.
    PaleyI(usize),
    /// Of size `2 (q + 1)`, q a prime, 1 modulo 4.
    PaleyII(usize),
}

/// `size` as doublings of a base, the smallest there is.
fn base(size: usize) -> Option<(u32, Base)> {
    if size == 0 {
        return None;
    }
    let doublings = (0..=size.trailing_zeros()).rev();
    doublings
        .filter_map(|doublings| Some((doublings, base_of(size >> doublings)?)))
        .next()
}

fn base_of(size: usize) -> Option<Base> {
    if size == 1 {
        return Some(Base::One);
    }
    let is_prime = |q: usize| {
        q > 2
            && (2..)
                .take_while(|d| d * d <= q)
                .all(|d| !q.is_multiple_of(d))
    };
    if size.is_multiple_of(4) && is_prime(size - 1) {
        return Some(Base::PaleyI(size - 1));
    }
    let q = (size / 2).checked_sub(1)?;
    (size.is_multiple_of(4) && q % 4 == 1 && is_prime(q)).then_some(Base::PaleyII(q))
}

impl Base {
    /// Entries 1 and -1, row-major.
    fn matrix(self) -> Vec<f64> {
        match self {
            Self::One => vec![1.0],
            Self::PaleyI(q) => paley_i(q),
            Self::PaleyII(q) => paley_ii(q),
        }
    }
}

/// `[[H, H], [H, -H]]`.
fn double(matrix: &[f64]) -> Vec<f64> {
    let size = matrix.len().isqrt();
    let mut doubled = Vec::with_capacity(4 * matrix.len());
    for sign in [1.0, -1.0] {
        for row in matrix.chunks_exact(size.max(1)) {
            doubled.extend_from_slice(row);
            doubled.extend(row.iter().map(|x| sign * x));
        }
    }
    doubled
}

/// Quadratic character of every residue modulo the prime `q`: 0, 1 or -1.
fn character(q: usize) -> Vec<f64> {
    let mut character = vec![-1.0; q];
    for root in 1..q {
        character[root * root % q] = 1.0;
    }
    character[0] = 0.0;
    character
}

/// The conference matrix bordered with ones, `sign` on the left border: `[[0, 1], [sign, Q]]`, `Q_ij = chi(i - j)`.
fn conference(q: usize, sign: f64) -> Vec<f64> {
    let character = character(q);
    let size = q + 1;
    let mut matrix = vec![0.0; size * size];
    for row in 0..size {
        for column in 0..size {
            matrix[row * size + column] = match (row, column) {
                (0, 0) => 0.0,
                (0, _) => 1.0,
                (_, 0) => sign,
                _ => character[(q + row - column) % q],
            };
        }
    }
    matrix
}

/// `I + S` with the skew conference matrix S.
fn paley_i(q: usize) -> Vec<f64> {
    let mut matrix = conference(q, -1.0);
    for index in 0..=q {
        matrix[index * (q + 1) + index] += 1.0;
    }
    matrix
}

/// `C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]` with the symmetric conference matrix C.
fn paley_ii(q: usize) -> Vec<f64> {
    let conference = conference(q, 1.0);
    let (half, size) = (q + 1, 2 * (q + 1));
    let mut matrix = vec![0.0; size * size];
    for row in 0..half {
        for column in 0..half {
            let entry = conference[row * half + column];
            let block = match row == column {
                true => [[1.0, -1.0], [-1.0, -1.0]],
                false => [[entry, entry], [entry, -entry]],
            };
            for (i, block) in block.iter().enumerate() {
                for (j, value) in block.iter().enumerate() {
                    matrix[(2 * row + i) * size + 2 * column + j] = *value;
                }
            }
        }
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(size: usize, is_hadamard: bool) {
        let matrix = hadamard(size, 7);
        assert_eq!(has_hadamard(size), is_hadamard, "{size}");
        let gram = matrix.times(&SquareMatrix::new(size, matrix.transposed().to_vec()));
        for row in 0..size {
            for column in 0..size {
                let expected = f64::from(row == column);
                let found = gram.row(row)[column];
                assert!(
                    (found - expected).abs() < 1e-13,
                    "{size}: [{row}, {column}] {found}"
                );
            }
        }
        if is_hadamard {
            let entry = 1.0 / (size as f64).sqrt();
            let values = matrix.values().iter();
            assert!(values.into_iter().all(|x| (x.abs() - entry).abs() < 1e-15));
        }
    }

    #[test]
    fn rows_are_orthonormal_at_any_size() {
        for size in [1, 2, 4, 12, 20, 36, 64, 84, 128, 140, 196] {
            check(size, true);
        }
        for size in [3, 6, 9, 21, 22, 34, 172 / 4] {
            check(size, false);
        }
    }

    #[test]
    fn widths_of_the_family_have_one() {
        for size in [2688, 3136, 4096, 4480, 5120, 8192, 256, 4608, 2816, 3328] {
            assert!(has_hadamard(size), "{size}");
        }
    }

    #[test]
    fn signs_follow_the_seed() {
        assert_eq!(signs(64, 1), signs(64, 1));
        assert_ne!(signs(64, 1), signs(64, 2));
    }
}
