//! From strings to what the model runs: tokens, truncated windows, groups that share a prefix.
//!
//! Enters: a [`Question`] and an encoder. Leaves: [`Tokenized`], and the answers that scores of its groups make.
//! Knows no task and no metric.

use sha2::{Digest, Sha256};

use super::python_text::is_space;
use super::tasks::{Question, Request};
use crate::forward::scoring::{Continuation, ContinuationScore, PrefixGroup};
use crate::model::tokenizer::TextEncoder;

/// How strings become model inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompting {
    /// Whether special tokens are added; by default the tokenizer decides.
    pub add_bos: Option<bool>,
    /// Longest input in tokens; longer ones lose their beginning.
    pub max_length: usize,
}

/// Token ids of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPair {
    /// Of the context alone.
    pub context: Vec<u32>,
    /// What context and continuation together have after as many tokens.
    pub continuation: Vec<u32>,
}

/// One input of the model; the targets are scored at its last positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// At least one token, at least as many as `targets`.
    pub input: Vec<u32>,
    /// At least one token.
    pub targets: Vec<u32>,
}

/// A question as the model gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    windows: Vec<Window>,
    groups: Vec<Group>,
    /// The likelihoods of all windows make one answer.
    is_rolling: bool,
}

/// Windows that begin alike, and which those are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    prefix_tokens: usize,
    members: Vec<usize>,
}

/// A model's answer to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// Sum of natural-log probabilities.
    pub log_likelihood: f64,
    /// Whether greedy decoding would have written the continuation.
    pub is_greedy: bool,
}

/// What is wrong with a text, without its place.
type Checked<T> = Result<T, String>;

impl Tokenized {
    /// Encodes and cuts a question.
    ///
    /// # Errors
    /// A text that the encoder refuses, a continuation without tokens of its own or longer than the longest input,
    /// an empty context where the tokenizer has no token to stand for it.
    pub fn of(question: &Question, encoder: &TextEncoder, prompting: Prompting) -> Checked<Self> {
        let max_length = prompting.max_length;
        match question {
            Question::Choices { requests, .. } => {
                let window = |request| {
                    let pair = TokenPair::of(request, encoder, prompting.add_bos)?;
                    pair.window(max_length)
                };
                let windows: Vec<_> = requests.iter().map(window).collect::<Checked<_>>()?;
                Ok(Self {
                    groups: share_prefixes(&windows),
                    windows,
                    is_rolling: false,
                })
            }
            Question::Rolling { text, .. } => {
                let tokens = encode(encoder, text, prompting.add_bos)?;
                let windows = rolling_windows(&tokens, prefix_token(encoder)?, max_length);
                if windows.is_empty() {
                    return Err("the text has no tokens".into());
                }
                let alone = |(index, window): (usize, &Window)| Group {
                    prefix_tokens: window.longest_prefix(),
                    members: vec![index],
                };
                Ok(Self {
                    groups: windows.iter().enumerate().map(alone).collect(),
                    windows,
                    is_rolling: true,
                })
            }
        }
    }

    /// What the model runs.
    pub fn prefix_groups(&self) -> Vec<PrefixGroup> {
        let group = |group: &Group| {
            let continuations = group.members.iter().map(|member| {
                let window = &self.windows[*member];
                Continuation {
                    tokens: window.input[group.prefix_tokens..].to_vec(),
                    targets: window.targets.clone(),
                }
            });
            PrefixGroup {
                prefix: self.windows[group.members[0]].input[..group.prefix_tokens].to_vec(),
                continuations: continuations.collect(),
            }
        };
        self.groups.iter().map(group).collect()
    }

    /// The answers, from the scores of [`Tokenized::prefix_groups`] in the same order.
    pub fn answers(&self, scores: &[Vec<ContinuationScore>]) -> Vec<Answer> {
        let nothing = Answer {
            log_likelihood: 0.0,
            is_greedy: true,
        };
        let mut answers = vec![nothing; self.windows.len()];
        for (group, scores) in self.groups.iter().zip(scores) {
            for (member, score) in group.members.iter().zip(scores) {
                answers[*member] = Answer {
                    log_likelihood: score.log_likelihood,
                    is_greedy: score.is_greedy,
                };
            }
        }
        if !self.is_rolling {
            return answers;
        }
        vec![Answer {
            log_likelihood: answers.iter().map(|answer| answer.log_likelihood).sum(),
            is_greedy: answers.iter().all(|answer| answer.is_greedy),
        }]
    }

