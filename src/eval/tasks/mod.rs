//! The tasks: from a row of data to requests, gold answer and choice lengths.
//!
//! Enters: a row. Leaves: an [`Item`]. Knows no tokens and no model.

mod arc;
mod config;
mod hellaswag;
mod piqa;
mod wikitext;
mod winogrande;

use std::str::FromStr;

use serde_json::{Map, Value};

use super::document::{Document, kind};

pub use config::task_config;

/// A benchmark, named as lm-eval names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Task {
    ArcEasy,
    ArcChallenge,
    Piqa,
    Winogrande,
    Hellaswag,
    Wikitext,
}

/// What a document asks of a model, and what is right.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// The row, with what the task adds to it.
    pub document: Map<String, Value>,
    /// The right answer as text, as lm-eval states it.
    pub target: String,
    /// What is scored.
    pub question: Question,
}

/// What is scored.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// The likelihood of each request; the largest is the model's choice.
    Choices {
        /// One per choice.
        requests: Vec<Request>,
        /// Lengths in Unicode code points, for `acc_norm`.
        choice_chars: Vec<usize>,
        /// Index of the right choice; may be outside them, then no choice is right.
        gold: usize,
    },
    /// The likelihood of a whole text.
    Rolling {
        /// What is scored.
        text: String,
        /// Words of the unprocessed text.
        words: u64,
        /// Bytes of the unprocessed text.
        bytes: u64,
    },
}

/// A text and its continuation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Given.
    pub context: String,
    /// Scored.
    pub continuation: String,
}

/// Why a row is no item of the task.
pub type ItemResult = Result<Item, String>;

impl Task {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::ArcEasy,
        Self::ArcChallenge,
        Self::Piqa,
        Self::Winogrande,
        Self::Hellaswag,
        Self::Wikitext,
    ];

    /// lm-eval's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ArcEasy => "arc_easy",
            Self::ArcChallenge => "arc_challenge",
            Self::Piqa => "piqa",
            Self::Winogrande => "winogrande",
            Self::Hellaswag => "hellaswag",
            Self::Wikitext => "wikitext",
        }
    }

    /// The split that is scored.
    pub const fn split(self) -> &'static str {
        match self {
            Self::ArcEasy | Self::ArcChallenge | Self::Wikitext => "test",
            Self::Piqa | Self::Winogrande | Self::Hellaswag => "validation",
        }
    }

    /// Folders of the published data sets.
    pub const fn published_folders(self) -> &'static [&'static str] {
        match self {
            Self::ArcEasy => &["ARC-Easy"],
            Self::ArcChallenge => &["ARC-Challenge"],
            Self::Winogrande => &["winogrande_xl"],
            Self::Wikitext => &["wikitext-2-raw-v1"],
            Self::Piqa | Self::Hellaswag => &[],
        }
    }

    /// Version of the task's definition.
    pub const fn version(self) -> f64 {
        match self {
            Self::Wikitext => 2.0,
            _ => 1.0,
        }
    }

    /// The metrics, and whether more is better.
    pub const fn metrics(self) -> &'static [(&'static str, bool)] {
        match self {
            Self::Winogrande => &[("acc", true)],
            Self::Wikitext => &[
                ("word_perplexity", false),
                ("byte_perplexity", false),
                ("bits_per_byte", false),
            ],
            _ => &[("acc", true), ("acc_norm", true)],
        }
    }

    /// Reads a row.
    ///
    /// # Errors
    /// A field that is missing or of the wrong type, an answer that does not exist, nothing to score. Says what is
    /// wrong, not where.
    pub fn item(self, document: &Document) -> ItemResult {
        let row = Row(&document.fields);
        let item = match self {
            Self::ArcEasy | Self::ArcChallenge => arc::item(&row),
            Self::Piqa => piqa::item(&row),
            Self::Winogrande => winogrande::item(&row),
            Self::Hellaswag => hellaswag::item(&row),
            Self::Wikitext => wikitext::item(&row),
        }?;
        item.question.check()?;
        Ok(item)
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|task| task.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("`{text}` is not a known task; known are {names}")
        })
    }
}

impl Question {
    /// Every text that is scored has something to score.
    fn check(&self) -> Result<(), String> {
        match self {
            Self::Choices { requests, .. } => {
                if requests.is_empty() {
                    return Err("there are no choices".into());
                }
                match requests
                    .iter()
                    .position(|request| request.continuation == " ")
                {
                    Some(index) => Err(format!("choice {} is empty", index + 1)),
                    None => Ok(()),
                }
            }
            Self::Rolling { text, .. } if text.is_empty() => Err("the text is empty".into()),
            Self::Rolling { .. } => Ok(()),
        }
    }
}

/// The fields of a row, with errors that name the field.
struct Row<'a>(&'a Map<String, Value>);

