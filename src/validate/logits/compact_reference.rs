//! One position of a compact reference: the most likely tokens, and what is known of the rest.
//!
//! Enters: a row of reference logits once, rows of artifact logits later. Leaves: a [`PositionDrift`] and an interval
//! that is proven to hold the exact KL divergence. Knows no file.
//!
//! Let p be the reference, q the artifact, K the kept tokens, T and Q the masses p and q give to the others. By the
//! log-sum inequality
//!
//! ```text
//! KL(p || q) >= sum over K of p ln(p/q) + T ln(T/Q)                                   the lumped value
//! KL(p || q)  = sum over K of p ln(p/q) + S + C,  S = sum of p ln p, C = -sum of p ln q over the others
//! ```
//!
//! S is stored. C is largest when the others take as much as they may, the smallest kept probability m, where q is
//! smallest; that is a sum over the T/m smallest q, and it exceeds the lumped value by at most T ln(Q / min q).
//! Kept probabilities are stored rounded: after renormalising to 1 - T each is off by a factor of at most e^s, s the
//! step, which moves their sum by at most (e^s - 1) e^s sum of p (|ln p/q| + s) + s^2 e^s / 2.

use super::kl_divergence::{LogitsRow, PositionDrift};

/// Rounding of the sums themselves.
const ARITHMETIC_SLACK: f64 = 1e-9;

/// Which tokens of a position are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Keep {
    /// As many of the most likely tokens as it takes until the others have at most this mass.
    pub tail_mass: f64,
    /// But no more than this.
    pub top_k: Option<usize>,
}

impl Default for Keep {
    fn default() -> Self {
        Self {
            tail_mass: 1e-3,
            top_k: None,
        }
    }
}

/// What a compact reference leaves open at one position. The exact KL divergence lies in `lower..=upper`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KlInterval {
    /// Proven.
    pub lower: f64,
    /// Proven.
    pub upper: f64,
    /// Probability that the reference gives to tokens that were not kept.
    pub tail_mass: f64,
}

/// The reference at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct CompactRow {
    /// Kept tokens, rising.
    pub(super) tokens: Vec<u32>,
    /// ln p of each is `min_log_prob + step * code`, before renormalising to 1 - `tail_mass`.
    pub(super) codes: Vec<u16>,
    pub(super) min_log_prob: f64,
    pub(super) step: f64,
    /// The most likely token.
    pub(super) top: u32,
    /// -ln p(target).
    pub(super) nll: f64,
    /// T.
    pub(super) tail_mass: f64,
    /// S.
    pub(super) tail_p_ln_p: f64,
}

impl CompactRow {
    /// What is kept of a row of logits. `None` if a logit is not finite.
    ///
    /// # Panics
    /// If the target is outside the vocabulary.
    pub fn new(logits: &[f32], target: u32, keep: Keep) -> Option<Self> {
        let row = LogitsRow::new(logits)?;
        let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
        ranked.sort_unstable_by(|&a, &b| {
            let (left, right) = (logits[a as usize], logits[b as usize]);
            right.total_cmp(&left).then(a.cmp(&b))
        });
        let log_prob = |token: &u32| row.log_prob(*token as usize);
        let kept = kept_tokens(&ranked, log_prob, keep);
        let (kept, tail) = ranked.split_at(kept);
        let mut tokens = kept.to_vec();
        tokens.sort_unstable();
        let min_log_prob = kept.last().map_or(0.0, log_prob);
        let step = (log_prob(&ranked[0]) - min_log_prob) / f64::from(u16::MAX);
        let code = |token: &u32| {
            let steps = (log_prob(token) - min_log_prob) / step;
            if step > 0.0 { steps.round() as u16 } else { 0 }
        };
        Some(Self {
            codes: tokens.iter().map(code).collect(),
            tokens,
            min_log_prob,
            step,
            top: row.top() as u32,
            nll: -log_prob(&target),
            tail_mass: tail.iter().map(|token| log_prob(token).exp()).sum(),
            tail_p_ln_p: tail
                .iter()
                .map(log_prob)
                .map(|log_prob| log_prob.exp() * log_prob)
                .sum(),
        })
    }

    /// How many tokens were kept.
    pub fn kept(&self) -> usize {
        self.tokens.len()
    }

