//! Numbers that look random, and comparison with plain loops in f64.

/// Values from -1 to 1.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

pub fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|word| f32::from_bits(*word)).collect()
}

/// What no kernel may read.
pub fn unknown(count: usize) -> Vec<u32> {
    vec![f32::NAN.to_bits(); count]
}

/// Largest deviation allowed, relative to the largest expected magnitude.
pub fn assert_close(found: &[u32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-30, |max: f64, x| max.max(x.abs()));
    for (i, (found, expected)) in floats(found).iter().zip(expected).enumerate() {
        let deviation = (f64::from(*found) - expected).abs() / largest;
        assert!(
            deviation <= tolerance,
            "value {i}: expected {expected}, found {found}"
        );
    }
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}
