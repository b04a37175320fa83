//! How large values are: a histogram whose bins are fixed, so that parts can be added in any number and order.
//!
//! Enters: values, or counts of a device. Leaves: counts by magnitude. Chooses nothing.

/// Bins per factor of two: a bin is at most a sixteenth wider than its lower edge.
const BINS_PER_OCTAVE: u32 = 16;
/// Bits of an f32 below those that number the bins.
pub const SHIFT: u32 = 23 - BINS_PER_OCTAVE.ilog2();
/// The first bin: magnitudes below 2^-24 fall into it, those above 2^40 into the last.
pub const LEAST: u32 = (127 - 24) << 23 >> SHIFT;
/// How many there are.
pub const BINS: usize = 64 * BINS_PER_OCTAVE as usize;

/// Counts of magnitudes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Magnitudes(Vec<u64>);

impl Default for Magnitudes {
    fn default() -> Self {
        Self(vec![0; BINS])
    }
}

impl Magnitudes {
    /// Counts of [`BINS`] bins.
    #[cfg(feature = "device")]
    pub fn of_counts(counts: Vec<u32>) -> Self {
        assert_eq!(counts.len(), BINS);
        Self(counts.into_iter().map(u64::from).collect())
    }

    /// Of these values; those that are no numbers are left out.
    pub fn of(values: &[f32]) -> Self {
        let mut magnitudes = Self::default();
        for value in values.iter().filter(|value| value.is_finite()) {
            let bin = (value.abs().to_bits() >> SHIFT).saturating_sub(LEAST) as usize;
            magnitudes.0[bin.min(BINS - 1)] += 1;
        }
        magnitudes
    }

    /// Adds those of other values.
    pub fn merge(&mut self, others: Self) {
        let pairs = self.0.iter_mut().zip(others.0);
        pairs.for_each(|(count, other)| *count += other);
    }

    /// Bins that hold something, from small to large: lower and upper edge, count.
    pub fn bins(&self) -> impl Iterator<Item = (f64, f64, u64)> + Clone + '_ {
        let edge = |bin: usize| f64::from(f32::from_bits((LEAST + bin as u32) << SHIFT));
        let counts = self.0.iter().enumerate();
        counts
            .filter(|(_, count)| **count > 0)
            .map(move |(bin, count)| match bin {
                0 => (0.0, edge(1), *count),
                bin => (edge(bin), edge(bin + 1), *count),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_within_their_bins() {
        for value in [1e-12f32, 3e-7, 0.1, 1.0, 1.06, 1.07, -7.3, 5e11] {
            let magnitudes = Magnitudes::of(&[value, f32::NAN, f32::INFINITY]);
            let bins: Vec<_> = magnitudes.bins().collect();
            let &[(low, high, 1)] = &bins[..] else {
                panic!("{value}: {bins:?}");
            };
            let size = f64::from(value.abs());
            assert!(low <= size && size < high, "{value}: {low} {high}");
            assert!(low == 0.0 || high <= low * 1.0625, "{value}: {low} {high}");
        }
        let mut parts = Magnitudes::of(&[0.0, 2.0]);
        parts.merge(Magnitudes::of(&[2.0]));
        assert_eq!(parts, Magnitudes::of(&[2.0, 2.0, 0.0]));
        assert_eq!(parts.bins().last(), Some((2.0, 2.125, 2)));
    }
}
