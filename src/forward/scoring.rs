//! Log-likelihoods of continuations: the one question that benchmarks ask a model.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::log_softmax::LogSoftmax;
use super::network::{Network, Sequence};
use super::observer::Silent;
use super::state::State;
use crate::backend::Backend;
use crate::error::{Error, Fault, Result};
use crate::parallel;

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

/// A network that scores. Batches run side by side, one in each of some lanes: an operation then waits for no thread,
/// and where batches have run out, threads help with the operations of those that are left.
pub struct NetworkScorer<B: Backend> {
    network: Network<B>,
    tokens_together: usize,
}

/// Batches that run side by side: more would be too short to be worth unpacking a large model's weights for.
const MAX_LANES: usize = 2;

/// Rows of one head product are limited so that their logits stay near this many values.
const LOGITS_AT_ONCE: usize = 1 << 20;

/// One scored row: which row of the normed stream, which token, whose sum.
#[derive(Debug, Clone, Copy)]
struct Target {
    row: u32,
    token: u32,
    score: usize,
}

/// What a model says of a target.
struct Judged {
    score: usize,
    log_probability: f64,
    /// Whether it is the first of the largest logits.
    is_best: bool,
}

impl<B: Backend> NetworkScorer<B> {
    /// A scorer that runs about `tokens_together` tokens at a time, which bounds its memory.
    pub fn new(network: Network<B>, tokens_together: usize) -> Self {
        Self {
            network,
            tokens_together,
        }
    }

    /// The network.
    pub fn network(&self) -> &Network<B> {
        &self.network
    }

    /// Scores groups that fit one batch.
    fn score_batch(&self, groups: &[PrefixGroup]) -> Result<Vec<Vec<ContinuationScore>>> {
        let continuations = || groups.iter().flat_map(|group| &group.continuations);
        let mut scores = vec![ContinuationScore::CERTAIN; continuations().count()];
        let states = groups.iter().map(|_| self.network.empty_state());
        let mut states = states.collect::<Result<Vec<State<B>>>>()?;
        let prefixes = groups.iter().map(|group| group.prefix.as_slice());
        self.run(
            prefixes.zip(&mut states),
            &prefix_targets(groups),
            &mut scores,
        )?;

        let is_longer = |continuation: &&Continuation| !continuation.tokens.is_empty();
        let mut forks = Vec::new();
        for (group, state) in groups.iter().zip(states) {
            let longer = group.continuations.iter().filter(is_longer);
            forks.extend(self.network.forks(state, longer.count())?);
        }
        let longer = continuations().filter(is_longer);
        let inputs = longer.map(|continuation| continuation.tokens.as_slice());
        self.run(
            inputs.zip(&mut forks),
            &continuation_targets(groups),
            &mut scores,
        )?;

        let mut scores = scores.into_iter();
        let of_group =
            |group: &PrefixGroup| scores.by_ref().take(group.continuations.len()).collect();
        Ok(groups.iter().map(of_group).collect())
    }

    /// Runs sequences and adds the log-probability of every target to its score. Targets of one row stand together.
    fn run<'a>(
        &self,
        sequences: impl Iterator<Item = (&'a [u32], &'a mut State<B>)>,
        targets: &[Target],
        scores: &mut [ContinuationScore],
    ) -> Result<()>
    where
        B: 'a,
    {
        let sequences = sequences.map(|(tokens, state)| Sequence { tokens, state });
        let by_row: Vec<&[Target]> = targets.chunk_by(|a, b| a.row == b.row).collect();
        let wanted: Vec<u32> = by_row.iter().map(|targets| targets[0].row).collect();
        let mut sequences: Vec<_> = sequences.collect();
        let normed = self
            .network
            .run_wanted(&mut sequences, &wanted, &mut Silent)?;
        let vocabulary = self.vocab_size();
        let at_once = (LOGITS_AT_ONCE / vocabulary).max(1);
        let rows: Vec<u32> = (0..wanted.len() as u32).collect();
        for (rows, by_row) in rows.chunks(at_once).zip(by_row.chunks(at_once)) {
            let logits = self.network.logits_at_head(&normed, rows, &mut Silent)?;
            for judged in self.judge(&logits, by_row)? {
                let score = &mut scores[judged.score];
                score.log_likelihood += judged.log_probability;
                score.is_greedy &= judged.is_best;
            }
        }
        Ok(())
    }

    /// Judges the targets of each row of logits.
    fn judge(&self, logits: &B::Buffer, by_row: &[&[Target]]) -> Result<Vec<Judged>> {
        let (backend, vocabulary) = (self.network.head_backend(), self.vocab_size());
        let rows = backend.softmax_sums(logits, vocabulary)?;
        let rows: Vec<LogSoftmax> = rows.into_iter().map(LogSoftmax::from).collect();
        let targets = by_row.iter().enumerate();
        let targets =
            targets.flat_map(|(row, targets)| targets.iter().map(move |target| (row, target)));
        let place = |(row, target): (usize, &Target)| (row * vocabulary) as u32 + target.token;
        let places: Vec<u32> = targets.clone().map(place).collect();
        let logits = backend.download_all(backend.gather(logits, 1, &places)?)?;
        let judged = targets.zip(logits).map(|((row, target), logit)| Judged {
            score: target.score,
            log_probability: rows[row].log_probability(logit),
            is_best: rows[row].best == target.token as usize,
        });
        Ok(judged.collect())
    }
}

