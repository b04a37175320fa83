//! Log-likelihoods of continuations: the one question that benchmarks ask a model.

use crate::error::Result;

/// Token ids that are run once, and what is scored from the state they leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixGroup {
    /// Run once from an empty state; at least one token.
    pub prefix: Vec<u32>,
    /// Each is run from a fork of the state after `prefix`.
    pub continuations: Vec<Continuation>,
}

/// One continuation of a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// Input tokens after the prefix; may be empty.
    pub tokens: Vec<u32>,
    /// Scored at the last `targets.len()` positions of prefix and tokens: at least one, at most `tokens.len() + 1`
    /// (the first of those is predicted by the last token of the prefix).
    pub targets: Vec<u32>,
}

/// What a model says about a continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContinuationScore {
    /// Sum of the natural-log probabilities of the targets, over the whole vocabulary.
    pub log_likelihood: f64,
    /// Whether every target is the most likely token of its position.
    pub is_greedy: bool,
}

/// A model that scores continuations.
pub trait Scorer: Sync {
    /// Rows of the output matrix; every token id is below.
    fn vocab_size(&self) -> usize;

    /// Scores all groups, in order. A score does not depend on the other groups of the call.
    ///
    /// # Errors
    /// A token outside the vocabulary, a logit that is not a number (names the layer), a file that cannot be read.
    fn score(&self, groups: &[PrefixGroup]) -> Result<Vec<Vec<ContinuationScore>>>;
}
