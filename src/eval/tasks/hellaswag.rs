//! HellaSwag: four endings of a description.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::json;

use super::{Item, ItemResult, Question, Row, lengths, requests};
use crate::eval::python_text::{capitalize, strip};

/// Source: lm-eval `tasks/hellaswag/utils.py`.
pub(super) fn item(row: &Row) -> ItemResult {
    let label = row.text("activity_label")?;
    let (ctx_a, ctx_b) = (row.text("ctx_a")?, row.text("ctx_b")?);
    let query = clean(&format!("{label}: {ctx_a} {}", capitalize(ctx_b)));
    let endings = row.texts("endings")?;
    let choices: Vec<_> = endings.into_iter().map(clean).collect();
    let gold = row.index("label")?;

    let mut document = row.to_map();
    document.insert("query".into(), json!(query));
    document.insert("choices".into(), json!(choices));
    document.insert("gold".into(), json!(gold));
    let choices = || choices.iter().map(String::as_str);
    Ok(Item {
        document,
        target: gold.to_string(),
        question: Question::Choices {
            requests: requests(&query, choices()),
            choice_chars: lengths(choices()),
            gold,
        },
    })
}

/// Takes out the tags of WikiHow. There is no trim at the end: an ending that starts with a tag keeps its space.
fn clean(text: &str) -> String {
    static TAG: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\[.*?\]").expect("the pattern is one"));
    let text = strip(text).replace(" [title]", ". ");
    TAG.replace_all(&text, "").replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_go_and_their_spaces_stay() {
        let check = |text, expected| assert_eq!(clean(text), expected);
        check("  a [title] b  ", "a. b");
        check("a [title]b", "a. b");
        check("[substeps] do it", " do it");
        check("a   b    c", "a  b  c");
        check("[a\nb] [c]", "[a\nb] ");
        check("x [a [b] c]", "x c]");
    }
}