    /// Compares the logits of an artifact. The KL divergence lumps the tokens that were not kept. `None` if a logit is
    /// not finite.
    ///
    /// # Panics
    /// If the target or a kept token is outside the vocabulary.
    pub fn compare(&self, artifact: &[f32], target: u32) -> Option<(PositionDrift, KlInterval)> {
        let artifact = LogitsRow::new(artifact)?;
        let head = self.head(&artifact);
        let tail = self.tail(&artifact);
        let drift = PositionDrift {
            kl_divergence: head.kl + tail.lumped,
            nll_reference: self.nll,
            nll: -artifact.log_prob(target as usize),
            same_top: self.top as usize == artifact.top(),
        };
        let slack = head.rounding + ARITHMETIC_SLACK;
        let interval = KlInterval {
            lower: (head.kl + tail.lumped - slack).max(0.0),
            upper: head.kl + tail.upper + slack,
            tail_mass: self.tail_mass,
        };
        Some((drift, interval))
    }

    /// Kept tokens with their renormalised ln p.
    fn log_probs(&self) -> Vec<f64> {
        let raw: Vec<f64> = self
            .codes
            .iter()
            .map(|&code| self.min_log_prob + self.step * f64::from(code))
            .collect();
        let mass: f64 = raw.iter().map(|log_prob| log_prob.exp()).sum();
        let shift = (-self.tail_mass).ln_1p() - mass.ln();
        raw.into_iter().map(|log_prob| log_prob + shift).collect()
    }

    fn head(&self, artifact: &LogitsRow) -> Head {
        let (mut kl, mut absolute) = (0.0, 0.0);
        for (token, log_prob) in self.tokens.iter().zip(self.log_probs()) {
            let log_ratio = log_prob - artifact.log_prob(*token as usize);
            kl += log_prob.exp() * log_ratio;
            absolute += log_prob.exp() * (log_ratio.abs() + self.step);
        }
        let step = self.step;
        Head {
            kl,
            rounding: step.exp_m1() * step.exp() * absolute + 0.5 * step * step * step.exp(),
        }
    }

    fn tail(&self, artifact: &LogitsRow) -> Tail {
        let mut log_q = self.tail_log_probs(artifact);
        if log_q.is_empty() || self.tail_mass <= 0.0 {
            return Tail::default();
        }
        let most = log_q.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_mass = most + log_q.iter().map(|q| (q - most).exp()).sum::<f64>().ln();
        Tail {
            lumped: self.tail_mass * (self.tail_mass.ln() - log_mass),
            upper: self.tail_p_ln_p + self.largest_cross_entropy(&mut log_q),
        }
    }

    /// ln q of the tokens that were not kept.
    fn tail_log_probs(&self, artifact: &LogitsRow) -> Vec<f64> {
        let mut kept = self.tokens.iter().map(|&token| token as usize).peekable();
        (0..artifact.vocab_size())
            .filter(|token| kept.next_if_eq(token).is_none())
            .map(|token| artifact.log_prob(token))
            .collect()
    }

    /// The largest C: each of the smallest q takes as much as the least kept token has, the next takes the rest.
    fn largest_cross_entropy(&self, log_q: &mut [f64]) -> f64 {
        let each = self.min_log_prob.exp().min(self.tail_mass);
        let full = ((self.tail_mass / each) as usize).min(log_q.len() - 1);
        let (smallest, next, _) = log_q.select_nth_unstable_by(full, f64::total_cmp);
        let rest = (self.tail_mass - each * full as f64).max(0.0);
        -each * smallest.iter().sum::<f64>() - rest * *next
    }
}

/// The sum over the kept tokens and how far rounding may have moved it.
struct Head {
    kl: f64,
    rounding: f64,
}

/// The share of the others in the KL divergence.
#[derive(Default)]
struct Tail {
    lumped: f64,
    upper: f64,
}

