//! All scored positions of a text: distributions, perplexities, position buckets.
//!
//! Enters: [`ScoredPosition`]s, in any order. Leaves: [`LogitsDrift`]. Knows not where the logits came from.

use super::compact_reference::KlInterval;
use super::kl_divergence::PositionDrift;
use super::perplexity::{perplexity, scored_positions};
use super::statistics::{
    covariance_of_means, distribution, exp, histogram, mean, quantile, root_mean_square, share,
};
use crate::report::{BucketDrift, Estimate, KlBounds, LogitsDrift};

/// Where the long-context buckets begin and end.
const BUCKET_EDGES: [usize; 4] = [0, 512, 4096, usize::MAX];

/// What was measured at one position of a chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredPosition {
    /// Index in the chunk, not in the text.
    pub position: usize,
    /// `None` if a logit was not a number.
    pub drift: Option<PositionDrift>,
    /// What a compact reference leaves open.
    pub kl_interval: Option<KlInterval>,
    /// Whether any layer chose other experts here; `None` for dense models.
    pub routing_changed: Option<bool>,
}

impl ScoredPosition {
    /// A position of a dense model against a full reference.
    pub fn new(position: usize, drift: Option<PositionDrift>) -> Self {
        Self {
            position,
            drift,
            kl_interval: None,
            routing_changed: None,
        }
    }
}

/// Collects positions.
#[derive(Debug, Clone)]
pub struct DriftAccumulator {
    context_tokens: usize,
    vocab_size: usize,
    positions: Vec<ScoredPosition>,
}

impl DriftAccumulator {
    /// For chunks of `context_tokens`.
    pub fn new(context_tokens: usize, vocab_size: usize) -> Self {
        Self {
            context_tokens,
            vocab_size,
            positions: Vec::new(),
        }
    }

    /// Adds a position.
    pub fn push(&mut self, position: ScoredPosition) {
        self.positions.push(position);
    }

    /// The figures. Without a comparable position they are zeros, and `positions` says so.
    pub fn finish(&self) -> LogitsDrift {
        let columns = Columns::new(self.positions.iter());
        let per_chunk = scored_positions(self.context_tokens).len().max(1);
        let ratio = Ratio::new(&columns);
        let routed = self.positions.iter().any(|p| p.routing_changed.is_some());
        let steady = self
            .positions
            .iter()
            .filter(|p| p.routing_changed == Some(false));
        LogitsDrift {
            positions: columns.kl.len() as u64,
            non_finite_positions: (self.positions.len() - columns.kl.len()) as u64,
            chunks: self.positions.len().div_ceil(per_chunk) as u64,
            context_tokens: self.context_tokens as u64,
            vocab_size: self.vocab_size as u64,
            kl_divergence: distribution(&columns.kl),
            kl_bounds: self.kl_bounds(),
            kl_unchanged_routing: routed.then(|| mean(&Columns::new(steady).kl)),
            kl_histogram: histogram(&columns.kl),
            top1_agreement: columns.top1(),
            delta_p: distribution(&columns.delta_p),
            delta_p_rms: root_mean_square(&columns.delta_p),
            perplexity: ratio.artifact,
            perplexity_reference: ratio.reference,
            perplexity_ratio: ratio.ratio,
            ln_perplexity_ratio: ratio.ln_ratio,
            perplexity_difference: ratio.difference,
            correlation: ratio.correlation,
            buckets: self.buckets(),
        }
    }

    fn kl_bounds(&self) -> Option<KlBounds> {
        let comparable = self.positions.iter().filter(|p| p.drift.is_some());
        let intervals: Option<Vec<KlInterval>> = comparable.map(|p| p.kl_interval).collect();
        let intervals = intervals.filter(|intervals| !intervals.is_empty())?;
        let average = |part: fn(&KlInterval) -> f64| {
            intervals.iter().map(part).sum::<f64>() / intervals.len() as f64
        };
        Some(KlBounds {
            lower: average(|interval| interval.lower),
            upper: average(|interval| interval.upper),
            tail_mass: average(|interval| interval.tail_mass),
        })
    }

