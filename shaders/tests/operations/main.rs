//! One table of cases, every operation against plain loops in f64, on every device that is there: odd sizes, tails, no
//! rows, values that are no numbers.

mod columns;
mod doubles;
mod drivers;
mod feedback;
mod matmul;
mod minima;
mod mixers;
mod page;
mod rows;
mod softmax;
mod split;
mod stored;
mod values;

/// Numbers from -2 to 2 that look random and are the same everywhere.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// Largest difference from what is expected, relative to the largest expected magnitude.
pub const TOLERANCE: f64 = 2e-6;

/// Every value is what is expected, within `tolerance` of the largest.
#[track_caller]
pub fn check(device: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{device}");
    let largest = expected.iter().fold(1e-30_f64, |max, x| max.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let distance = (f64::from(*found) - expected).abs() / largest;
        let is_same_nan = found.is_nan() && expected.is_nan();
        assert!(
            is_same_nan || distance <= tolerance,
            "{device}: value {index} is {found}, expected {expected}"
        );
    }
}
