//! Means with standard errors and order statistics, by the definitions of llama.cpp's perplexity tool.
//!
//! Enters: values. Leaves: [`Estimate`], [`Distribution`], [`Histogram`]. Knows not what was measured.

use crate::report::{Distribution, Estimate, Histogram};

/// Below this many values an error says nothing.
const MIN_COUNT_FOR_ERROR: usize = 10;
/// KL divergences are counted from 1e-9 to 1e3 nats, four bins a decade.
const HISTOGRAM_DECADES: (i32, i32) = (-9, 3);
const BINS_PER_DECADE: i32 = 4;

/// Mean and its standard error, sqrt(var / (n - 1)).
pub(super) fn mean(values: &[f64]) -> Estimate {
    let count = values.len();
    if count == 0 {
        return Estimate::default();
    }
    let value = values.iter().sum::<f64>() / count as f64;
    Estimate {
        value,
        error: covariance_of_means(values, values).max(0.0).sqrt(),
    }
}

/// Covariance of the means of paired values.
pub(super) fn covariance_of_means(a: &[f64], b: &[f64]) -> f64 {
    let count = a.len();
    if count <= MIN_COUNT_FOR_ERROR {
        return 0.0;
    }
    let average = |values: &[f64]| values.iter().sum::<f64>() / count as f64;
    let (mean_a, mean_b) = (average(a), average(b));
    let products = a.iter().zip(b).map(|(a, b)| (a - mean_a) * (b - mean_b));
    products.sum::<f64>() / count as f64 / (count - 1) as f64
}

/// exp of a mean; the error by first order. Cut at the largest number: JSON has no infinity.
pub(super) fn exp(estimate: Estimate) -> Estimate {
    let value = estimate.value.exp().min(f64::MAX);
    Estimate {
        value,
        error: (value * estimate.error).min(f64::MAX),
    }
}

/// A share of positions; the error as for a binomial.
pub(super) fn share(hits: usize, count: usize) -> Estimate {
    if count == 0 {
        return Estimate::default();
    }
    let value = hits as f64 / count as f64;
    let degrees = (count.max(2) - 1) as f64;
    Estimate {
        value,
        error: (value * (1.0 - value) / degrees).sqrt(),
    }
}

/// Root of a mean square; the error by first order.
pub(super) fn root_mean_square(values: &[f64]) -> Estimate {
    let squares: Vec<f64> = values.iter().map(|value| value * value).collect();
    let square = mean(&squares);
    let value = square.value.sqrt();
    Estimate {
        value,
        error: if value > 0.0 {
            0.5 / value * square.error
        } else {
            0.0
        },
    }
}

/// All order statistics of the values; zeros if there are none.
pub(super) fn distribution(values: &[f64]) -> Distribution {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = |fraction| quantile(&sorted, fraction);
    Distribution {
        mean: mean(values),
        min: at(0.0),
        p0_1: at(0.001),
        p1: at(0.01),
        p5: at(0.05),
        p10: at(0.1),
        p25: at(0.25),
        median: at(0.5),
        p75: at(0.75),
        p90: at(0.9),
        p95: at(0.95),
        p99: at(0.99),
        p99_9: at(0.999),
        max: at(1.0),
    }
}

/// By linear interpolation between order statistics; 0 of nothing.
pub(super) fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = fraction * last as f64;
    let below = (place.floor() as usize).min(last);
    let above = (below + 1).min(last);
    let weight = place - below as f64;
    (1.0 - weight) * sorted[below] + weight * sorted[above]
}

/// Counts by order of magnitude.
pub(super) fn histogram(values: &[f64]) -> Histogram {
    let (from, to) = HISTOGRAM_DECADES;
    let bins = (to - from) * BINS_PER_DECADE;
    let edge = |index| 10f64.powf(f64::from(from) + f64::from(index) / f64::from(BINS_PER_DECADE));
    let mut counts = vec![0; bins as usize];
    for &value in values {
        // Zeros and the slightly negative belong to the first bin.
        let magnitude = value.max(edge(0)).log10() - f64::from(from);
        let bin = (magnitude * f64::from(BINS_PER_DECADE)) as usize;
        counts[bin.min(bins as usize - 1)] += 1;
    }
    Histogram {
        edges: (0..=bins).map(edge).collect(),
        counts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) {
        let tolerance = 1e-12 * expected.abs().max(1.0);
        assert!(
            (found - expected).abs() < tolerance,
            "{found} is not {expected}"
        );
    }

    fn squares() -> Vec<f64> {
        (1..=12).map(|i| f64::from(i * i)).collect()
    }

    fn roots() -> Vec<f64> {
        (1..=12).map(|i| f64::from(i).sqrt()).collect()
    }

    /// The expected values come from numpy: `percentile(.., method="linear")`, `cov(.., bias=True) / (n - 1)`.
    #[test]
    fn order_statistics_as_numpy_has_them() {
        let found = distribution(&squares());
        near(found.mean.value, 54.166666666666664);
        near(found.mean.error, 13.899440436378885);
        near(found.p1, 1.33);
        near(found.p25, 14.25);
        near(found.median, 42.5);
        near(found.p99, 141.47000000000003);
        near(found.p99_9, 143.747);
        assert_eq!((found.min, found.max), (1.0, 144.0));
        near(
            covariance_of_means(&squares(), &roots()),
            2.9093841522775192,
        );
        let rms = root_mean_square(&roots());
        near(rms.value, 2.5495097567963922);
        near(rms.error, 0.2041241452319315);
    }

    #[test]
    fn what_overflows_is_cut() {
        let found = exp(Estimate {
            value: 1e4,
            error: 10.0,
        });
        assert_eq!((found.value, found.error), (f64::MAX, f64::MAX));
    }

    #[test]
    fn few_values_have_no_error() {
        assert_eq!(
            mean(&[1.0, 3.0]),
            Estimate {
                value: 2.0,
                error: 0.0
            }
        );
        assert_eq!(distribution(&[]), Distribution::default());
        assert_eq!(quantile(&[7.0], 0.3), 7.0);
    }

    #[test]
    fn a_share_has_a_binomial_error() {
        let found = share(3, 4);
        near(found.value, 0.75);
        near(found.error, 0.25);
        assert_eq!(share(0, 0), Estimate::default());
    }

    #[test]
    fn magnitudes_fall_into_their_bins() {
        let check = |value: f64, bin: usize| {
            let found = histogram(&[value]);
            assert_eq!(
                found.counts.iter().position(|&count| count == 1),
                Some(bin),
                "{value}"
            );
            assert_eq!(found.edges.len(), found.counts.len() + 1);
        };
        check(-1e-7, 0);
        check(0.0, 0);
        check(1.1e-9, 0);
        check(1.01, 36);
        check(0.99, 35);
        check(1e9, 47);
    }
}
