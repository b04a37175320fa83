//! Second opinion on gradients: central differences of naive f64 twins.

/// Largest difference, relative to the largest derivative.
const TOLERANCE: f64 = 2e-5;

/// Seeded values in [-1, 1).
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| {
        let hash = xxhash_rust::xxh3::xxh3_64_with_seed(&i.to_le_bytes(), seed);
        (hash >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(value).collect()
}

/// The same values in f64.
pub fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// `sum x y`.
pub fn dot(x: &[f64], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| x * f64::from(*y)).sum()
}

/// `x / (1 + e^-x)`.
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `found` is the gradient of `loss` at `at`.
#[track_caller]
pub fn check(at: &[f32], found: &[f32], loss: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(at.len(), found.len());
    let moved = |i: usize, by: f64| {
        let mut at = widened(at);
        at[i] += by;
        loss(&at)
    };
    let derivative = |i| (moved(i, STEP) - moved(i, -STEP)) / (2.0 * STEP);
    let expected: Vec<f64> = (0..at.len()).map(derivative).collect();
    let largest = expected.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
    assert!(largest > 1e-3, "nothing depends on the input");
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (f64::from(*found) - expected).abs() / largest;
        assert!(error < TOLERANCE, "{i}: {found} {expected} of {largest}");
    }
}
