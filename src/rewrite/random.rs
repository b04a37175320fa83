//! Seeded numbers that are the same on every machine.
//!
//! Source: SplitMix64, Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.

/// The state.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// 1 or -1.
    pub fn next_sign(&mut self) -> f64 {
        match self.next_bits() >> 63 {
            0 => 1.0,
            _ => -1.0,
        }
    }

    /// Evenly distributed in [-1, 1), 53 bits.
    pub fn next_uniform(&mut self) -> f64 {
        (self.next_bits() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}
