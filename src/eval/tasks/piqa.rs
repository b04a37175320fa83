//! PIQA: two ways to reach a goal.

use super::{Item, ItemResult, Question, Row, lengths, requests};

/// Source: lm-eval `tasks/piqa/piqa.yaml`. Nothing is trimmed.
pub(super) fn item(row: &Row) -> ItemResult {
    let goal = row.text("goal")?;
    let solutions = [row.text("sol1")?, row.text("sol2")?];
    let gold = row.index("label")?;
    Ok(Item {
        document: row.to_map(),
        target: gold.to_string(),
        question: Question::Choices {
            requests: requests(&format!("Question: {goal}\nAnswer:"), solutions),
            choice_chars: lengths(solutions),
            gold,
        },
    })
}
