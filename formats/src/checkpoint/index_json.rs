//! model.safetensors.index.json: which shard holds which tensor.
//!
//! Enters: text. Leaves: names in file order, every shard a plain file name. Opens nothing.

use super::config_json::{describe, offset_of};
use crate::{Error, Result};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use std::{collections::HashSet, fmt, marker::PhantomData, path::Path};

/// Tensor names with the shard's file name, in file order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// `(tensor, shard)`; no tensor twice.
    pub weight_map: Vec<(String, String)>,
}

/// Reads an index.
///
/// # Errors
/// Not JSON, no `weight_map`, a tensor named twice, or a shard that is not a plain file name.
pub fn parse(text: &str) -> Result<Index> {
    #[derive(Deserialize)]
    struct Raw {
        weight_map: Entries<String>,
    }
    let raw: Raw = serde_json::from_str(text)
        .map_err(|error| Error::malformed(describe(&error)).at(offset_of(text, &error) as u64))?;
    let mut seen = HashSet::new();
    for (tensor, shard) in &raw.weight_map.0 {
        if !seen.insert(tensor.as_str()) {
            return Err(Error::malformed("index names the tensor twice").in_tensor(tensor));
        }
        if Path::new(shard)
            .file_name()
            .is_none_or(|name| name != shard.as_str())
            || shard.contains('\\')
        {
            return Err(Error::malformed(format!(
                "index places it in `{shard}`, which is not a plain file name"
            ))
            .in_tensor(tensor));
        }
    }
    Ok(Index {
        weight_map: raw.weight_map.0,
    })
}

/// A JSON object with its keys in order, repeated ones included.
pub(super) struct Entries<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

struct EntriesVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for EntriesVisitor<V> {
    type Value = Entries<V>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_order() {
        let index = parse(
            r#"{"metadata": {"total_size": 1}, "weight_map": {"b": "2.safetensors", "a": "1"}}"#,
        )
        .unwrap();
        let expected =
            [("b", "2.safetensors"), ("a", "1")].map(|(t, s)| (t.to_owned(), s.to_owned()));
        assert_eq!(index.weight_map, expected);
    }

    #[test]
    fn lies_are_refused() {
        let check =
            |text: &str, expected: &str| assert_eq!(parse(text).unwrap_err().to_string(), expected);
        check("{}", "missing field `weight_map` (at 0x1)");
        check(
            "[1",
            "invalid type: integer `1`, expected an object (at 0x1)",
        );
        check(
            r#"{"weight_map": {"a": 3}}"#,
            "invalid type: integer `3`, expected a string (at 0x15)",
        );
        check(
            r#"{"weight_map": {}, "weight_map": {}}"#,
            "duplicate field `weight_map` (at 0x1e)",
        );
        check(
            r#"{"weight_map": {"a": "x", "a": "x"}}"#,
            "`a`: index names the tensor twice",
        );
        for shard in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\\\b", "x/"] {
            let printed = shard.replace("\\\\", "\\");
            check(
                &format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#),
                &format!("`a`: index places it in `{printed}`, which is not a plain file name"),
            );
        }
    }
}
