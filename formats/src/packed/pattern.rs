//! Entries of a configuration that name modules.
//!
//! Enters: the entry's text. Leaves: whether it means a module. Module names are spelled as in the checkpoint; runtimes
//! that rename `backbone.` to `model.` match their own spelling, so both are tried.

use crate::{Error, Result};
use regex::{Regex, RegexBuilder};

/// Compiled patterns larger than this are not of a configuration anybody wrote.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// One entry.
#[derive(Debug, Clone)]
pub enum Pattern {
    /// The module of this name.
    Exact(String),
    /// Modules whose name matches from its start on, as Python's `re.match`.
    Regex(Regex),
    /// Modules whose whole name matches, as Python's `fnmatch`, or that contain the text.
    Wildcard(Regex, String),
    /// Every linear: the class name `Linear`.
    Every,
}

impl Pattern {
    /// An entry of compressed-tensors: `re:` and a regex, a class name, or a module name.
    pub fn compressed_tensors(entry: &str) -> Result<Self> {
        match entry.strip_prefix("re:") {
            Some(regex) => Self::from_start(regex),
            // Runtimes look for the entry in the names of their classes, of which all linear ones end so.
            None if entry.eq_ignore_ascii_case("linear") => Ok(Self::Every),
            None => Ok(Self::Exact(entry.to_owned())),
        }
    }

    /// A regex that must match from the start of a name.
    pub fn from_start(regex: &str) -> Result<Self> {
        compile(regex, &format!("^(?:{regex})")).map(Self::Regex)
    }

    /// An entry of ModelOpt: `*`, `?` and `[...]` as in file names.
    pub fn wildcard(entry: &str) -> Result<Self> {
        let mut regex = String::from("^(?s:");
        let mut rest = entry.chars();
        while let Some(character) = rest.next() {
            let class = rest.as_str().split_once(']').filter(|_| character == '[');
            match (character, class) {
                ('*', _) => regex.push_str(".*"),
                ('?', _) => regex.push('.'),
                ('[', Some((class, after))) if !class.is_empty() => {
                    let (negation, class) = match class.strip_prefix('!') {
                        Some(class) => ("^", class),
                        None => ("", class),
                    };
                    regex.push_str(&format!("[{negation}{}]", class.replace('\\', "\\\\")));
                    rest = after.chars();
                }
                (other, _) => regex.push_str(&regex::escape(other.encode_utf8(&mut [0; 4]))),
            }
        }
        regex.push_str(")$");
        Ok(Self::Wildcard(compile(entry, &regex)?, entry.to_owned()))
    }

    /// Whether `module` is meant.
    pub fn matches(&self, module: &str) -> bool {
        match other_spelling(module) {
            Some(other) => self.matches_spelling(module) || self.matches_spelling(&other),
            None => self.matches_spelling(module),
        }
    }

    fn matches_spelling(&self, module: &str) -> bool {
        match self {
            Self::Exact(name) => name == module,
            Self::Regex(regex) => regex.is_match(module),
            Self::Wildcard(regex, text) => regex.is_match(module) || module.contains(text.as_str()),
            Self::Every => true,
        }
    }
}

/// The name in the runtimes that call the backbone `model`, or the other way round.
pub fn other_spelling(module: &str) -> Option<String> {
    let swap = |from, to| Some(format!("{to}{}", module.strip_prefix(from)?));
    swap("backbone.", "model.").or_else(|| swap("model.", "backbone."))
}

fn compile(entry: &str, regex: &str) -> Result<Regex> {
    RegexBuilder::new(regex)
        .size_limit(MAX_REGEX_BYTES)
        .build()
        .map_err(|error| {
            let text = error.to_string();
            let what = text.lines().last().unwrap_or_default().trim();
            let what = what.strip_prefix("error: ").unwrap_or(what);
            Error::unsupported(format!("pattern `{entry}` is not understood: {what}"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: Result<Pattern>, module: &str, expected: bool) {
        assert_eq!(pattern.unwrap().matches(module), expected);
    }

    const MODULE: &str = "backbone.layers.3.mixer.q_proj";

    #[test]
    fn entries_of_compressed_tensors() {
        let check = |entry, expected| check(Pattern::compressed_tensors(entry), MODULE, expected);
        check("Linear", true);
        check(MODULE, true);
        check("model.layers.3.mixer.q_proj", true);
        check("layers.3.mixer.q_proj", false);
        check("Embedding", false);
        check(r"re:.*layers\.(1|3)\.mixer\.q_proj$", true);
        check(r"re:.*q_pro$", false);
        check("re:model.*", true);
        check("re:layers.*", false);
        check("re:backbone|lm_head", true);
    }

    #[test]
    fn entries_of_modelopt() {
        let check = |entry, expected| check(Pattern::wildcard(entry), MODULE, expected);
        check("*q_proj", true);
        check("backbone.layers.?.mixer.[pq]_proj", true);
        check("backbone.layers.?.mixer.[!pq]_proj", false);
        check("*k_proj", false);
        check("layers.3", true);
        check("*.layers.3", false);
        check("[", false);
    }

    #[test]
    fn what_no_regex_is_says_so() {
        let error = Pattern::compressed_tensors("re:(?!lm_head).*")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("pattern `(?!lm_head).*` is not understood: look-around"),
            "{error}"
        );
        assert!(Pattern::from_start("(").is_err());
        assert!(Pattern::from_start("(a{1000}){1000}").is_err());
    }
}