    fn buckets(&self) -> Vec<BucketDrift> {
        let ranges = bucket_ranges(self.context_tokens).into_iter();
        ranges.map(|(from, to)| self.bucket(from, to)).collect()
    }

    fn bucket(&self, from: usize, to: usize) -> BucketDrift {
        let inside = self
            .positions
            .iter()
            .filter(|p| (from..to).contains(&p.position));
        let mut columns = Columns::new(inside);
        let ratio = Ratio::new(&columns);
        let top1_agreement = columns.top1();
        columns.kl.sort_unstable_by(f64::total_cmp);
        BucketDrift {
            from: from as u64,
            to: to as u64,
            positions: columns.kl.len() as u64,
            kl_divergence: mean(&columns.kl),
            kl_p99: quantile(&columns.kl, 0.99),
            top1_agreement,
            perplexity: ratio.artifact,
            perplexity_reference: ratio.reference,
            perplexity_ratio: ratio.ratio,
        }
    }
}

/// 0 to 512, 512 to 4k, from 4k on, cut to what is scored; the halves of it if all of it lies in one of these.
fn bucket_ranges(context_tokens: usize) -> Vec<(usize, usize)> {
    let scored = scored_positions(context_tokens);
    let pairs = BUCKET_EDGES.windows(2);
    let ranges = pairs.map(|edges| (edges[0].max(scored.start), edges[1].min(scored.end)));
    let ranges: Vec<_> = ranges.filter(|(from, to)| from < to).collect();
    match ranges[..] {
        [(from, to)] if to - from > 1 => {
            let middle = from + (to - from).div_ceil(2);
            vec![(from, middle), (middle, to)]
        }
        _ => ranges,
    }
}

/// The comparable positions by figure.
#[derive(Default)]
struct Columns {
    kl: Vec<f64>,
    nll: Vec<f64>,
    nll_reference: Vec<f64>,
    delta_p: Vec<f64>,
    same_top: usize,
}

impl Columns {
    fn new<'a>(positions: impl Iterator<Item = &'a ScoredPosition>) -> Self {
        let mut columns = Self::default();
        for drift in positions.filter_map(|position| position.drift) {
            columns.kl.push(drift.kl_divergence);
            columns.nll.push(drift.nll);
            columns.nll_reference.push(drift.nll_reference);
            columns.delta_p.push(drift.delta_p());
            columns.same_top += usize::from(drift.same_top);
        }
        columns
    }

    fn top1(&self) -> Estimate {
        share(self.same_top, self.kl.len())
    }
}

/// Two perplexities of the same text and how they compare.
struct Ratio {
    artifact: Estimate,
    reference: Estimate,
    ln_ratio: Estimate,
    ratio: Estimate,
    difference: Estimate,
    correlation: Option<f64>,
}

impl Ratio {
    fn new(columns: &Columns) -> Self {
        let (nll, nll_reference) = (mean(&columns.nll), mean(&columns.nll_reference));
        let (artifact, reference) = (perplexity(&columns.nll), perplexity(&columns.nll_reference));
        let covariance = covariance_of_means(&columns.nll, &columns.nll_reference);
        let ln_ratio = Estimate {
            value: nll.value - nll_reference.value,
            error: error_of_difference(nll, nll_reference, covariance),
        };
        let covariance_of_values = artifact.value * reference.value * covariance;
        let spread = nll.error * nll_reference.error;
        Self {
            artifact,
            reference,
            ln_ratio,
            ratio: exp(ln_ratio),
            difference: Estimate {
                value: artifact.value - reference.value,
                error: error_of_difference(artifact, reference, covariance_of_values),
            },
            correlation: (spread > 0.0).then(|| covariance / spread),
        }
    }
}

