//! A model beside another on the same documents: paired statistics.
//!
//! Enters: two lists of samples. Leaves: [`Comparison`]. Knows no file.

use super::metrics::{Measured, aggregate, first_maximum, mean_and_stderr};
use super::samples::Sample;
use super::tasks::Task;
use crate::error::{Error, Fault, Result};

/// What changed in one task.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Which task.
    pub task: Task,
    /// Documents compared.
    pub documents: usize,
    /// By metric, in the task's order.
    pub metrics: Vec<MetricChange>,
    /// Documents whose most likely choice changed, right or wrong.
    pub changed_predictions: usize,
    /// Mean absolute change of log-likelihood per scored token.
    pub mean_abs_change_per_token: Option<f64>,
}

/// What changed in one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricChange {
    /// lm-eval's name.
    pub metric: &'static str,
    /// Of the baseline.
    pub baseline: f64,
    /// Of the model.
    pub model: f64,
    /// Model minus baseline.
    pub difference: f64,
    /// For metrics that are right or wrong by document.
    pub paired: Option<Paired>,
}

/// Statistics of documents that two models answered rightly or wrongly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Paired {
    /// Standard error of the difference: sample deviation of the documents' differences over the root of their number.
    pub stderr: Option<f64>,
    /// Wrong became right.
    pub gained: usize,
    /// Right became wrong.
    pub lost: usize,
    /// Exact two-sided McNemar test.
    pub p_exact: f64,
    /// The same with the mid-p correction, which is less conservative.
    pub p_mid: f64,
    /// The smallest drop that these documents would show at 95 % confidence (two-sided) with 80 % power.
    pub smallest_detectable_drop: f64,
}

/// Quantiles of the normal distribution at 0.975 and 0.8.
const CONFIDENCE_Z: f64 = 1.959_963_984_540_054;
const POWER_Z: f64 = 0.841_621_233_572_914_3;
/// Fewer flips, even all in one direction, are never significant at 5 %: 2 x 0.5^5 > 0.05.
const FEWEST_SIGNIFICANT_FLIPS: f64 = 6.0;

impl Comparison {
    /// Compares a model's samples with those of a baseline, which may have more documents.
    ///
    /// # Errors
    /// A document that the baseline lacks or was asked otherwise.
    pub fn of(task: Task, model: &[Sample], baseline: &[Sample]) -> Result<Self> {
        let pairs: Vec<(&Sample, &Sample)> = model
            .iter()
            .map(|sample| Ok((sample, counterpart(task, sample, baseline)?)))
            .collect::<Result<_>>()?;
        let changed = pairs.iter().filter(|(model, baseline)| {
            let best = |sample: &Sample| first_maximum(sample.log_likelihoods.iter().copied());
            best(model) != best(baseline)
        });
        let metrics = task.metrics().iter().enumerate();
        Ok(Self {
            task,
            documents: pairs.len(),
            changed_predictions: changed.count(),
            mean_abs_change_per_token: change_per_token(&pairs),
            metrics: metrics
                .filter_map(|(index, (metric, _))| MetricChange::of(metric, index, &pairs))
                .collect(),
        })
    }
}

fn counterpart<'a>(task: Task, sample: &Sample, baseline: &'a [Sample]) -> Result<&'a Sample> {
    let (name, doc_id) = (task.name(), sample.doc_id);
    let found = match baseline.get(doc_id) {
        Some(same_place) if same_place.doc_id == doc_id => Some(same_place),
        _ => baseline.iter().find(|other| other.doc_id == doc_id),
    };
    let fault = |what: String| {
        let hint = "run both on the same data, the baseline with no smaller `--limit`";
        Error::Data(Fault::new(what).hint(hint))
    };
    let found =
        found.ok_or_else(|| fault(format!("the baseline has no document {doc_id} of {name}")))?;
    if found.arguments != sample.arguments
        || found.log_likelihoods.len() != sample.log_likelihoods.len()
    {
        return Err(fault(format!(
            "document {doc_id} of {name} is another one in the baseline"
        )));
    }
    Ok(found)
}

fn change_per_token(pairs: &[(&Sample, &Sample)]) -> Option<f64> {
    let (mut change, mut tokens) = (0.0, 0);
    for (model, baseline) in pairs {
        let counted = if model.target_tokens.is_empty() {
            &baseline.target_tokens
        } else {
            &model.target_tokens
        };
        tokens += counted.iter().sum::<usize>();
        let lls = model.log_likelihoods.iter().zip(&baseline.log_likelihoods);
        change += lls.map(|(a, b)| (a - b).abs()).sum::<f64>();
    }
    (tokens > 0).then(|| change / tokens as f64)
}

impl MetricChange {
    fn of(metric: &'static str, index: usize, pairs: &[(&Sample, &Sample)]) -> Option<Self> {
        let model: Vec<_> = pairs
            .iter()
            .map(|(model, _)| model.metrics[index])
            .collect();
        let baseline: Vec<_> = pairs
            .iter()
            .map(|(_, baseline)| baseline.metrics[index])
            .collect();
        let model_value = aggregate(metric, &model).value?;
        let baseline_value = aggregate(metric, &baseline).value?;
        Some(Self {
            metric,
            baseline: baseline_value,
            model: model_value,
            difference: model_value - baseline_value,
            paired: is_right(&model)
                .zip(is_right(&baseline))
                .map(|(model, baseline)| Paired::of(&model, &baseline)),
        })
    }
}