fn kept_tokens(ranked: &[u32], log_prob: impl Fn(&u32) -> f64, keep: Keep) -> usize {
    let mut left = 1.0;
    let enough = ranked.iter().position(|token| {
        left -= log_prob(token).exp();
        left <= keep.tail_mass
    });
    let count = enough.map_or(ranked.len(), |last| last + 1);
    count.min(keep.top_k.unwrap_or(usize::MAX).max(1))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::kl_divergence::compare;
    use super::*;

    /// Deterministic logits with a long tail, and an artifact that differs from them by `noise`.
    pub fn pair(seed: u64, vocab: usize, spread: f32, noise: f32) -> (Vec<f32>, Vec<f32>) {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let reference: Vec<f32> = (0..vocab)
            .map(|_| -spread * uniform().max(1e-6).ln())
            .collect();
        let artifact = reference
            .iter()
            .map(|&logit| logit + noise * (uniform() - 0.5))
            .collect();
        (reference, artifact)
    }

    #[test]
    fn the_interval_holds_the_exact_value() {
        let keeps = [0.3, 1e-2, 1e-3, 1e-6].map(|tail_mass| Keep {
            tail_mass,
            top_k: None,
        });
        let few = Keep {
            tail_mass: 0.0,
            top_k: Some(4),
        };
        for seed in 1..40 {
            for (spread, noise) in [(0.2, 0.1), (1.0, 0.5), (2.0, 3.0), (4.0, 0.01), (1.0, 30.0)] {
                let (reference, artifact) = pair(seed, 300, spread, noise);
                let exact = compare(&reference, &artifact, 7).unwrap();
                for keep in keeps.iter().chain([&few]) {
                    let row = CompactRow::new(&reference, 7, *keep).unwrap();
                    let (drift, interval) = row.compare(&artifact, 7).unwrap();
                    let exact_kl = exact.kl_divergence;
                    assert!(
                        interval.lower <= exact_kl && exact_kl <= interval.upper,
                        "{exact_kl} {interval:?} {keep:?} {spread} {noise}"
                    );
                    assert!(drift.kl_divergence <= interval.upper);
                    assert_eq!(drift.same_top, exact.same_top);
                    assert_eq!(drift.nll, exact.nll);
                    assert!((drift.nll_reference - exact.nll_reference).abs() < 1e-12);
                }
            }
        }
    }

    /// What the file states: no wider than the tail mass times the spread of q over the tail, and rounding.
    #[test]
    fn the_interval_is_no_wider_than_stated() {
        for seed in 1..40 {
            let (reference, artifact) = pair(seed, 300, 1.0, 0.5);
            let row = CompactRow::new(&reference, 0, Keep::default()).unwrap();
            let (_, interval) = row.compare(&artifact, 0).unwrap();
            let artifact = LogitsRow::new(&artifact).unwrap();
            let log_q = row.tail_log_probs(&artifact);
            let least = log_q.iter().copied().fold(0.0, f64::min);
            let mass = log_q.iter().map(|q| q.exp()).sum::<f64>().ln();
            let stated = row.tail_mass * (mass - least) + 2.0 * row.head(&artifact).rounding;
            let width = interval.upper - interval.lower;
            assert!(width <= stated + 3.0 * ARITHMETIC_SLACK, "{width} {stated}");
            assert!(row.tail_mass <= 1e-3);
        }
    }

    /// A tail that is as far from the artifact as it can be reaches the upper bound: the bound cannot be improved.
    #[test]
    fn the_upper_bound_is_reached() {
        let reference = [5.0, 1.0, 1.0, -30.0, -30.0];
        let artifact = [5.0, -2.0, -2.0, 1.0, 1.0];
        let keep = Keep {
            tail_mass: 0.0,
            top_k: Some(2),
        };
        let row = CompactRow::new(&reference, 0, keep).unwrap();
        let exact = compare(&reference, &artifact, 0).unwrap().kl_divergence;
        let (drift, interval) = row.compare(&artifact, 0).unwrap();
        assert!(
            (interval.upper - exact).abs() < 1e-3 * exact,
            "{exact} {interval:?}"
        );
        assert!(drift.kl_divergence < 0.9 * exact);
    }

    #[test]
    fn what_is_kept_is_what_was_asked_for() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125]
            .iter()
            .map(|p| p.ln())
            .collect();
        let check = |tail_mass, top_k, expected| {
            let row = CompactRow::new(&logits, 0, Keep { tail_mass, top_k }).unwrap();
            assert_eq!(row.kept(), expected, "{tail_mass} {top_k:?}");
        };
        check(0.6, None, 1);
        check(0.3, None, 2);
        check(0.2, None, 3);
        check(0.0, None, 4);
        check(0.0, Some(2), 2);
        check(0.3, Some(3), 2);
        check(1.0, Some(0), 1);
    }

    #[test]
    fn a_row_against_itself_is_zero() {
        let (reference, _) = pair(3, 1000, 1.5, 0.0);
        let row = CompactRow::new(&reference, 5, Keep::default()).unwrap();
        let (drift, interval) = row.compare(&reference, 5).unwrap();
        assert!(drift.kl_divergence.abs() < 1e-6 && drift.same_top);
        assert_eq!(interval.lower, 0.0);
        assert!(CompactRow::new(&[0.0, f32::NAN], 0, Keep::default()).is_none());
        assert!(row.compare(&[f32::INFINITY; 1000], 0).is_none());
    }
}
