//! The front matter of a model card: YAML 1.1 scalars as Python's loader takes them, bounded.
//!
//! Enters: the text of README.md. Leaves: a [`Node`] tree. Knows no model keys.

use std::collections::HashMap;

use nemoconv_formats::{Error, ErrorKind, Result};
use regex::Regex;
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::Value;
use std::sync::LazyLock;

/// Nodes of a front matter, aliases counted in full: cards in the field stay below a few thousand.
const MAX_NODES: usize = 20_000;
/// Nesting; cards in the field stay below ten levels.
const MAX_DEPTH: usize = 32;

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Null,
    /// `text` as written. `is_text` if YAML 1.1 reads it as a string.
    Scalar {
        text: String,
        is_text: bool,
    },
    List(Vec<Node>),
    /// Keys in order; of equal keys the last wins.
    Map(Vec<(String, Node)>),
}

impl Node {
    /// The front matter of `readme`, or an empty map if it has none.
    ///
    /// # Errors
    /// Front matter that is not YAML, or is absurdly large.
    pub(super) fn front_matter(readme: &str) -> Result<Self> {
        let mut lines = readme.split(is_line_end);
        if lines.next() != Some("---") {
            return Ok(Self::Map(Vec::new()));
        }
        let yaml: String = lines
            .take_while(|line| *line != "---")
            .flat_map(|line| [line, "\n"])
            .collect();
        // Two mends the stock converter makes: Norwegian is not `false`, and tabs are two spaces.
        let yaml = yaml.replace("- no\n", "- \"no\"\n").replace('\t', "  ");
        match parse(&yaml)? {
            map @ Self::Map(_) => Ok(map),
            _ => Ok(Self::Map(Vec::new())),
        }
    }

    pub(super) fn of_json(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::String(text) => Self::Scalar {
                text: text.clone(),
                is_text: true,
            },
            Value::Bool(_) | Value::Number(_) => Self::Scalar {
                text: value.to_string(),
                is_text: false,
            },
            Value::Array(values) => Self::List(values.iter().map(Self::of_json).collect()),
            Value::Object(fields) => Self::Map(
                fields
                    .iter()
                    .map(|(key, value)| (key.clone(), Self::of_json(value)))
                    .collect(),
            ),
        }
    }

    /// The value of `key`, if this is a map that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        match self {
            Self::Map(entries) => entries
                .iter()
                .rfind(|(known, _)| known == key)
                .map(|(_, value)| value),
            _ => None,
        }
    }

    /// The string this node is, if YAML reads it as one.
    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Scalar {
                text,
                is_text: true,
            } => Some(text),
            _ => None,
        }
    }

    /// The items of a list, or a single string as a list of one.
    pub(super) fn items(&self) -> &[Node] {
        match self {
            Self::List(items) => items,
            Self::Scalar { is_text: true, .. } => std::slice::from_ref(self),
            _ => &[],
        }
    }

    /// What is written for this node: `None` for null, nothing for `false`, 0 and empty lists, and
    /// numbers and dates as they are spelled.
    ///
    /// # Errors
    /// A list or a map with something in it.
    pub(super) fn written(&self) -> std::result::Result<Option<String>, &'static str> {
        match self {
            Self::Null => Ok(None),
            Self::Scalar { text, is_text } if *is_text || !is_falsy(text) => Ok(Some(text.clone())),
            Self::Scalar { .. } => Ok(Some(String::new())),
            Self::List(items) if items.is_empty() => Ok(Some(String::new())),
            Self::Map(entries) if entries.is_empty() => Ok(Some(String::new())),
            Self::List(_) => Err("a list"),
            Self::Map(_) => Err("a map"),
        }
    }
}

/// Where Python's `splitlines` cuts, once `\r` line ends are gone.
fn is_line_end(c: char) -> bool {
    matches!(
        c,
        '\n' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// A list or map that is still open.
struct Open {
    anchor: usize,
    items: Vec<Node>,
    is_map: bool,
}

fn parse(yaml: &str) -> Result<Node> {
    let mut anchors: HashMap<usize, Node> = HashMap::new();
    let mut open: Vec<Open> = Vec::new();
    let mut budget = MAX_NODES;
    for event in Parser::new_from_str(yaml) {
        let (event, span) = event.map_err(|error| {
            malformed(
                format!("front matter is not YAML: {}", error.info()),
                error.marker().line(),
            )
        })?;
        let line = span.start.line();
        let (anchor, node) = match event {
            Event::Scalar(text, style, anchor, tag) => (
                anchor,
                scalar(
                    text.into_owned(),
                    style == ScalarStyle::Plain && tag.is_none(),
                ),
            ),
            Event::Alias(anchor) => {
                let node = anchors.get(&anchor).cloned();
                (
                    0,
                    node.ok_or_else(|| malformed("alias of an unfinished value".into(), line))?,
                )
            }
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                if open.len() == MAX_DEPTH {
                    return Err(malformed(
                        format!("nested more than {MAX_DEPTH} deep"),
                        line,
                    ));
                }
                let is_map = matches!(event, Event::MappingStart(..));
                open.push(Open {
                    anchor,
                    items: Vec::new(),
                    is_map,
                });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(done) => (done.anchor, done.finish()),
                None => continue,
            },
            _ => continue,
        };
        budget = budget.checked_sub(size(&node)).ok_or_else(too_large)?;
        if anchor != 0 {
            budget = budget.checked_sub(size(&node)).ok_or_else(too_large)?;
            anchors.insert(anchor, node.clone());
        }
        match open.last_mut() {
            Some(parent) => parent.items.push(node),
            None => return Ok(node),
        }
    }
    Ok(Node::Null)
}

impl Open {
    fn finish(self) -> Node {
        if !self.is_map {
            return Node::List(self.items);
        }
        let mut entries = Vec::new();
        let mut merged = Vec::new();
        let mut items = self.items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            let Node::Scalar { text, .. } = key else {
                continue;
            };
            match value {
                Node::Map(others) if text == "<<" => merged.extend(others),
                value => entries.push((text, value)),
            }
        }
        // Own keys come last, so that they win over merged ones.
        merged.extend(entries);
        Node::Map(merged)
    }
}