/// Right or wrong by document, for metrics that are so.
fn is_right(values: &[Measured]) -> Option<Vec<bool>> {
    values
        .iter()
        .map(|value| match value {
            Measured::Number(number) => Some(*number > 0.5),
            Measured::Weighted { .. } => None,
        })
        .collect()
}

impl Paired {
    /// Statistics of two models' right and wrong answers to the same documents.
    ///
    /// Source: McNemar 1947; mid-p: Fagerland, Lydersen, Laake 2013, doi:10.1186/1471-2288-13-91. The detectable drop is
    /// (z(0.975) + z(0.8)) times the paired standard error, and at least six documents.
    pub fn of(model: &[bool], baseline: &[bool]) -> Self {
        let pairs = || model.iter().zip(baseline);
        let gained = pairs().filter(|(model, base)| **model && !**base).count();
        let lost = pairs().filter(|(model, base)| !**model && **base).count();
        let differences: Vec<f64> = pairs()
            .map(|(model, base)| f64::from(u8::from(*model)) - f64::from(u8::from(*base)))
            .collect();
        let (_, stderr) = mean_and_stderr(&differences);
        let (p_exact, p_mid) = mcnemar(gained, lost);
        let by_spread = (CONFIDENCE_Z + POWER_Z) * stderr.unwrap_or(f64::INFINITY);
        let by_count = FEWEST_SIGNIFICANT_FLIPS / model.len().max(1) as f64;
        Self {
            stderr,
            gained,
            lost,
            p_exact,
            p_mid,
            smallest_detectable_drop: by_spread.max(by_count).min(1.0),
        }
    }

    /// Documents that changed from right to wrong or back.
    pub fn flips(&self) -> usize {
        self.gained + self.lost
    }
}

/// Two-sided exact and mid-p values of McNemar's test.
fn mcnemar(gained: usize, lost: usize) -> (f64, f64) {
    let flips = gained + lost;
    if flips == 0 {
        return (1.0, 1.0);
    }
    let few = gained.min(lost);
    // P(X = k) for k = 0, 1, ... of Binomial(flips, 1/2), in logarithms: 0.5^flips may be no number.
    let mut log_probability = -(flips as f64) * std::f64::consts::LN_2;
    let mut tail = log_probability.exp();
    for k in 1..=few {
        log_probability += ((flips - k + 1) as f64 / k as f64).ln();
        tail += log_probability.exp();
    }
    let p_exact = (2.0 * tail).min(1.0);
    let p_mid = (2.0 * tail - log_probability.exp()).min(1.0);
    (p_exact, p_mid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) {
        assert!(
            (found - expected).abs() <= 1e-10 * expected.abs().max(1e-3),
            "{found} {expected}"
        );
    }

    /// Expected: `2 * binom.cdf(min, n, 0.5)` and the same less `binom.pmf(min, n, 0.5)`, by exact fractions.
    #[test]
    fn mcnemar_is_binomial() {
        let check = |gained, lost, exact, mid| {
            let found = mcnemar(gained, lost);
            near(found.0, exact);
            near(found.1, mid);
            assert_eq!(mcnemar(lost, gained), found);
        };
        check(0, 0, 1.0, 1.0);
        check(1, 1, 1.0, 1.0);
        check(0, 6, 0.03125, 0.015625);
        check(2, 10, 0.03857421875, 0.0224609375);
        check(5, 5, 1.0, 1.0);
        check(
            900,
            1100,
            8.457_089_535_503_927e-6,
            7.656_628_347_757_432e-6,
        );
    }

    #[test]
    fn pairs_are_counted() {
        let model = [true, true, false, false, true, false, true, true];
        let base = [true, false, true, false, true, true, true, true];
        let paired = Paired::of(&model, &base);
        assert_eq!((paired.gained, paired.lost, paired.flips()), (1, 2, 3));
        // Differences 0 1 -1 0 0 -1 0 0: mean -1/8, squares 3 - 8/64.
        near(
            paired.stderr.unwrap(),
            ((3.0 - 0.125) / 7.0f64).sqrt() / 8f64.sqrt(),
        );
        near(paired.p_exact, 1.0);
        near(paired.smallest_detectable_drop, 0.75);
    }

    #[test]
    fn large_samples_see_small_drops() {
        let base = vec![true; 10_000];
        let mut model = base.clone();
        model[..100].fill(false);
        let paired = Paired::of(&model, &base);
        near(
            paired.smallest_detectable_drop,
            2.801_585_218_112_968 * paired.stderr.unwrap(),
        );
        assert_eq!(Paired::of(&base, &base).smallest_detectable_drop, 0.0006);
        assert_eq!(Paired::of(&[true], &[true]).stderr, None);
    }
}
