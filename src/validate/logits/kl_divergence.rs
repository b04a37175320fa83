//! One position: KL divergence, negative log-likelihoods and the most likely tokens of two models.
//!
//! Enters: two rows over the vocabulary. Leaves: [`PositionDrift`]. Accumulates nothing.

use crate::backend::cpu::kernels::Isa;
use crate::backend::{KlDivergence, SoftmaxSums, cpu};

/// A KLD base file holds no probabilities below this: they are clipped, and llama.cpp leaves them out.
const MIN_LOG_PROB: f64 = -16.0;

/// What two models say about the same position. Natural logarithms throughout.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionDrift {
    /// KL(reference || artifact); may be slightly negative where the reference was rounded.
    pub kl_divergence: f64,
    /// -ln p(target) of the reference.
    pub nll_reference: f64,
    /// -ln p(target) of the artifact.
    pub nll: f64,
    /// Whether the most likely token is the same; of equals the first counts.
    pub same_top: bool,
}

impl PositionDrift {
    /// Of two rows of logits, whose logits of the target are these.
    pub fn new(rows: &KlDivergence, reference: f32, artifact: f32) -> Self {
        Self {
            kl_divergence: rows.kl_divergence,
            nll_reference: -log_prob(&rows.reference, reference),
            nll: -log_prob(&rows.other, artifact),
            same_top: rows.reference.best == rows.other.best,
        }
    }

    /// p(target), artifact minus reference.
    pub fn delta_p(&self) -> f64 {
        (-self.nll).exp() - (-self.nll_reference).exp()
    }
}

/// ln p of a logit of a row.
fn log_prob(row: &SoftmaxSums, logit: f32) -> f64 {
    f64::from(logit) - f64::from(row.max) - row.sum.ln()
}

/// A row of logits, all finite, with what its softmax needs.
#[derive(Debug, Clone, Copy)]
pub struct LogitsRow<'a> {
    logits: &'a [f32],
    max: f64,
    /// ln of the sum of exp(logit - max).
    log_sum_exp: f64,
    top: usize,
}

impl<'a> LogitsRow<'a> {
    /// Looks the row through. `None` if it is empty or a logit is not finite.
    pub fn new(logits: &'a [f32]) -> Option<Self> {
        if !are_numbers(logits) {
            return None;
        }
        let sums = cpu::exact_softmax_sums(Isa::detect(), logits);
        Some(Self {
            logits,
            max: f64::from(sums.max),
            log_sum_exp: sums.sum.ln(),
            top: sums.best,
        })
    }

    /// Rows of the output matrix.
    pub fn vocab_size(&self) -> usize {
        self.logits.len()
    }

    /// ln p of one token.
    ///
    /// # Panics
    /// If the token is outside the vocabulary.
    pub fn log_prob(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.max - self.log_sum_exp
    }

    /// The most likely token; of equals the first.
    pub fn top(&self) -> usize {
        self.top
    }
}

/// Compares two rows of logits. `None` if a logit of either is not finite.
///
/// # Panics
/// If the rows differ in length or the target is outside them.
pub fn compare(reference: &[f32], artifact: &[f32], target: u32) -> Option<PositionDrift> {
    assert_eq!(reference.len(), artifact.len(), "one vocabulary");
    if !are_numbers(reference) || !are_numbers(artifact) {
        return None;
    }
    let target = target as usize;
    let rows = cpu::exact_kl_divergence(Isa::detect(), reference, artifact);
    let drift = PositionDrift::new(&rows, reference[target], artifact[target]);
    Some(drift)
}

/// Whether there are logits, all finite.
fn are_numbers(logits: &[f32]) -> bool {
    !logits.is_empty() && logits.iter().all(|logit| logit.is_finite())
}

