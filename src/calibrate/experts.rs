//! Which experts the samples reached, and what rounding can make of it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::statistics::{InputSums, Statistics};

/// How much a matrix's own second moments count beside those that stand in for them, 0 to 1: the stand-in counts as half
/// as many tokens as there are inputs, since fewer tokens than inputs leave second moments singular.
pub fn own_share(tokens: u64, inputs: usize) -> f64 {
    let (tokens, prior) = (tokens as f64, inputs as f64 / 2.0);
    tokens / (tokens + prior)
}

/// On what an expert is rounded with error feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertMoments {
    /// Its own second moments: it saw at least as many tokens as it has inputs.
    Own,
    /// Second moments drawn far towards what is known of all experts.
    Shrunk,
    /// No token chose it: it is shown all of them.
    AllTokens,
}

/// What one expert saw.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ExpertEntry {
    /// Block of the network.
    pub block: usize,
    /// Expert of the block.
    pub expert: usize,
    /// Tokens routed to it.
    pub tokens: u64,
    /// Of all tokens routed in its block, 0 to 1.
    pub share: f64,
    /// Sum of their squared router weights.
    pub weight: f64,
    /// The larger width of its two inputs.
    pub inputs: usize,
    /// On what it will be rounded.
    pub moments: ExpertMoments,
    /// [`own_share`].
    pub own_share: f64,
}

impl Statistics {
    /// Every expert of every block, in order; empty for a model without experts.
    pub fn experts(&self) -> Vec<ExpertEntry> {
        let mut blocks: BTreeMap<usize, Vec<&[Option<InputSums>]>> = BTreeMap::new();
        for (name, matrices) in &self.inputs {
            if let Some(block) = block_of_experts(name) {
                blocks.entry(block).or_default().push(matrices);
            }
        }
        blocks
            .iter()
            .flat_map(|(block, stacks)| entries(*block, stacks))
            .collect()
    }
}

/// `blk.N.ffn_up_exps.weight` and `blk.N.ffn_down_exps.weight`.
fn block_of_experts(name: &str) -> Option<usize> {
    let (block, tensor) = name.strip_prefix("blk.")?.split_once('.')?;
    let is_stack = ["ffn_up_exps.weight", "ffn_down_exps.weight"].contains(&tensor);
    block.parse().ok().filter(|_| is_stack)
}

/// Every stack of a block is read by the same tokens.
fn entries(block: usize, stacks: &[&[Option<InputSums>]]) -> Vec<ExpertEntry> {
    let Some(first) = stacks.first() else {
        return Vec::new();
    };
    let widths = stacks.iter().flat_map(|stack| stack.iter().flatten());
    let inputs = widths.map(|sums| sums.squares.len()).max().unwrap_or(0);
    let tokens = |sums: &Option<InputSums>| sums.as_ref().map_or(0, |sums| sums.tokens);
    let all: u64 = first.iter().map(tokens).sum();
    let entry = |(expert, sums): (usize, &Option<InputSums>)| {
        let tokens = tokens(sums);
        ExpertEntry {
            block,
            expert,
            tokens,
            share: tokens as f64 / all.max(1) as f64,
            weight: sums.as_ref().map_or(0.0, |sums| sums.weight),
            inputs,
            moments: match tokens {
                0 => ExpertMoments::AllTokens,
                tokens if tokens < inputs as u64 => ExpertMoments::Shrunk,
                _ => ExpertMoments::Own,
            },
            own_share: own_share(tokens, inputs),
        }
    };
    first.iter().enumerate().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_listed_with_what_rounding_makes_of_them() {
        let seen = |tokens: u64, width: usize| {
            (tokens > 0).then(|| InputSums {
                squares: vec![1.0; width],
                max_abs: vec![1.0; width],
                tokens,
                weight: tokens as f64 / 4.0,
            })
        };
        let stack = |width| vec![seen(8, width), seen(0, width), seen(2, width)];
        let names = ["blk.11.ffn_up_exps.weight", "blk.11.ffn_down_exps.weight"];
        let mut statistics = Statistics::default();
        for (name, width) in names.into_iter().zip([4, 6]) {
            statistics.inputs.insert(name.into(), stack(width));
        }
        statistics
            .inputs
            .insert("blk.0.ffn_up.weight".into(), vec![seen(9, 4)]);
        let experts = statistics.experts();
        let found: Vec<_> = experts.iter().map(|e| (e.tokens, e.moments)).collect();
        use ExpertMoments::{AllTokens, Own, Shrunk};
        assert_eq!(found, [(8, Own), (0, AllTokens), (2, Shrunk)]);
        let first = experts[0];
        assert_eq!((first.block, first.inputs, first.share), (11, 6, 0.8));
        assert_eq!((first.weight, experts[2].own_share), (2.0, 0.4));
    }
}
