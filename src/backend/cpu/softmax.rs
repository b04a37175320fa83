//! Rows of logits as distributions.

use super::elementwise::{exp, largest, sum_of_exps};
use super::kernels::Isa;
use crate::backend::{KlDivergence, SoftmaxSums};

/// What softmax needs of a row; exponentials in f32, the same on every machine.
pub fn softmax_sums(isa: Isa, logits: &[f32]) -> SoftmaxSums {
    let max = largest(isa, logits);
    SoftmaxSums {
        max,
        best: first(logits, max),
        sum: sum_of_exps(isa, logits, max),
    }
}

/// The same with the system's exponentials in f64: for what is reported and decides nothing.
pub fn exact_softmax_sums(isa: Isa, logits: &[f32]) -> SoftmaxSums {
    let max = largest(isa, logits);
    let terms = logits
        .iter()
        .map(|x| (f64::from(*x) - f64::from(max)).exp());
    SoftmaxSums {
        max,
        best: first(logits, max),
        sum: terms.sum(),
    }
}

/// KL(reference || other) of two rows as long as each other; exponentials in f32, the same on every machine.
pub fn kl_divergence(isa: Isa, reference: &[f32], other: &[f32]) -> KlDivergence {
    let [p, q] = [reference, other].map(|logits| softmax_sums(isa, logits));
    let [of_p, of_q] = [&p, &q].map(|sums| f64::from(sums.max) + sums.sum.ln());
    let terms = reference.iter().zip(other).map(|(x, y)| {
        let log_p = f64::from(*x) - of_p;
        f64::from(exp(log_p as f32)) * (log_p - (f64::from(*y) - of_q))
    });
    KlDivergence {
        kl_divergence: terms.sum(),
        reference: p,
        other: q,
    }
}

/// The same with the system's exponentials in f64.
pub fn exact_kl_divergence(isa: Isa, reference: &[f32], other: &[f32]) -> KlDivergence {
    let [p, q] = [reference, other].map(|logits| exact_softmax_sums(isa, logits));
    let [of_p, of_q] = [&p, &q].map(|sums| (f64::from(sums.max), sums.sum.ln()));
    let log_probability = |x: f32, (max, log_sum): (f64, f64)| f64::from(x) - max - log_sum;
    let terms = reference.iter().zip(other).map(|(x, y)| {
        let log_p = log_probability(*x, of_p);
        log_p.exp() * (log_p - log_probability(*y, of_q))
    });
    KlDivergence {
        kl_divergence: terms.sum(),
        reference: p,
        other: q,
    }
}

/// Where `value` stands first; parts are passed over whole, which vectors do at once.
fn first(values: &[f32], value: f32) -> usize {
    const PART: usize = 64;
    let has = |part: &[f32]| part.iter().fold(false, |has, x| has | (*x == value));
    let part = values.chunks(PART).position(has).unwrap_or(0) * PART;
    let place = values[part..].iter().position(|x| *x == value);
    part + place.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_precisions_see_the_same_row() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 5.0).collect();
        for isa in Isa::all() {
            let (fast, exact) = (softmax_sums(isa, &logits), exact_softmax_sums(isa, &logits));
            assert_eq!((fast.max, fast.best), (exact.max, exact.best));
            assert_eq!((exact.max, exact.best), (20.0, 30));
            assert!((fast.sum / exact.sum - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn equal_logits_do_not_diverge() {
        let (logits, others) = ([1.0, 2.5, -0.5], [2.5, 1.0, -0.5]);
        for isa in Isa::all() {
            for kl_divergence in [kl_divergence, exact_kl_divergence] {
                let same = kl_divergence(isa, &logits, &logits);
                assert!(same.kl_divergence.abs() < 1e-9, "{same:?}");
                let far = kl_divergence(isa, &logits, &others);
                assert!(far.kl_divergence > 0.1, "{far:?}");
                assert_eq!((far.reference.best, far.other.best), (1, 0));
            }
        }
    }
}
