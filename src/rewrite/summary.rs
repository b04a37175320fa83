//! What was rewritten, for people and reports.

use serde::Serialize;

use super::orthogonal::has_hadamard;
use super::{RewriteSettings, Rewrites, Rotation, Space};

/// Rewrites in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RewriteSummary {
    /// What was asked for.
    pub settings: RewriteSettings,
    /// One line per kind of rewrite, with the blocks it was applied to.
    pub applied: Vec<String>,
}

/// Producers of spaces with what is said of them, in the order of the lines.
const SPACES: &[(&str, &str)] = &[
    ("attn_norm", "inputs of readers"),
    ("output_norm", "input of the head"),
    ("ssm_norm", "inputs of ssm_out"),
    ("attn_k", "keys and queries"),
    ("attn_v", "values of attention heads"),
    ("ffn_up", "hidden units of MLPs"),
    ("ffn_up_exps", "hidden units of routed experts"),
    ("ffn_up_shexp", "hidden units of shared experts"),
    ("ffn_latent_down", "latent inputs of experts"),
    ("ffn_down_exps", "latent outputs of experts"),
];

/// Whether a line is about a space.
type Is = fn(&Space) -> bool;

impl Rewrites {
    /// What was applied where.
    pub fn describe(&self) -> RewriteSummary {
        let mut applied = Vec::new();
        applied.extend(self.rotation_line());
        let norms = self.count(|name, _| is_stream_norm(name));
        if norms > 0 {
            applied.push(format!("{norms} norm weights folded into their readers"));
        }
        for (producer, what) in SPACES {
            applied.extend(self.space_lines(producer, what));
        }
        RewriteSummary {
            settings: self.settings.clone(),
            applied,
        }
    }

    /// One line for the artifact's keys.
    pub fn summary(&self) -> String {
        let rotation = match self.rotation {
            None => "no rotation",
            Some(_) if self.settings.rotation == Rotation::Klt => "klt x hadamard rotation",
            Some(_) => "hadamard rotation",
        };
        let smoothed = self.count(|_, space| space.scale.is_some());
        let rotated = self.count(|_, space| space.rotation.is_some());
        let ordered = self.count(|_, space| space.order.is_some());
        let seed = self.settings.seed;
        format!(
            "{rotation}, {rotated} spaces rotated, {smoothed} smoothed, {ordered} ordered, seed {seed}"
        )
    }

    fn count(&self, is_meant: impl Fn(&str, &Space) -> bool) -> usize {
        let spaces = self.spaces.iter();
        spaces.filter(|(name, space)| is_meant(name, space)).count()
    }

    fn rotation_line(&self) -> Option<String> {
        let rotation = self.rotation.as_ref()?;
        let axes = match self.settings.rotation {
            Rotation::Klt => "principal axes, ",
            Rotation::None | Rotation::Hadamard => "",
        };
        let (size, seed) = (rotation.size(), self.settings.seed);
        let last = match has_hadamard(size) {
            true => "a Hadamard matrix",
            false => "a Hadamard matrix times a random one, for want of one of this size",
        };
        Some(format!(
            "residual stream of {size} rotated: {axes}random signs, {last}, seed {seed}"
        ))
    }

    fn space_lines(&self, producer: &str, what: &str) -> Vec<String> {
        let of = |is_meant: Is| -> Vec<&str> {
            let spaces = self.spaces.iter().filter(|(_, space)| is_meant(space));
            let names = spaces.map(|(name, _)| name.as_str());
            let mut blocks: Vec<(usize, &str)> =
                names.filter_map(|name| block_of(name, producer)).collect();
            blocks.sort_unstable();
            blocks.into_iter().map(|(_, block)| block).collect()
        };
        let changes: [(&str, Is); 3] = [
            ("smoothed", |space| space.scale.is_some()),
            ("rotated", |space| space.rotation.is_some()),
            ("sorted by loudness", |space| space.order.is_some()),
        ];
        let lines = changes.into_iter().filter_map(|(how, is_meant)| {
            let blocks = of(is_meant);
            match blocks.as_slice() {
                [] => None,
                [""] => Some(format!("{what} {how}")),
                [block] => Some(format!("{what} {how}: block {block}")),
                blocks => Some(format!("{what} {how}: blocks {}", blocks.join(", "))),
            }
        });
        lines.collect()
    }
}

/// Whether a space is behind a norm over the stream.
fn is_stream_norm(name: &str) -> bool {
    name == "output_norm" || name.ends_with(".attn_norm")
}

/// The block of a space if `producer` makes it: as a number to sort by, and as it is written.
fn block_of<'a>(name: &'a str, producer: &str) -> Option<(usize, &'a str)> {
    if name == producer {
        return Some((0, ""));
    }
    let (block, found) = name.strip_prefix("blk.")?.split_once('.')?;
    (found == producer).then_some((block.parse().ok()?, block))
}
