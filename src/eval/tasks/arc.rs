//! ARC: questions of grade-school science with three to five choices.

use serde_json::Value;

use super::{Item, ItemResult, Question, Row, lengths, requests};

/// Source: lm-eval `tasks/arc/arc_easy.yaml`. The key is looked up among the document's own labels: some documents
/// count 1 to 4 instead of A to D.
pub(super) fn item(row: &Row) -> ItemResult {
    let question = row.text("question")?;
    let choices = row.object("choices")?;
    let (texts, labels) = (choices.texts("text")?, choices.texts("label")?);
    if texts.len() != labels.len() {
        let (texts, labels) = (texts.len(), labels.len());
        return Err(format!("there are {texts} choices and {labels} labels"));
    }
    let key = row.text("answerKey")?;
    let gold = labels.iter().position(|label| *label == key);
    let gold = gold.ok_or_else(|| {
        format!(
            "answerKey {} is none of the labels {}",
            Value::from(key),
            Value::from(labels)
        )
    })?;
    Ok(Item {
        document: row.to_map(),
        target: gold.to_string(),
        question: Question::Choices {
            requests: requests(
                &format!("Question: {question}\nAnswer:"),
                texts.iter().copied(),
            ),
            choice_chars: lengths(texts),
            gold,
        },
    })
}
