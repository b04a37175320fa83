//! Which documents one of several machines answers.
//!
//! Enters: `i/n`. Leaves: a choice of documents. Knows no task.

use std::fmt;
use std::str::FromStr;

/// Part `index` of `count`, counted from 1: every document whose number leaves `index - 1` when divided by `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// Everything.
    pub const WHOLE: Self = Self { index: 1, count: 1 };

    /// Whether the part has the document.
    pub fn has(self, doc_id: usize) -> bool {
        doc_id % self.count == self.index - 1
    }

    /// How many parts there are.
    pub fn count(self) -> usize {
        self.count
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = || {
            let (index, count) = text.split_once('/')?;
            Some((index.parse().ok()?, count.parse().ok()?))
        };
        match numbers() {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Self { index, count }),
            Some((0, count)) => Err(format!("parts are counted from 1: 1/{count} is the first")),
            Some((_, count)) => Err(format!("there are only {count} parts")),
            None => Err("expected I/N, such as 1/4".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_and_complete() {
        let parts = ["1/3", "2/3", "3/3"].map(|text| text.parse::<Shard>().unwrap());
        for doc_id in 0..10 {
            assert_eq!(parts.iter().filter(|part| part.has(doc_id)).count(), 1);
        }
        assert_eq!(parts[1].to_string(), "2/3");
    }

    #[test]
    fn wrong_parts_are_explained() {
        let check = |text: &str, expected: &str| {
            assert!(text.parse::<Shard>().unwrap_err().contains(expected));
        };
        check("0/4", "counted from 1");
        check("5/4", "only 4 parts");
        check("1", "expected I/N");
        check("a/b", "expected I/N");
        check("-1/4", "expected I/N");
    }
}