fn error_of_difference(a: Estimate, b: Estimate, covariance: f64) -> f64 {
    let variance = a.error * a.error + b.error * b.error - 2.0 * covariance;
    variance.max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) {
        let tolerance = 1e-10 * expected.abs().max(1.0);
        assert!(
            (found - expected).abs() < tolerance,
            "{found} is not {expected}"
        );
    }

    /// 255 positions of one chunk of 512 with smooth made-up figures.
    fn made_up() -> DriftAccumulator {
        let mut drift = DriftAccumulator::new(512, 1024);
        for position in 256..511 {
            let x = position as f64;
            let figures = PositionDrift {
                kl_divergence: 0.01 * (1.0 + x.sin()).powi(3),
                nll_reference: 3.0 + (0.7 * x).sin(),
                nll: 3.1 + (0.7 * x).sin() + 0.2 * (1.3 * x).cos(),
                same_top: position % 8 != 0,
            };
            drift.push(ScoredPosition {
                routing_changed: Some(position % 4 == 0),
                ..ScoredPosition::new(position, Some(figures))
            });
        }
        drift
    }

    /// The expected values come from numpy with the formulas of llama.cpp's report.
    #[test]
    fn a_text_as_numpy_has_it() {
        let found = made_up().finish();
        assert_eq!((found.positions, found.chunks), (255, 1));
        near(found.kl_divergence.mean.value, 0.024944989097647773);
        near(found.kl_divergence.mean.error, 0.0017948141712933032);
        near(found.kl_divergence.median, 0.009999095696659403);
        near(found.kl_divergence.p99, 0.07995542457166599);
        near(found.perplexity.value, 21.98674449599544);
        near(found.perplexity.error, 0.9968925663329062);
        near(found.perplexity_reference.value, 19.893680045830408);
        near(found.ln_perplexity_ratio.value, 0.10003765320635871);
        near(found.ln_perplexity_ratio.error, 0.00889150429299786);
        near(found.perplexity_ratio.error, 0.009827001973733113);
        near(found.perplexity_difference.error, 0.21700752390911096);
        near(found.correlation.unwrap(), 0.9805838108425129);
        near(found.top1_agreement.value, 0.8745098039215686);
        near(found.top1_agreement.error, 0.020785974106441448);
        near(found.delta_p.mean.value, -0.0054207124400370696);
        near(found.delta_p_rms.value, 0.011670717939964936);
        near(found.delta_p_rms.error, 0.0006555286345406664);
        near(
            found.kl_unchanged_routing.unwrap().value,
            0.02496988261349772,
        );
        near(found.buckets[1].kl_divergence.value, 0.02531885252287672);
        near(found.buckets[1].perplexity_ratio.value, 1.1029874209386863);
    }

    #[test]
    fn buckets_follow_the_context() {
        let check = |context, expected: &[(usize, usize)]| {
            assert_eq!(bucket_ranges(context), expected, "{context}");
        };
        check(512, &[(256, 384), (384, 511)]);
        check(4096, &[(2048, 3072), (3072, 4095)]);
        check(768, &[(384, 512), (512, 767)]);
        check(6000, &[(3000, 4096), (4096, 5999)]);
        check(16384, &[(8192, 12288), (12288, 16383)]);
        check(4, &[(2, 3)]);
    }

    #[test]
    fn positions_that_are_not_numbers_are_counted_apart() {
        let mut drift = made_up();
        let clean = drift.finish();
        drift.push(ScoredPosition::new(300, None));
        let found = drift.finish();
        assert_eq!((found.positions, found.non_finite_positions), (255, 1));
        assert_eq!(found.kl_divergence, clean.kl_divergence);
        assert!(found.kl_bounds.is_none());
    }

    #[test]
    fn nothing_comparable_is_zero_positions() {
        let mut drift = DriftAccumulator::new(512, 8);
        drift.push(ScoredPosition::new(256, None));
        let found = drift.finish();
        assert_eq!((found.positions, found.non_finite_positions), (0, 1));
        assert_eq!(found.kl_divergence.mean.value, 0.0);
    }
}
