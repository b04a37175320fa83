//! `config.json` with one more key.
//!
//! Enters: the text of the checkpoint's file. Leaves: the same text with `quantization_config` at its end. Nothing is
//! parsed and written again: what other programs wrote there, `Infinity` included, stays as it is.

use serde_json::Value;

const KEY: &str = "quantization_config";

/// Adds the key; `None` where the text is no object. A configuration that was there before gives way.
pub fn with_quantization_config(text: &str, config: &Value) -> Option<String> {
    let text = match removed(text) {
        Some(without) => without,
        None => text.to_string(),
    };
    let end = text.trim_end().strip_suffix('}')?.trim_end();
    let comma = if end.ends_with('{') { "" } else { "," };
    let config = serde_json::to_string_pretty(config).ok()?;
    let config = config.replace('\n', "\n  ");
    Some(format!("{end}{comma}\n  \"{KEY}\": {config}\n}}\n"))
}

/// The text without the key and its object, if it has them on the first level.
fn removed(text: &str) -> Option<String> {
    let key = key_on_first_level(text)?;
    let value = key + text[key..].find('{')?;
    let end = value + closing(&text[value..])?;
    let (before, after) = (text[..key].trim_end(), text[end..].trim_start());
    Some(match (before.strip_suffix(','), after.strip_prefix(',')) {
        (_, Some(after)) => format!("{before}\n  {}", after.trim_start()),
        (Some(before), None) => format!("{before}\n{after}"),
        (None, None) => format!("{before}{after}"),
    })
}

/// Where the quoted key begins.
fn key_on_first_level(text: &str) -> Option<usize> {
    let quoted = format!("\"{KEY}\"");
    let mut depth = 0;
    let mut places = places(text);
    places.find_map(|(at, mark)| {
        match mark {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => return (depth == 1 && text[at..].starts_with(&quoted)).then_some(at),
        }
        None
    })
}

/// Bytes of a bracketed value from its first bracket on.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    let mut places = places(text);
    places.find_map(|(at, mark)| {
        match mark {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => return None,
        }
        (depth == 0).then_some(at + 1)
    })
}

/// Brackets outside of strings, and where strings begin.
fn places(text: &str) -> impl Iterator<Item = (usize, u8)> {
    let mut in_string = false;
    let mut escaped = false;
    text.bytes().enumerate().filter(move |(_, byte)| {
        if in_string {
            let ends = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            in_string = !ends;
            return false;
        }
        in_string = *byte == b'"';
        matches!(byte, b'{' | b'}' | b'[' | b']' | b'"')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(text: &str, expected: &str) {
        let config = json!({ "bits": 4 });
        assert_eq!(
            with_quantization_config(text, &config).as_deref(),
            Some(expected)
        );
    }

    const ADDED: &str = "  \"quantization_config\": {\n    \"bits\": 4\n  }\n}\n";

    #[test]
    fn everything_else_stays_byte_for_byte() {
        check("{}", &format!("{{\n{ADDED}"));
        check(
            "{\n  \"limit\": [0.0, Infinity],\n  \"eps\": 1e-05\n}\n",
            &format!("{{\n  \"limit\": [0.0, Infinity],\n  \"eps\": 1e-05,\n{ADDED}"),
        );
        assert_eq!(with_quantization_config("[1]", &json!({})), None);
        assert_eq!(with_quantization_config("", &json!({})), None);
    }

    #[test]
    fn a_configuration_of_before_gives_way() {
        let old = "\"quantization_config\": {\"a\": \"}\\\"\", \"b\": {\"c\": [1]}}";
        check(
            &format!("{{\n  \"x\": 1,\n  {old},\n  \"y\": 2\n}}"),
            &format!("{{\n  \"x\": 1,\n  \"y\": 2,\n{ADDED}"),
        );
        check(
            &format!("{{\n  \"x\": {{\"quantization_config\": 3}},\n  {old}\n}}"),
            &format!("{{\n  \"x\": {{\"quantization_config\": 3}},\n{ADDED}"),
        );
        check(&format!("{{ {old} }}"), &format!("{{\n{ADDED}"));
    }
}