impl<'a> Row<'a> {
    fn field(&self, name: &str) -> Result<&'a Value, String> {
        self.0
            .get(name)
            .ok_or_else(|| format!("field `{name}` is missing"))
    }

    fn text(&self, name: &str) -> Result<&'a str, String> {
        let value = self.field(name)?;
        value
            .as_str()
            .ok_or_else(|| format!("expected `{name}` to be a string, found {}", kind(value)))
    }

    fn texts(&self, name: &str) -> Result<Vec<&'a str>, String> {
        let value = self.field(name)?;
        let strings = || {
            value
                .as_array()?
                .iter()
                .map(Value::as_str)
                .collect::<Option<Vec<_>>>()
        };
        strings().ok_or_else(|| {
            format!(
                "expected `{name}` to be a list of strings, found {}",
                kind(value)
            )
        })
    }

    fn object(&self, name: &str) -> Result<Self, String> {
        let value = self.field(name)?;
        value
            .as_object()
            .map(Self)
            .ok_or_else(|| format!("expected `{name}` to be an object, found {}", kind(value)))
    }

    /// An index, given as a number or as its digits.
    fn index(&self, name: &str) -> Result<usize, String> {
        let value = self.field(name)?;
        let number = match value {
            Value::String(text) => text.trim().parse().ok(),
            other => other
                .as_u64()
                .and_then(|number| usize::try_from(number).ok()),
        };
        number
            .ok_or_else(|| format!("expected `{name}` to be the number of a choice, found {value}"))
    }

    fn to_map(&self) -> Map<String, Value> {
        self.0.clone()
    }
}

/// The same context for every choice.
fn requests<'a>(context: &str, choices: impl IntoIterator<Item = &'a str>) -> Vec<Request> {
    let request = |choice: &str| Request {
        context: context.to_string(),
        continuation: format!(" {choice}"),
    };
    choices.into_iter().map(request).collect()
}

fn lengths<'a>(choices: impl IntoIterator<Item = &'a str>) -> Vec<usize> {
    choices
        .into_iter()
        .map(|choice| choice.chars().count())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    pub(super) fn item(task: Task, row: Value) -> ItemResult {
        task.item(&Document {
            fields: row.as_object().unwrap().clone(),
            file: 0,
            line: 1,
        })
    }

    #[test]
    fn rows_that_are_no_items_say_why() {
        let check = |task, row, expected: &str| {
            assert_eq!(item(task, row).unwrap_err(), expected);
        };
        let arc = |choices: Value, key: &str| json!({"question": "q", "choices": choices, "answerKey": key});
        check(Task::ArcEasy, json!({}), "field `question` is missing");
        check(
            Task::ArcEasy,
            json!({"question": 1}),
            "expected `question` to be a string, found a number",
        );
        check(
            Task::ArcEasy,
            arc(json!([]), "A"),
            "expected `choices` to be an object, found a list",
        );
        check(
            Task::ArcEasy,
            arc(json!({"text": ["a", 1], "label": ["A", "B"]}), "A"),
            "expected `text` to be a list of strings, found a list",
        );
        check(
            Task::ArcEasy,
            arc(json!({"text": ["a"], "label": ["A", "B"]}), "A"),
            "there are 1 choices and 2 labels",
        );
        check(
            Task::ArcEasy,
            arc(json!({"text": ["a"], "label": ["A"]}), "B"),
            "answerKey \"B\" is none of the labels [\"A\"]",
        );
        check(
            Task::ArcEasy,
            arc(json!({"text": ["a", ""], "label": ["A", "B"]}), "B"),
            "choice 2 is empty",
        );
        check(
            Task::Piqa,
            json!({"goal": "g", "sol1": "a", "sol2": "b", "label": -1}),
            "expected `label` to be the number of a choice, found -1",
        );
        let winogrande = |sentence: &str, answer: &str| json!({"sentence": sentence, "option1": "a", "option2": "b", "answer": answer});
        check(
            Task::Winogrande,
            winogrande("no blank", "1"),
            "`sentence` has no `_`",
        );
        check(
            Task::Winogrande,
            winogrande("x _ y", ""),
            "expected `answer` to be \"1\" or \"2\", found \"\"",
        );
        check(
            Task::Winogrande,
            winogrande("x _", "1"),
            "choice 1 is empty",
        );
        check(
            Task::Hellaswag,
            json!({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"], "label": ""}),
            "expected `label` to be the number of a choice, found \"\"",
        );
        check(Task::Wikitext, json!({"page": ""}), "the text is empty");
    }

    #[test]
    fn names_are_those_of_lm_eval() {
        for task in Task::ALL {
            assert_eq!(task.name().parse(), Ok(task));
        }
        assert!("mmlu".parse::<Task>().unwrap_err().contains("arc_easy"));
    }
}
