//! The order of blocks in a hybrid: `hybrid_override_pattern` or `layers_block_type` of config.json.

use serde_json::Value;

/// What a block computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// Mamba-2 mixer, `M`.
    Mamba,
    /// Grouped-query attention without positions, `*`.
    Attention,
    /// Dense relu-squared MLP, `-`.
    Mlp,
    /// Routed and shared experts, `E`.
    Moe,
}

impl BlockKind {
    fn from_letter(letter: char) -> Option<Self> {
        match letter {
            'M' => Some(Self::Mamba),
            '*' => Some(Self::Attention),
            '-' => Some(Self::Mlp),
            'E' => Some(Self::Moe),
            _ => None,
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        match word {
            "mamba" | "linear_attention" => Some(Self::Mamba),
            "attention" | "full_attention" => Some(Self::Attention),
            "mlp" => Some(Self::Mlp),
            "moe" => Some(Self::Moe),
            _ => None,
        }
    }
}

/// One kind per block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HybridPattern(Vec<BlockKind>);

impl HybridPattern {
    /// Parses the pattern string or the list of block types.
    ///
    /// # Errors
    /// A sentence naming the first block kind that is not known, or what the value is instead.
    pub fn parse(value: &Value) -> Result<Self, String> {
        let kinds: Option<Result<Vec<_>, String>> = match value {
            Value::String(letters) => Some(
                letters
                    .chars()
                    .map(|c| BlockKind::from_letter(c).ok_or_else(|| unknown(&c.to_string())))
                    .collect(),
            ),
            Value::Array(words) => Some(words.iter().map(parse_word).collect()),
            _ => None,
        };
        match kinds {
            Some(kinds) => Self::from_kinds(kinds?),
            None => Err("block pattern must be a string or a list of block types".into()),
        }
    }

    /// A pattern from its blocks.
    ///
    /// # Errors
    /// There are none.
    pub fn from_kinds(kinds: Vec<BlockKind>) -> Result<Self, String> {
        if kinds.is_empty() {
            return Err("block pattern is empty".into());
        }
        Ok(Self(kinds))
    }

    /// One kind per block, in order.
    pub fn kinds(&self) -> &[BlockKind] {
        &self.0
    }

    /// Whether any block is of this kind.
    pub fn has(&self, kind: BlockKind) -> bool {
        self.0.contains(&kind)
    }
}

fn parse_word(value: &Value) -> Result<BlockKind, String> {
    let word = value
        .as_str()
        .ok_or("`layers_block_type` must hold strings")?;
    BlockKind::from_word(word).ok_or_else(|| unknown(word))
}

fn unknown(kind: &str) -> String {
    format!(
        "unknown block kind `{}`: expected M (mamba), * (attention), - (mlp) or E (moe)",
        kind.escape_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_spellings_mean_the_same() {
        let letters = HybridPattern::parse(&json!("M-*E")).unwrap();
        let words =
            HybridPattern::parse(&json!(["mamba", "mlp", "full_attention", "moe"])).unwrap();
        assert_eq!(letters, words);
    }

    #[test]
    fn unknown_kinds_are_named() {
        assert!(
            HybridPattern::parse(&json!("M?"))
                .unwrap_err()
                .contains("`?`")
        );
        assert!(
            HybridPattern::parse(&json!(["gru"]))
                .unwrap_err()
                .contains("`gru`")
        );
        assert!(HybridPattern::parse(&json!("")).is_err());
        assert!(HybridPattern::parse(&json!(7)).is_err());
    }
}
