//! config.json and its kin, as Python writes them.
//!
//! Enters: text. Leaves: a JSON value. Python's `json` writes infinities and NaN as bare words, which JSON does not
//! have; they become strings of that spelling.

use crate::{Error, Result};
use serde_json::Value;

/// What Python writes for a float without a JSON spelling, `-` before the word it begins.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads JSON in which `Infinity`, `-Infinity` and `NaN` may stand for numbers; they become the JSON strings
/// `"Infinity"`, `"-Infinity"` and `"NaN"`. Of a key that is there twice the last value stays.
///
/// # Errors
/// Anything else that is not JSON, with its offset in `text`.
pub fn parse(text: &str) -> Result<Value> {
    let (quoted, words_at) = quote_words(text);
    serde_json::from_str(&quoted).map_err(|error| {
        let at = offset_of(&quoted, &error);
        // Each word before the fault has gained two quotes.
        let gained = words_at
            .iter()
            .filter(|&&word_at| word_at < at)
            .count()
            .saturating_mul(2);
        Error::malformed(describe(&error)).at(at.saturating_sub(gained) as u64)
    })
}

/// `text` with quotes around [`WORDS`] outside strings, and where in the result these begin.
fn quote_words(text: &str) -> (String, Vec<usize>) {
    let mut quoted = String::with_capacity(text.len());
    let mut words_at = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(['"', '-', 'I', 'N']) {
        let (before, token) = rest.split_at(start);
        quoted.push_str(before);
        let token_bytes = match WORDS.iter().find(|word| is_whole_word(token, word)) {
            Some(word) => {
                words_at.push(quoted.len());
                quoted.push('"');
                quoted.push_str(word);
                quoted.push('"');
                word.len()
            }
            None => {
                let end = if token.starts_with('"') {
                    string_bytes(token)
                } else {
                    1
                };
                quoted.push_str(token.get(..end).unwrap_or(token));
                end
            }
        };
        rest = token.get(token_bytes..).unwrap_or_default();
    }
    quoted.push_str(rest);
    (quoted, words_at)
}

/// Whether `text` begins with `word` and no letter or digit follows.
fn is_whole_word(text: &str, word: &str) -> bool {
    text.strip_prefix(word)
        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// Length of the string literal that `text` begins with, quotes included; all of `text` if it does not end.
fn string_bytes(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at.saturating_add(1),
            _ => {}
        }
    }
    text.len()
}

/// What serde_json complains of, without its line and column.
pub(super) fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ")
        .map_or(text.as_str(), |(what, _)| what)
        .to_owned()
}

/// Where in `text` serde_json stopped, in bytes.
pub(super) fn offset_of(text: &str, error: &serde_json::Error) -> usize {
    let lines_before = text
        .split_inclusive('\n')
        .take(error.line().saturating_sub(1));
    let line_start = lines_before.map(str::len).fold(0, usize::saturating_add);
    line_start
        .saturating_add(error.column().saturating_sub(1))
        .min(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(text: &str, expected: Value) {
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[track_caller]
    fn check_refused(text: &str, expected: &str) {
        assert_eq!(parse(text).unwrap_err().to_string(), expected);
    }

    #[test]
    fn bare_words_become_strings() {
        check(
            r#"{"time_step_limit": [0.0, Infinity]}"#,
            json!({"time_step_limit": [0.0, "Infinity"]}),
        );
        check(
            "[-Infinity,NaN,\n-1,-0.5]",
            json!(["-Infinity", "NaN", -1, -0.5]),
        );
        check("Infinity", json!("Infinity"));
    }

    #[test]
    fn strings_stay_as_they_are() {
        check(
            r#"{"NaN": "a NaN, \"Infinity\" -Infinity \\"}"#,
            json!({"NaN": "a NaN, \"Infinity\" -Infinity \\"}),
        );
        check(
            r#"["ä Infinity", "\u00e4", Infinity]"#,
            json!(["ä Infinity", "ä", "Infinity"]),
        );
    }

    #[test]
    fn the_last_of_two_equal_keys_stays() {
        check(r#"{"a": 1, "a": 2}"#, json!({"a": 2}));
    }

    #[test]
    fn what_is_not_json_is_refused_at_its_place() {
        check_refused("[Infinity, Infinitys]", "expected value (at 0xb)");
        check_refused("[NaN,\nInfinity,\n, 1]", "expected value (at 0x10)");
        check_refused("[1Infinity]", "expected `,` or `]` (at 0x2)");
        check_refused("[- Infinity]", "invalid number (at 0x2)");
        check_refused("{\"a", "EOF while parsing a string (at 0x2)");
        check_refused("", "EOF while parsing a value (at 0x0)");
        check_refused(&"[".repeat(1000), "recursion limit exceeded (at 0x7f)");
    }
}
