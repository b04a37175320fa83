//! What columns of rows come to, and how large values are.
//!
//! Enters: f32 rows. Leaves: sums in f64 over rows in order, counts. They do not depend on threads.

use crate::backend::ColumnSums;
use crate::backend::magnitudes::Magnitudes;
use crate::parallel;

/// Columns that a thread sums up.
const COLUMNS: usize = 64;
/// Values that a thread counts.
const PART: usize = 1 << 16;

pub fn column_sums(rows: &[f32], n: usize) -> ColumnSums {
    let mut all = ColumnSums {
        sums: vec![0.0; n],
        squares: vec![0.0; n],
        max_abs: vec![0.0; n],
    };
    let sums = all.sums.chunks_mut(COLUMNS);
    let squares = all.squares.chunks_mut(COLUMNS);
    let parts = sums.zip(squares).zip(all.max_abs.chunks_mut(COLUMNS));
    parallel::for_each(parts.enumerate(), |(part, ((sums, squares), max_abs))| {
        for row in rows.chunks_exact(n) {
            let columns = sums.iter_mut().zip(&mut *squares).zip(&mut *max_abs);
            for (((sum, square), max), x) in columns.zip(&row[part * COLUMNS..]) {
                let value = f64::from(*x);
                *sum += value;
                *square += value * value;
                *max = max.max(x.abs());
            }
        }
    });
    all
}

pub fn magnitudes(values: &[f32]) -> Magnitudes {
    let mut all = Magnitudes::default();
    let parts = parallel::map(values.chunks(PART), Magnitudes::of);
    parts.into_iter().for_each(|part| all.merge(part));
    all
}