/// Compares log-probabilities as a KLD base file gives them, not renormalised, with a row of logits. `None` if a value
/// of either is not finite. The file clips improbable targets of the reference, so that its perplexity is too low and
/// the ratio too high where a text surprises the model; llama.cpp reports them so.
///
/// # Panics
/// If the rows differ in length or the target is outside them.
pub fn compare_log_probs(
    log_probs: &[f32],
    artifact: &[f32],
    target: u32,
) -> Option<PositionDrift> {
    assert_eq!(log_probs.len(), artifact.len(), "one vocabulary");
    let artifact = LogitsRow::new(artifact)?;
    if !log_probs.iter().all(|log_prob| log_prob.is_finite()) {
        return None;
    }
    let target = target as usize;
    let kept = log_probs.iter().copied().map(f64::from).enumerate();
    let kept = kept.filter(|&(_, log_prob)| log_prob > MIN_LOG_PROB);
    Some(PositionDrift {
        kl_divergence: kl_divergence(kept, &artifact),
        nll_reference: -f64::from(log_probs[target]),
        nll: -artifact.log_prob(target),
        same_top: argmax(log_probs)? == artifact.top,
    })
}

fn kl_divergence(log_probs: impl Iterator<Item = (usize, f64)>, artifact: &LogitsRow) -> f64 {
    log_probs
        .map(|(token, log_prob)| log_prob.exp() * (log_prob - artifact.log_prob(token)))
        .sum()
}

fn argmax(values: &[f32]) -> Option<usize> {
    let mut top = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[top] {
            top = index;
        }
    }
    (!values.is_empty()).then_some(top)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFERENCE: [f32; 5] = [1.0, 2.5, -0.5, 0.25, 2.0];
    const ARTIFACT: [f32; 5] = [1.25, 2.0, -0.75, 0.5, 2.25];

    fn near(found: f64, expected: f64) {
        assert!(
            (found - expected).abs() < 1e-12,
            "{found} is not {expected}"
        );
    }

    /// The expected values come from numpy in float64.
    #[test]
    fn a_position_as_numpy_has_it() {
        let drift = compare(&REFERENCE, &ARTIFACT, 4).unwrap();
        near(drift.kl_divergence, 0.06785449330026302);
        near(drift.nll_reference, 1.1855418899087793);
        near(drift.nll, 0.8629917373346334);
        near(drift.delta_p(), 0.1163174407731713);
        assert!(!drift.same_top);
        let same = compare(&REFERENCE, &REFERENCE, 0).unwrap();
        assert_eq!((same.kl_divergence, same.same_top), (0.0, true));
    }

    #[test]
    fn log_probs_give_what_logits_give() {
        let row = LogitsRow::new(&REFERENCE).unwrap();
        let log_probs: Vec<f32> = (0..5).map(|token| row.log_prob(token) as f32).collect();
        let from_logits = compare(&REFERENCE, &ARTIFACT, 1).unwrap();
        let from_log_probs = compare_log_probs(&log_probs, &ARTIFACT, 1).unwrap();
        assert!((from_logits.kl_divergence - from_log_probs.kl_divergence).abs() < 1e-6);
        assert_eq!(from_logits.same_top, from_log_probs.same_top);
    }

    #[test]
    fn what_a_base_file_clips_does_not_count() {
        let check = |log_prob: f32, counts: bool| {
            let drift = compare_log_probs(&[0.0, log_prob], &[0.0, -60.0], 0).unwrap();
            assert_eq!(drift.kl_divergence > 1e-6, counts, "{drift:?}");
        };
        check(-17.0, false);
        check(-15.0, true);
        let exact = compare(&[0.0, -17.0], &[0.0, -60.0], 0).unwrap();
        assert!(exact.kl_divergence > 1e-6, "{exact:?}");
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let drift = compare(&[3e38, 3e38], &[-3e38, -3e38], 1).unwrap();
        assert_eq!(drift.kl_divergence, 0.0);
        near(drift.nll, std::f64::consts::LN_2);
    }

    #[test]
    fn what_is_not_a_number_is_not_compared() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(compare(&[0.0, bad], &[0.0, 1.0], 0).is_none());
            assert!(compare(&[0.0, 1.0], &[bad, 1.0], 0).is_none());
            assert!(compare_log_probs(&[0.0, bad], &[0.0, 1.0], 0).is_none());
        }
        assert!(compare(&[], &[], 0).is_none());
    }
}
