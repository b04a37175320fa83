//! Statistics as an importance matrix of llama.cpp.

use nemoconv_formats::imatrix::ImatrixSums;

use super::statistics::{InputSums, Statistics};

/// The head, which llama-imatrix looks at only when it is asked to.
const HEAD: &str = "output.weight";

impl Statistics {
    /// What llama-imatrix collects on the same tokens: unweighted sums of squares and counts of tokens, of every matrix
    /// of a block, of the head only with `with_head` (`--process-output`). Experts that no token chose have zeros.
    pub fn importance(&self, with_head: bool) -> Vec<ImatrixSums> {
        let inputs = self.inputs.iter();
        inputs
            .filter(|(name, _)| with_head || *name != HEAD)
            .filter_map(|(name, matrices)| entry(name, matrices))
            .collect()
    }
}

/// `None` where no matrix of the stack saw a token: nothing is known, not even the width.
fn entry(name: &str, matrices: &[Option<InputSums>]) -> Option<ImatrixSums> {
    let width = matrices.iter().flatten().next()?.squares.len();
    let mut sums = ImatrixSums {
        name: name.to_owned(),
        squares: Vec::with_capacity(width * matrices.len()),
        counts: Vec::with_capacity(matrices.len()),
    };
    for matrix in matrices {
        match matrix {
            Some(seen) => sums
                .squares
                .extend(seen.squares.iter().map(|sum| *sum as f32)),
            None => sums.squares.extend(std::iter::repeat_n(0.0, width)),
        }
        let tokens = matrix.as_ref().map_or(0, |sums| sums.tokens);
        sums.counts.push(tokens as f32);
    }
    Some(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unseen_experts_have_zeros_and_the_head_is_left_out() {
        let seen = |squares: &[f64]| {
            Some(InputSums {
                squares: squares.to_vec(),
                max_abs: vec![1.0; squares.len()],
                tokens: 2,
                weight: 0.5,
            })
        };
        let inputs = [
            ("a".to_owned(), vec![None, seen(&[1.0, 2.0])]),
            ("b".to_owned(), vec![None]),
            (HEAD.to_owned(), vec![seen(&[3.0])]),
        ];
        let statistics = Statistics {
            inputs: inputs.into_iter().collect(),
            ..Statistics::default()
        };
        let entries = statistics.importance(false);
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].squares, [0.0, 0.0, 1.0, 2.0]);
        assert_eq!(entries[0].counts, [0.0, 2.0]);
        assert_eq!(statistics.importance(true).len(), 2);
    }
}
