//! How the runtime cuts text before merging, by the name in `tokenizer.ggml.pre`.
//!
//! Enters: a name. Leaves: [`RuntimeSplits`]. Knows no vocabulary.
//!
//! Source: llama.cpp b11434, `src/llama-vocab.cpp` (`llm_tokenizer_bpe`, `llama_vocab::impl::load`). The patterns are
//! the runtime's, not those of `tokenizer.json`: `tekken` and `gpt-4o` tell upper from lower case in ASCII only.

/// What the runtime does under one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuntimeSplits {
    /// Each cuts the pieces that the one before left; matches and what lies between them are pieces.
    pub patterns: &'static [&'static str],
    /// A piece that is a token is not merged.
    pub ignore_merges: bool,
    /// Begins a prompt with the BOS token where `tokenizer.ggml.add_bos_token` is absent.
    pub adds_bos: bool,
}

impl RuntimeSplits {
    /// The rules of a name; `None` if the runtime has none, or none that work on bytes.
    pub fn of(name: &str) -> Option<Self> {
        let plain = |patterns| Self {
            patterns,
            ignore_merges: false,
            adds_bos: false,
        };
        let whole_words = |patterns| Self {
            ignore_merges: true,
            ..plain(patterns)
        };
        let with_bos = |patterns| Self {
            adds_bos: true,
            ..whole_words(patterns)
        };
        Some(match name {
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" | "jina-v5-nano" => with_bos(&[LLAMA3]),
            "tekken" => with_bos(&[TEKKEN]),
            "smaug-bpe" | "dbrx" | "chatglm-bpe" => plain(&[LLAMA3]),
            "glm4" | "glm5" => whole_words(&[LLAMA3]),
            "minicpm5" => whole_words(&[r"\p{N}{1,3}", MINICPM5]),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" | "stablelm2"
            | "hunyuan" | "solar-open" | "grok-2" => plain(&[QWEN2]),
            "qwen35" => plain(&[QWEN35]),
            "ufakzeka" => plain(&[UFAKZEKA]),
            "laguna" => plain(&[r"[^\n]+|[\n]+", QWEN2]),
            "bailingmoe" | "bailingmoe2" | "llada-moe" => plain(&[BAILINGMOE]),
            "seed-coder" => plain(&[SEED_CODER]),
            "exaone-moe" => plain(&[EXAONE_MOE]),
            "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => plain(&[GPT4O]),
            "granite-embed-multi-97m" => whole_words(&[GRANITE_MULTI]),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => {
                plain(&[r"\p{N}{1,3}", CJK, DEEPSEEK3])
            }
            "spark2_5" => plain(&[r"\p{N}{1,3}", CJK, SPARK, r"\p{N}"]),
            "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "gigachat" | "jina-v2-es"
            | "jina-v2-de" | "a.x-4.0" | "mellum" | "modern-bert" | "exaone4" | "mpt" | "olmo"
            | "jais" | "trillion" | "granite-docling" => plain(&[GPT2]),
            "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone"
            | "minerva-7b" | "mellum2" => plain(&[r"\p{N}", GPT2]),
            "falcon" => plain(&[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
            "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
            _ => return None,
        })
    }
}

/// Whether the runtime has byte-level BPE under this name, be its rules known here or not.
pub fn is_runtime_name(name: &str) -> bool {
    RuntimeSplits::of(name).is_some() || OTHER_NAMES.contains(&name)
}

/// Names whose rules are not written down here.
const OTHER_NAMES: [&str; 22] = [
    "afmoe",
    "bloom",
    "chameleon",
    "cohere2moe",
    "deepseek-coder",
    "deepseek-llm",
    "gemma4",
    "gpt3-finnish",
    "granite-embed-multi-311m",
    "jais-2",
    "jina-v1-en",
    "jina-v2-code",
    "kimi-k2",
    "mmbert",
    "poro-chat",
    "roberta-bpe",
    "sarvam-moe",
    "superbpe",
    "tiny_aya",
    "viking",
    "whitespace",
    "youtu",
];

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM5: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const UFAKZEKA: &str =
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILINGMOE: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GRANITE_MULTI: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}\p{M}])([^a-z]))*((?=[\p{L}\p{M}])([^A-Z]))+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?((?=[\p{L}\p{M}])([^a-z]))+((?=[\p{L}\p{M}])([^A-Z]))*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CJK: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of masked language models go with vocabularies of whole words.
    #[test]
    fn the_runtime_has_every_name_of_the_digests() {
        let digests = include_str!("pre_tokenizer_digests.tsv").lines();
        let names = digests.filter_map(|line| line.split_once('\t'));
        let mut unknown: Vec<_> = names.map(|(_, name)| name).collect();
        unknown.retain(|name| !is_runtime_name(name));
        unknown.sort_unstable();
        assert_eq!(unknown, ["bert-bge", "bert-bge-large", "jina-v2-en"]);
        let twice = |name: &&str| RuntimeSplits::of(name).is_some();
        assert!(!OTHER_NAMES.iter().any(twice));
    }

    #[test]
    fn names_share_rules_where_the_runtime_does() {
        assert_eq!(RuntimeSplits::of("pixtral"), RuntimeSplits::of("llama-bpe"));
        assert_ne!(RuntimeSplits::of("pixtral"), RuntimeSplits::of("smaug-bpe"));
        assert_ne!(RuntimeSplits::of("pixtral"), RuntimeSplits::of("tekken"));
        assert_eq!(RuntimeSplits::of("no such name"), None);
    }
}