    /// Tokens that are run, prefixes counted once.
    pub fn run_tokens(&self) -> usize {
        let group = |group: &Group| {
            let members = group.members.iter();
            let own = members.map(|member| self.windows[*member].input.len() - group.prefix_tokens);
            group.prefix_tokens + own.sum::<usize>()
        };
        self.groups.iter().map(group).sum()
    }

    /// Scored tokens of each request.
    pub fn target_tokens(&self) -> Vec<usize> {
        self.windows
            .iter()
            .map(|window| window.targets.len())
            .collect()
    }

    /// The largest token id.
    pub fn largest_id(&self) -> u32 {
        let ids = self
            .windows
            .iter()
            .flat_map(|window| window.input.iter().chain(&window.targets));
        ids.copied().max().unwrap_or(0)
    }

    /// A digest of every input and target.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        let mut add = |tokens: &[u32]| {
            hasher.update((tokens.len() as u64).to_le_bytes());
            tokens
                .iter()
                .for_each(|token| hasher.update(token.to_le_bytes()));
        };
        for window in &self.windows {
            add(&window.input);
            add(&window.targets);
        }
        super::hex(&hasher.finalize())
    }
}

impl TokenPair {
    /// Encodes a request.
    ///
    /// # Errors
    /// As for [`Tokenized::of`].
    ///
    /// Source: lm-eval `api/model.py` (`TemplateLM.loglikelihood`, `_encode_pair`).
    pub fn of(request: &Request, encoder: &TextEncoder, add_bos: Option<bool>) -> Checked<Self> {
        let pair = if request.context.is_empty() {
            Self::without_context(request, encoder)?
        } else {
            let text = format!("{}{}", request.context, request.continuation);
            // White space at the end of the context goes with the continuation.
            let context = encode(encoder, request.context.trim_end_matches(is_space), add_bos)?;
            let whole = encode(encoder, &text, add_bos)?;
            let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
            Self {
                context,
                continuation,
            }
        };
        if pair.context.is_empty() {
            return Err(format!("the context {:?} has no tokens", request.context));
        }
        if pair.continuation.is_empty() {
            return Err(format!(
                "the continuation {:?} has no tokens of its own",
                request.continuation
            ));
        }
        Ok(pair)
    }

    fn without_context(request: &Request, encoder: &TextEncoder) -> Checked<Self> {
        let prefix = prefix_token(encoder)?;
        let mut continuation = encode(encoder, &request.continuation, Some(false))?;
        if continuation.first() == Some(&prefix) {
            continuation.remove(0);
        }
        Ok(Self {
            context: vec![prefix],
            continuation,
        })
    }

    /// The last `max_length + 1` tokens without the very last, which is only a target.
    fn window(self, max_length: usize) -> Checked<Window> {
        if self.continuation.len() > max_length {
            let length = self.continuation.len();
            return Err(format!(
                "a continuation has {length} tokens, more than the longest input of {max_length}"
            ));
        }
        let mut input = self.context;
        input.extend_from_slice(&self.continuation);
        input.pop();
        input.drain(..input.len().saturating_sub(max_length));
        Ok(Window {
            input,
            targets: self.continuation,
        })
    }
}

impl Window {
    /// The scored positions begin at the last token of the prefix at the earliest.
    fn longest_prefix(&self) -> usize {
        self.input.len() + 1 - self.targets.len()
    }
}

fn encode(encoder: &TextEncoder, text: &str, add_special: Option<bool>) -> Checked<Vec<u32>> {
    encoder
        .encode(text, add_special)
        .map_err(|error| error.to_string())
}

fn prefix_token(encoder: &TextEncoder) -> Checked<u32> {
    let token = encoder.prefix_token().map(|token| token.id);
    token.ok_or_else(|| "the tokenizer has neither BOS nor EOS to begin the text with".into())
}

/// Windows that score every token once: the first is given the prefix token, every later one a token of context, the
/// last as many as fit.
///
/// Source: lm-eval `utils.py` (`get_rolling_token_windows`, `make_disjoint_window`), with a context of one token.
fn rolling_windows(tokens: &[u32], prefix: u32, max_length: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut begin = 0;
    while begin < tokens.len() {
        let end = tokens.len().min(begin + max_length);
        let input = if begin == 0 {
            std::iter::once(prefix)
                .chain(tokens[..end - 1].iter().copied())
                .collect()
        } else {
            tokens[(end - 1).saturating_sub(max_length)..end - 1].to_vec()
        };
        windows.push(Window {
            input,
            targets: tokens[begin..end].to_vec(),
        });
        begin = end;
    }
    windows
}