impl ContinuationScore {
    /// The score of nothing.
    const CERTAIN: Self = Self {
        log_likelihood: 0.0,
        is_greedy: true,
    };
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
        let lanes = rayon::current_num_threads().min(MAX_LANES);
        let batches = batches(groups, self.tokens_together / lanes);
        let next = AtomicUsize::new(0);
        let lane = |_| -> Result<Vec<_>> {
            let take = || {
                let index = next.fetch_add(1, Ordering::Relaxed);
                Some((index, *batches.get(index)?))
            };
            let taken = std::iter::from_fn(take);
            taken
                .map(|(index, batch)| Ok((index, self.score_batch(batch)?)))
                .collect()
        };
        let mut scored = parallel::try_map(0..lanes, lane)?.concat();
        scored.sort_by_key(|(index, _)| *index);
        Ok(scored.into_iter().flat_map(|(_, scores)| scores).collect())
    }
}

/// Runs of groups with about so many tokens each.
fn batches(groups: &[PrefixGroup], tokens: usize) -> Vec<&[PrefixGroup]> {
    let mut batches = Vec::new();
    let mut rest = groups;
    while !rest.is_empty() {
        let mut total = 0;
        let fitting = rest.iter().take_while(|group| {
            total += cost(group);
            total <= tokens
        });
        let (batch, after) = rest.split_at(fitting.count().max(1));
        batches.push(batch);
        rest = after;
    }
    batches
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::artifact::StoredModel;
    use crate::backend::cpu::{Cpu, Residence};
    use crate::forward::numerics::Numerics;

    /// Scores of the nano model, so many tokens together, on so many threads.
    fn scores(
        groups: &[PrefixGroup],
        tokens_together: usize,
        threads: usize,
    ) -> Vec<Vec<ContinuationScore>> {
        let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
        let model = Arc::new(model);
        let backend = Cpu::new(Arc::clone(&model), Residence::Mapped);
        let network = Network::open(&model, backend, &Numerics::EXACT).unwrap();
        let scorer = NetworkScorer::new(network, tokens_together);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| scorer.score(groups).unwrap())
    }

    #[test]
    fn a_score_depends_on_neither_batch_nor_threads() {
        let tokens = |seed: u32, len: u32| (0..len).map(|i| (seed * 31 + i * 7) % 900).collect();
        let continuation = |seed: u32, len: u32| Continuation {
            tokens: tokens(seed, len),
            targets: tokens(seed + 1, len + 1),
        };
        let group = |seed: u32| PrefixGroup {
            prefix: tokens(seed, 1 + seed % 9),
            // One has no tokens of its own: it is scored with the prefix alone.
            continuations: (0..3).map(|i| continuation(seed + i, i * 2)).collect(),
        };
        let groups: Vec<_> = (0..20).map(group).collect();
        let expected = scores(&groups, usize::MAX, 1);
        assert_eq!(scores(&groups, 60, 3), expected);
        assert_eq!(scores(&groups[..1], 1, 1)[0], expected[0]);
        let alone = [PrefixGroup {
            continuations: vec![continuation(0, 0)],
            ..groups[0].clone()
        }];
        assert_eq!(scores(&alone, 60, 2)[0][0], expected[0][0]);
    }
}
