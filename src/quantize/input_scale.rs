//! The one scale of inputs that are taken as 8-bit integers.
//!
//! Enters: how often inputs are how large. Leaves: where they are clipped. Knows no network.

/// Steps from 0 to the largest code.
pub const INPUT_STEPS: f64 = 127.0;

/// Clips that are tried, as shares of the largest magnitude: from all of it downwards.
const SHARES: usize = 200;
/// Each is so much smaller than the one before: the last is a twentieth of the largest.
const NEXT: f64 = 0.985;

/// The magnitude that the largest code should stand for: where the squared error of rounding and clipping together is
/// least, the larger of equal ones.
///
/// `bins`: lower edge, upper edge, count, within which magnitudes are taken as spread evenly; `largest`: where they end.
pub fn least_error_clip(bins: impl Iterator<Item = (f64, f64, u64)> + Clone, largest: f32) -> f32 {
    let largest = f64::from(largest);
    let (mut best, mut least) = (largest, f64::INFINITY);
    let mut clip = largest;
    for _ in 0..SHARES {
        let error = squared_error(bins.clone(), clip / INPUT_STEPS, largest);
        if error < least {
            (best, least) = (clip, error);
        }
        clip *= NEXT;
    }
    best as f32
}

/// Sum of squared errors of magnitudes that are rounded to whole steps, at most [`INPUT_STEPS`] of them.
fn squared_error(bins: impl Iterator<Item = (f64, f64, u64)>, step: f64, largest: f64) -> f64 {
    let errors = bins.map(|(low, high, count)| {
        let (low, high) = (low / step, high.min(largest) / step);
        let mean = match high > low {
            true => (integral(high) - integral(low)) / (high - low),
            // All of them at one place.
            false => (low - low.round().min(INPUT_STEPS)).powi(2),
        };
        count as f64 * mean
    });
    errors.sum::<f64>() * step * step
}

/// Of the squared distance to the nearest code, from 0 to `x` steps: a twelfth per whole step, and what is left.
fn integral(x: f64) -> f64 {
    let code = x.round().min(INPUT_STEPS);
    code / 12.0 + (x - code).powi(3) / 3.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_integral_is_that_of_the_squared_distance() {
        for end in [0.3, 0.5, 1.0, 2.7, 126.9, 127.4, 140.0] {
            let pieces = 200_000;
            let width = end / f64::from(pieces);
            let sum: f64 = (0..pieces)
                .map(|piece| (f64::from(piece) + 0.5) * width)
                .map(|x| (x - x.round().min(INPUT_STEPS)).powi(2) * width)
                .sum();
            assert!((integral(end) - sum).abs() < 1e-6 * (1.0 + sum), "{end}");
        }
    }

    #[test]
    fn what_is_spread_evenly_is_not_clipped_and_a_lone_outlier_is() {
        let even = [(0.0, 4.0, 1000), (4.0, 8.0, 1000)];
        assert_eq!(least_error_clip(even.into_iter(), 8.0), 8.0);
        let lone = [(0.0, 1.0, 1_000_000), (60.0, 64.0, 1)];
        let clip = least_error_clip(lone.into_iter(), 62.0);
        assert!((3.0..40.0).contains(&clip), "{clip}");
        let heavy = [(0.0, 1.0, 1000), (60.0, 64.0, 200)];
        let clip = least_error_clip(heavy.into_iter(), 62.0);
        assert!(clip > 60.0, "{clip}");
        assert_eq!(least_error_clip([(2.0, 2.0, 5)].into_iter(), 2.0), 2.0);
    }
}
