//! WinoGrande: which of two names fills the blank; the text after the blank is scored.

use serde_json::Value;

use super::{Item, ItemResult, Question, Request, Row, lengths};
use crate::eval::python_text::strip;

/// Source: lm-eval `tasks/winogrande/preprocess_winogrande.py`. The choices are the two contexts, their continuation
/// is one.
pub(super) fn item(row: &Row) -> ItemResult {
    let sentence = row.text("sentence")?;
    let (before, after) = sentence.split_once('_').ok_or("`sentence` has no `_`")?;
    let target = strip(after);
    let options = [row.text("option1")?, row.text("option2")?];
    let contexts = options.map(|option| format!("{before}{option}"));
    let gold = match row.text("answer")? {
        "1" => 0,
        "2" => 1,
        other => {
            let other = Value::from(other);
            return Err(format!(
                "expected `answer` to be \"1\" or \"2\", found {other}"
            ));
        }
    };
    Ok(Item {
        document: row.to_map(),
        target: target.to_string(),
        question: Question::Choices {
            choice_chars: lengths(contexts.iter().map(String::as_str)),
            requests: contexts
                .map(|context| Request {
                    context,
                    continuation: format!(" {target}"),
                })
                .into(),
            gold,
        },
    })
}
