//! Metrics of documents and of tasks, with the reference's order of operations.
//!
//! Enters: answers, gold, lengths. Leaves: numbers. Knows no text. Sums are plain ones, in the order of the documents:
//! so the reference's last digits come out (under Python up to 3.11; later ones compensate sums).

use super::requests::Answer;
use super::tasks::{Question, Task};

/// A document's value of one metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measured {
    /// A plain number; tasks take the mean.
    Number(f64),
    /// A log-likelihood and what it is spread over; tasks divide the sums.
    Weighted {
        /// Natural logarithm.
        log_likelihood: f64,
        /// Words or bytes.
        weight: u64,
    },
}

/// A task's value of one metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Aggregate {
    /// Mean or perplexity; absent without documents.
    pub value: Option<f64>,
    /// Standard error of a mean of two or more documents.
    pub stderr: Option<f64>,
}

/// Index of the first maximum.
pub fn first_maximum(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.into_iter().enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

/// The values of a task's metrics for one document, in the task's order.
pub fn measure(task: Task, question: &Question, answers: &[Answer]) -> Vec<Measured> {
    let log_likelihoods = || answers.iter().map(|answer| answer.log_likelihood);
    task.metrics()
        .iter()
        .map(|(metric, _)| match question {
            Question::Choices {
                choice_chars, gold, ..
            } => {
                let prediction = if *metric == "acc_norm" {
                    let normed = log_likelihoods().zip(choice_chars);
                    first_maximum(normed.map(|(value, chars)| value / *chars as f64))
                } else {
                    first_maximum(log_likelihoods())
                };
                Measured::Number(f64::from(u8::from(prediction == *gold)))
            }
            Question::Rolling { words, bytes, .. } => Measured::Weighted {
                log_likelihood: log_likelihoods().sum(),
                weight: if *metric == "word_perplexity" {
                    *words
                } else {
                    *bytes
                },
            },
        })
        .collect()
}

/// The value of a metric over all documents.
///
/// Source: lm-eval `api/metrics.py` (`mean`, `mean_stderr`, `weighted_perplexity`, `bits_per_byte`).
pub fn aggregate(metric: &str, documents: &[Measured]) -> Aggregate {
    if documents.is_empty() {
        return Aggregate {
            value: None,
            stderr: None,
        };
    }
    let numbers: Option<Vec<f64>> = documents
        .iter()
        .map(|measured| match measured {
            Measured::Number(number) => Some(*number),
            Measured::Weighted { .. } => None,
        })
        .collect();
    if let Some(numbers) = numbers {
        let (mean, stderr) = mean_and_stderr(&numbers);
        return Aggregate {
            value: Some(mean),
            stderr,
        };
    }
    let parts = documents.iter().map(|measured| match measured {
        Measured::Number(number) => (*number, 1),
        Measured::Weighted {
            log_likelihood,
            weight,
        } => (*log_likelihood, *weight),
    });
    let weight: u64 = parts.clone().map(|(_, weight)| weight).sum();
    let total: f64 = parts.map(|(log_likelihood, _)| log_likelihood).sum();
    let mean = total / weight as f64;
    Aggregate {
        value: Some(if metric == "bits_per_byte" {
            -mean / std::f64::consts::LN_2
        } else {
            (-mean).exp()
        }),
        stderr: None,
    }
}

/// The mean, and for two or more numbers its standard error (divisor n - 1).
pub fn mean_and_stderr(numbers: &[f64]) -> (f64, Option<f64>) {
    let count = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
    let stderr = (squares / (count - 1.0)).sqrt() / count.sqrt();
    (mean, (numbers.len() > 1).then_some(stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equals_wins() {
        let check = |values: &[f64], expected| {
            assert_eq!(first_maximum(values.iter().copied()), expected);
        };
        check(&[-2.0, -1.0, -1.0], 1);
        check(&[f64::NEG_INFINITY, f64::NEG_INFINITY], 0);
        check(&[-3.0], 0);
    }

    #[test]
    fn lengths_and_gold_decide() {
        let check = |lls: &[f64], chars: &[usize], gold, expected: [f64; 2]| {
            let question = Question::Choices {
                requests: Vec::new(),
                choice_chars: chars.to_vec(),
                gold,
            };
            let answers: Vec<_> = lls
                .iter()
                .map(|ll| Answer {
                    log_likelihood: *ll,
                    is_greedy: false,
                })
                .collect();
            let expected = expected.map(Measured::Number);
            assert_eq!(measure(Task::Piqa, &question, &answers), expected);
        };
        check(&[-10.0, -12.0], &[5, 10], 0, [1.0, 0.0]);
        check(&[-10.0, -12.0], &[5, 10], 1, [0.0, 1.0]);
        check(&[-10.0, -12.0], &[5, 10], 7, [0.0, 0.0]);
    }

    #[test]
    fn one_document_has_no_error() {
        assert_eq!(mean_and_stderr(&[1.0]), (1.0, None));
        assert_eq!(mean_and_stderr(&[1.0, 0.0]), (0.5, Some(0.5)));
        assert_eq!(aggregate("acc", &[]).value, None);
    }
}
