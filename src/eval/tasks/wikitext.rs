//! WikiText-2 by page: the likelihood of the whole text.

use std::sync::LazyLock;

use regex::Regex;

use super::{Item, ItemResult, Question, Row};

/// Source: lm-eval `tasks/wikitext/preprocess_wikitext.py`. Words and bytes are those of the page as it is stored.
pub(super) fn item(row: &Row) -> ItemResult {
    let page = row.text("page")?;
    let text = detokenize(page);
    static SPACES: LazyLock<Regex> = LazyLock::new(|| pattern(r"[\s\x1c-\x1f]+"));
    Ok(Item {
        document: row.to_map(),
        target: text.clone(),
        question: Question::Rolling {
            text,
            words: SPACES.split(page).count() as u64,
            bytes: page.len() as u64,
        },
    })
}

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the pattern is one")
}

/// Undoes the tokenization of the stored pages, step by step in the reference's order, with its quirks.
fn detokenize(page: &str) -> String {
    static ENCLOSED: LazyLock<[(Regex, &str); 5]> = LazyLock::new(|| {
        let space = r"[\s\x1c-\x1f]*";
        let enclosed = |open: &str, inside: &str, close: &str| {
            pattern(&format!("{open}{space}({inside}*?){space}{close}"))
        };
        [
            (enclosed(r"\(", r"[^)]", r"\)"), "($1)"),
            (enclosed(r"\[", r"[^\]]", r"\]"), "[$1]"),
            (enclosed(r"\{", r"[^}]", r"\}"), "{$1}"),
            (enclosed("\"", "[^\"]", "\""), "\"$1\""),
            (enclosed("'", "[^']", "'"), "'$1'"),
        ]
    });
    static DIGIT_IN_SLASHES: LazyLock<Regex> = LazyLock::new(|| pattern("/' [0-9]/"));
    let replace = |text: String, pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .fold(text, |text, (from, to)| text.replace(from, to))
    };
    let text = page.replace("s '", "s'");
    let text = DIGIT_IN_SLASHES.replace_all(&text, "/'[0-9]/").into_owned();
    let text = replace(
        text,
        &[
            (" @-@ ", "-"),
            (" @,@ ", ","),
            (" @.@ ", "."),
            (" : ", ": "),
            (" ; ", "; "),
            (" . ", ". "),
            (" ! ", "! "),
            (" ? ", "? "),
            (" , ", ", "),
        ],
    );
    let text = ENCLOSED.iter().fold(text, |text, (pattern, to)| {
        pattern.replace_all(&text, *to).into_owned()
    });
    replace(
        text,
        &[
            ("= = = =", "===="),
            ("= = =", "==="),
            ("= =", "=="),
            (" \u{b0} ", "\u{b0}"),
            (" \n", "\n"),
            ("\n ", "\n"),
            (" N ", " 1 "),
            (" 's", "'s"),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_read_as_text_again() {
        let check = |page, expected| assert_eq!(detokenize(page), expected);
        check(" = A @-@ b = \n \n = = C = = \n ", " = A-b =\n\n== C ==\n");
        check("1 @,@ 000 @.@ 5 ; x . y", "1,000.5; x. y");
        check("( a ) [ b ] { c } \" d \" ' e '", "(a) [b] {c} \"d\" 'e'");
        check("dogs ' tails , Bob 's N cats", "dogs'tails, Bob's 1 cats");
        check("/' 7/", "/'[0-9]/");
        check("90 \u{b0} C", "90\u{b0}C");
    }
}
