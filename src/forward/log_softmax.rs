//! Log-probabilities of one row of logits.

use crate::backend::cpu::{self, kernels::Isa};

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
        let isa = Isa::detect();
        let max = cpu::largest(isa, logits);
        Self {
            best: first(logits, max),
            log_sum_exp: f64::from(max) + cpu::sum_of_exps(isa, logits, max).ln(),
        }
    }

    /// The log-probability of a logit of this row.
    pub fn log_probability(&self, logit: f32) -> f64 {
        f64::from(logit) - self.log_sum_exp
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
    fn probabilities_sum_to_one() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 5.0).collect();
        let row = LogSoftmax::of(&logits);
        let sum: f64 = logits.iter().map(|x| row.log_probability(*x).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(row.best, logits.iter().position(|x| *x == 20.0).unwrap());
    }
}