/// Puts windows together where running their common beginning once saves tokens.
fn share_prefixes(windows: &[Window]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (index, window) in windows.iter().enumerate() {
        let saving = |group: &Group| {
            let first = &windows[group.members[0]].input[..group.prefix_tokens];
            let common = first
                .iter()
                .zip(&window.input)
                .take_while(|(a, b)| a == b)
                .count();
            let prefix = common.min(window.longest_prefix());
            let (now, before) = (group.members.len(), group.members.len() - 1);
            let saved = (now * prefix).checked_sub(before * group.prefix_tokens)?;
            (saved > 0).then_some((saved, prefix))
        };
        let best = groups
            .iter()
            .enumerate()
            .filter_map(|(place, group)| {
                saving(group).map(|(saved, prefix)| (saved, place, prefix))
            })
            .max_by_key(|(saved, place, _)| (*saved, std::cmp::Reverse(*place)));
        match best {
            Some((_, place, prefix)) => {
                groups[place].prefix_tokens = prefix;
                groups[place].members.push(index);
            }
            None => groups.push(Group {
                prefix_tokens: window.longest_prefix(),
                members: vec![index],
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(input: &[u32], targets: usize) -> Window {
        Window {
            input: input.to_vec(),
            targets: vec![9; targets],
        }
    }

    #[test]
    fn inputs_keep_their_end() {
        let check = |context: &[u32], continuation: &[u32], max_length, input: &[u32]| {
            let pair = TokenPair {
                context: context.to_vec(),
                continuation: continuation.to_vec(),
            };
            let window = pair.window(max_length).unwrap();
            assert_eq!(window.input, input);
            assert_eq!(window.targets, continuation);
        };
        check(&[1, 2, 3], &[4, 5], 9, &[1, 2, 3, 4]);
        check(&[1, 2, 3], &[4, 5], 4, &[1, 2, 3, 4]);
        check(&[1, 2, 3], &[4, 5], 3, &[2, 3, 4]);
        check(&[1, 2, 3], &[4, 5], 2, &[3, 4]);
        let pair = TokenPair {
            context: vec![1],
            continuation: vec![2, 3, 4],
        };
        assert!(pair.window(2).unwrap_err().contains("3 tokens"));
    }

    #[test]
    fn every_token_of_a_text_is_scored_once() {
        let check = |count: u32, max_length, expected: &[(&[u32], &[u32])]| {
            let tokens: Vec<u32> = (1..=count).collect();
            let windows = rolling_windows(&tokens, 0, max_length);
            let found: Vec<_> = windows
                .iter()
                .map(|window| (&window.input[..], &window.targets[..]))
                .collect();
            assert_eq!(found, expected);
        };
        check(0, 4, &[]);
        check(3, 4, &[(&[0, 1, 2], &[1, 2, 3])]);
        check(4, 4, &[(&[0, 1, 2, 3], &[1, 2, 3, 4])]);
        check(
            9,
            4,
            &[
                (&[0, 1, 2, 3], &[1, 2, 3, 4]),
                (&[4, 5, 6, 7], &[5, 6, 7, 8]),
                (&[5, 6, 7, 8], &[9]),
            ],
        );
    }

    #[test]
    fn shared_prefixes_are_common_and_leave_the_targets() {
        let check = |windows: &[Window], expected: &[(usize, &[usize])]| {
            let groups = share_prefixes(windows);
            let found: Vec<_> = groups
                .iter()
                .map(|group| (group.prefix_tokens, &group.members[..]))
                .collect();
            assert_eq!(found, expected);
        };
        // A context of three tokens; the second choice is one token, so its input is the context alone.
        check(
            &[window(&[1, 2, 3, 4], 2), window(&[1, 2, 3], 1)],
            &[(3, &[0, 1])],
        );
        // Choices that begin alike are still scored from the context on.
        check(
            &[window(&[1, 2, 3, 4], 3), window(&[1, 2, 3, 5], 3)],
            &[(2, &[0, 1])],
        );
        // Truncation moved the beginning.
        check(
            &[window(&[2, 3, 4], 2), window(&[1, 2, 3], 1)],
            &[(2, &[0]), (3, &[1])],
        );
        // An odd one does not spoil the prefix of the others.
        check(
            &[
                window(&[1, 2, 3, 4, 5, 6], 1),
                window(&[1, 2, 3, 4, 5, 7], 1),
                window(&[1, 9, 9, 9, 9, 9], 1),
                window(&[1, 2, 3, 4, 5, 8], 1),
            ],
            &[(5, &[0, 1, 3]), (6, &[2])],
        );
    }
}
