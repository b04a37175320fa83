//! Log-likelihoods of continuations: the one question that benchmarks ask a model.

use rayon::prelude::*;

use super::log_softmax::LogSoftmax;
use super::network::{Network, Sequence};
use super::observer::Silent;
use super::state::State;
use crate::backend::Backend;
use crate::error::{Error, Fault, Result};

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

/// A network that scores, in batches of about so many tokens.
pub struct NetworkScorer<B: Backend> {
    network: Network<B>,
    batch_tokens: usize,
}

/// Rows of one head product are limited so that their logits stay near this many values.
const LOGITS_AT_ONCE: usize = 1 << 23;

/// One scored row: which row of the normed stream, which token, whose sum.
#[derive(Debug, Clone, Copy)]
struct Target {
    row: u32,
    token: u32,
    score: usize,
}

impl<B: Backend> NetworkScorer<B> {
    /// A scorer that runs about `batch_tokens` tokens together.
    pub fn new(network: Network<B>, batch_tokens: usize) -> Self {
        Self {
            network,
            batch_tokens,
        }
    }

    /// The network.
    pub fn network(&self) -> &Network<B> {
        &self.network
    }

    /// Scores groups that fit one batch.
    fn score_batch(&self, groups: &[PrefixGroup]) -> Result<Vec<Vec<ContinuationScore>>> {
        let backend = self.network.backend();
        let mut states: Vec<State<B>> = groups.iter().map(|_| self.network.empty_state()).collect();
        let mut sequences: Vec<Sequence<'_, B>> = groups
            .iter()
            .zip(&mut states)
            .map(|(group, state)| Sequence {
                tokens: &group.prefix,
                state,
            })
            .collect();
        let normed = self.network.run(&mut sequences, &mut Silent)?;
        let mut scores: Vec<Vec<ContinuationScore>> = groups
            .iter()
            .map(|group| vec![ContinuationScore::CERTAIN; group.continuations.len()])
            .collect();
        let mut flat: Vec<&mut ContinuationScore> = scores.iter_mut().flatten().collect();
        self.add_log_likelihoods(&normed, &prefix_targets(groups), &mut flat)?;

        let forks = groups.iter().zip(&states).flat_map(|(group, state)| {
            let longer = group.continuations.iter().filter(|c| !c.tokens.is_empty());
            longer.map(|_| state.fork(backend))
        });
        let mut forks: Vec<State<B>> = forks.collect();
        let continuations = groups.iter().flat_map(|group| &group.continuations);
        let longer = continuations.filter(|continuation| !continuation.tokens.is_empty());
        let mut sequences: Vec<Sequence<'_, B>> = longer
            .zip(&mut forks)
            .map(|(continuation, state)| Sequence {
                tokens: &continuation.tokens,
                state,
            })
            .collect();
        if sequences.is_empty() {
            return Ok(scores);
        }
        let normed = self.network.run(&mut sequences, &mut Silent)?;
        let mut flat: Vec<&mut ContinuationScore> = scores.iter_mut().flatten().collect();
        self.add_log_likelihoods(&normed, &continuation_targets(groups), &mut flat)?;
        Ok(scores)
    }

    /// Adds the log-probability of every target to its score. Targets of one row stand together.
    fn add_log_likelihoods(
        &self,
        normed: &B::Buffer,
        targets: &[Target],
        scores: &mut [&mut ContinuationScore],
    ) -> Result<()> {
        let vocabulary = self.vocab_size();
        let at_once = (LOGITS_AT_ONCE / vocabulary).max(1);
        let by_row: Vec<&[Target]> = targets.chunk_by(|a, b| a.row == b.row).collect();
        for rows in by_row.chunks(at_once) {
            let indices: Vec<u32> = rows.iter().map(|targets| targets[0].row).collect();
            let logits = self.network.logits(normed, &indices, &mut Silent)?;
            let judged: Vec<_> = logits
                .par_chunks_exact(vocabulary)
                .zip(rows)
                .map(|(logits, targets)| judge(logits, targets))
                .collect();
            for (target, log_probability, is_best) in judged.into_iter().flatten() {
                let score = &mut *scores[target.score];
                score.log_likelihood += log_probability;
                score.is_greedy &= is_best;
            }
        }
        Ok(())
    }
}

