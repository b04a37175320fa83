//! Log-probabilities of one row of logits.

use crate::backend::SoftmaxSums;
use crate::backend::cpu::kernels::Isa;
use crate::backend::cpu::softmax_sums;

/// What is needed to turn logits of a row into natural-log probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSoftmax {
    /// Index of the first largest logit.
    pub best: usize,
    /// `ln sum e^logit`.
    pub log_sum_exp: f64,
}

impl LogSoftmax {
    /// Looks at a row.
    pub fn of(logits: &[f32]) -> Self {
        softmax_sums(Isa::detect(), logits).into()
    }

    /// The log-probability of a logit of this row.
    pub fn log_probability(&self, logit: f32) -> f64 {
        f64::from(logit) - self.log_sum_exp
    }
}

impl From<SoftmaxSums> for LogSoftmax {
    fn from(sums: SoftmaxSums) -> Self {
        Self {
            best: sums.best,
            log_sum_exp: f64::from(sums.max) + sums.sum.ln(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 5.0).collect();
        let row = LogSoftmax::of(&logits);
        let sum: f64 = logits.iter().map(|x| row.log_probability(*x).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(row.best, logits.iter().position(|x| *x == 20.0).unwrap());
    }
}