fn scalar(text: String, is_plain: bool) -> Node {
    if is_plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL") {
        return Node::Null;
    }
    let is_text = !is_plain || !NOT_TEXT.is_match(&text);
    Node::Scalar { text, is_text }
}

/// Plain scalars that YAML 1.1 reads as booleans, numbers or dates.
static NOT_TEXT: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"^(?x:
        [yY]es|YES|[nN]o|NO|[tT]rue|TRUE|[fF]alse|FALSE|[oO]n|ON|[oO]ff|OFF
        |[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*(?::[0-5]?[0-9])+)
        |[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?
        |\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?
        |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)
        |[0-9]{4}-[0-9]{2}-[0-9]{2}
        |[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[\ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?
         (?:[\ \t]*(?:Z|[-+][0-9]{1,2}(?::?[0-9]{2})?))?
        )$";
    Regex::new(pattern).expect("a constant pattern")
});

/// Whether a scalar that is not text is what Python takes for false.
fn is_falsy(text: &str) -> bool {
    let word = matches!(
        text,
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF"
    );
    let zero = text.contains('0')
        && text
            .chars()
            .all(|c| matches!(c, '0' | '.' | '_' | '-' | '+' | 'x' | 'b'));
    word || zero
}

fn size(node: &Node) -> usize {
    match node {
        Node::Null => 1,
        // Long texts count too, or a few aliases of one could fill the memory.
        Node::Scalar { text, .. } => text.len() / 64 + 1,
        Node::List(items) => items.iter().map(size).sum::<usize>() + 1,
        Node::Map(entries) => {
            entries
                .iter()
                .map(|(_, value)| size(value) + 1)
                .sum::<usize>()
                + 1
        }
    }
}

fn malformed(what: String, line: usize) -> Error {
    // Line 1 of the file is the `---` above the front matter.
    Error::malformed(format!("{what} (line {})", line + 1))
        .hint("mend the front matter, or remove README.md")
}

fn too_large() -> Error {
    let limit = MAX_NODES as u64;
    Error::new(ErrorKind::Limit {
        what: "front matter size in values",
        limit,
        found: limit + 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str, expected: std::result::Result<Node, &str>) {
        let found = Node::front_matter(&format!("---\n{yaml}\n---\n"));
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{yaml}"),
            (Err(found), Err(expected)) => assert_eq!(found.to_string(), expected),
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
    }

    fn one(text: &str, is_text: bool) -> std::result::Result<Node, &'static str> {
        let scalar = Node::Scalar {
            text: text.into(),
            is_text,
        };
        Ok(Node::Map(vec![("a".into(), scalar)]))
    }

    #[test]
    fn scalars_are_text_as_yaml_1_1_has_it() {
        for text in [
            "yes",
            "0x1F",
            "1_000",
            "1.",
            ".5",
            "-.inf",
            ".NaN",
            "190:20:30",
            "2024-01-31",
            "2024-1-1 10:20:30 +1",
        ] {
            check(&format!("a: {text}"), one(text, false));
            check(&format!("a: '{text}'"), one(text, true));
            check(&format!("a: !!str {text}"), one(text, true));
        }
        for text in ["y", "1e5", "v1.0", "1.0.0", "0o17", "Yess", "2024-1-1"] {
            check(&format!("a: {text}"), one(text, true));
        }
        for text in ["~", "null", ""] {
            check(
                &format!("a: {text}"),
                Ok(Node::Map(vec![("a".into(), Node::Null)])),
            );
        }
    }

    #[test]
    fn hostile_front_matter_is_refused() {
        let bomb: String = (1..12)
            .map(|i| format!("a{i}: &a{i} [*a{0}, *a{0}, *a{0}]\n", i - 1))
            .collect();
        let expected = "front matter size in values is 20001, the limit is 20000";
        check(&format!("a0: &a0 x\n{bomb}"), Err(expected));
        check(
            &format!("a: {}", "[".repeat(100)),
            Err("nested more than 32 deep (line 2)"),
        );
        check("a: &a [*a]", Err("alias of an unfinished value (line 2)"));
        check(
            "a: b: c",
            Err(
                "front matter is not YAML: mapping values are not allowed in this context (line 2)",
            ),
        );
    }
}