impl ContinuationScore {
    /// The score of nothing.
    const CERTAIN: Self = Self {
        log_likelihood: 0.0,
        is_greedy: true,
    };
}

/// Log-probability of each target, and whether it is the first of the largest logits.
fn judge(logits: &[f32], targets: &[Target]) -> Vec<(Target, f64, bool)> {
    let row = LogSoftmax::of(logits);
    targets
        .iter()
        .map(|target| {
            let log_probability = row.log_probability(logits[target.token as usize]);
            (*target, log_probability, row.best == target.token as usize)
        })
        .collect()
}

/// First targets that the last token of a prefix predicts.
fn prefix_targets(groups: &[PrefixGroup]) -> Vec<Target> {
    let mut targets = Vec::new();
    let (mut end, mut score) = (0, 0);
    for group in groups {
        end += group.prefix.len();
        for continuation in &group.continuations {
            if continuation.targets.len() > continuation.tokens.len() {
                targets.push(Target {
                    row: (end - 1) as u32,
                    token: continuation.targets[0],
                    score,
                });
            }
            score += 1;
        }
    }
    targets
}

/// Targets predicted by the continuations' own tokens.
fn continuation_targets(groups: &[PrefixGroup]) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut end = 0;
    let continuations = groups.iter().flat_map(|group| &group.continuations);
    for (score, continuation) in continuations.enumerate() {
        end += continuation.tokens.len();
        let own = continuation.targets.len().min(continuation.tokens.len());
        let tail = &continuation.targets[continuation.targets.len() - own..];
        targets.extend(tail.iter().enumerate().map(|(index, token)| Target {
            row: (end - own + index) as u32,
            token: *token,
            score,
        }));
    }
    targets
}

/// Token positions that a group needs.
fn cost(group: &PrefixGroup) -> usize {
    let continuations = group.continuations.iter();
    group.prefix.len() + continuations.map(|c| c.tokens.len()).sum::<usize>()
}

impl<B: Backend> Scorer for NetworkScorer<B> {
    fn vocab_size(&self) -> usize {
        self.network.config().vocab_size
    }

    fn score(&self, groups: &[PrefixGroup]) -> Result<Vec<Vec<ContinuationScore>>> {
        check(groups, self.vocab_size())?;
        let mut scores = Vec::with_capacity(groups.len());
        let mut rest = groups;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fitting = rest
                .iter()
                .take_while(|group| {
                    tokens += cost(group);
                    tokens <= self.batch_tokens
                })
                .count();
            let (batch, after) = rest.split_at(fitting.max(1));
            scores.extend(self.score_batch(batch)?);
            rest = after;
        }
        Ok(scores)
    }
}

/// Every group is as its type promises, every target a token.
fn check(groups: &[PrefixGroup], vocabulary: usize) -> Result<()> {
    let wrong = |what: String| Err(Error::Run(Fault::new(what)));
    for group in groups {
        if group.prefix.is_empty() {
            return wrong("a prefix has no tokens".into());
        }
        for Continuation { tokens, targets } in &group.continuations {
            if targets.is_empty() || targets.len() > tokens.len() + 1 {
                let (targets, tokens) = (targets.len(), tokens.len());
                return wrong(format!("{targets} targets for {tokens} tokens"));
            }
            if let Some(token) = targets.iter().find(|token| **token as usize >= vocabulary) {
                return wrong(format!(
                    "token id {token} is outside the model's vocabulary of {vocabulary}"
                ));
            }
        }
    }
    Ok(())
}
