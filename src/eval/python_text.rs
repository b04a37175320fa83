//! Python's rules for text, where the reference's scores and hashes depend on them.
//!
//! Enters: text, numbers, JSON. Leaves: what CPython would make of them. Knows no task.

use std::io;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// `str.isspace` of one character: Unicode's white space and the four ASCII separators.
pub fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// `str.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.capitalize()`: the first character to title case, all others to lower case.
pub fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else {
        return String::new();
    };
    // Lowered as one text: a sigma looks at its neighbours.
    let lower = text.to_lowercase();
    let first_bytes: usize = first.to_lowercase().map(char::len_utf8).sum();
    let rest = lower.get(first_bytes..).unwrap_or_default();
    title_case(first) + rest
}

/// Title case of a character: upper case, but for those that Unicode gives one of their own.
///
/// Source: Unicode 16, `UnicodeData.txt` and `SpecialCasing.txt`.
fn title_case(character: char) -> String {
    let own = match character {
        '\u{1c4}'..='\u{1c6}' => "\u{1c5}",
        '\u{1c7}'..='\u{1c9}' => "\u{1c8}",
        '\u{1ca}'..='\u{1cc}' => "\u{1cb}",
        '\u{1f1}'..='\u{1f3}' => "\u{1f2}",
        '\u{1fb2}' => "\u{1fba}\u{345}",
        '\u{1fb4}' => "\u{386}\u{345}",
        '\u{1fb7}' => "\u{1fbc}\u{342}",
        '\u{1fc2}' => "\u{1fca}\u{345}",
        '\u{1fc4}' => "\u{389}\u{345}",
        '\u{1fc7}' => "\u{1fcc}\u{342}",
        '\u{1ff2}' => "\u{1ffa}\u{345}",
        '\u{1ff4}' => "\u{38f}\u{345}",
        '\u{1ff7}' => "\u{1ffc}\u{342}",
        '\u{1fb3}' | '\u{1fbc}' => "\u{1fbc}",
        '\u{1fc3}' | '\u{1fcc}' => "\u{1fcc}",
        '\u{1ff3}' | '\u{1ffc}' => "\u{1ffc}",
        '\u{10d0}'..='\u{10ff}' => return character.to_string(),
        '\u{1f80}'..='\u{1faf}' => {
            return char::from_u32(character as u32 | 8).map_or_else(String::new, String::from);
        }
        '\u{df}' | '\u{587}' | '\u{fb00}'..='\u{fb06}' | '\u{fb13}'..='\u{fb17}' => {
            let mut letters = character.to_uppercase();
            let first = letters.next().into_iter();
            return first.chain(letters.flat_map(char::to_lowercase)).collect();
        }
        _ => return character.to_uppercase().collect(),
    };
    own.to_string()
}

/// `repr(float)`: the shortest digits that read back, in scientific notation outside 1e-4 to 1e16.
pub fn float(number: f64) -> String {
    if !number.is_finite() {
        let sign = if number < 0.0 { "-" } else { "" };
        return if number.is_nan() {
            "nan".into()
        } else {
            format!("{sign}inf")
        };
    }
    let scientific = shortest(number);
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let decimals = (decimals_of(digits) as i32 - exponent).max(1);
    format!("{number:.*}", decimals as usize)
}

/// The fewest digits that read back, in scientific notation; of two equally near, the even ones.
fn shortest(number: f64) -> String {
    let shortest = format!("{number:e}");
    let digits = shortest.split('e').next().unwrap_or_default();
    let decimals = decimals_of(digits);
    let nearest = format!("{number:.decimals$e}");
    if nearest.parse() == Ok(number) {
        nearest
    } else {
        shortest
    }
}

/// Digits after the point.
fn decimals_of(digits: &str) -> usize {
    digits
        .split_once('.')
        .map_or(0, |(_, decimals)| decimals.len())
}

/// `str(bool)`.
pub fn boolean(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

/// `json.dumps(value, ensure_ascii=False)`.
pub fn json_line(value: &Value) -> String {
    dump(value, PythonJson::default())
}

/// `json.dumps(value, indent=2, ensure_ascii=False)`.
pub fn json_indented(value: &Value) -> String {
    let formatter = PythonJson {
        indent: Some(0),
        ..PythonJson::default()
    };
    dump(value, formatter)
}

fn dump(value: &Value, formatter: PythonJson) -> String {
    let mut bytes = Vec::new();
    let written = value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter));
    written.expect("a JSON value can be written to memory");
    String::from_utf8(bytes).expect("JSON of text is text")
}

/// Python's separators, line breaks and floats.
#[derive(Default)]
struct PythonJson {
    /// Depth, where lines are broken.
    indent: Option<usize>,
    has_value: bool,
}

impl PythonJson {
    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.has_value = false;
        if let Some(depth) = &mut self.indent {
            *depth += 1;
        }
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        if let Some(depth) = &mut self.indent {
            *depth = depth.saturating_sub(1);
        }
        if self.has_value {
            self.line_break(writer)?;
        }
        writer.write_all(bracket)
    }

    fn before_item<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        match (first, self.indent) {
            (true, _) => {}
            (false, Some(_)) => writer.write_all(b",")?,
            (false, None) => writer.write_all(b", ")?,
        }
        self.line_break(writer)
    }

    fn line_break<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(depth) = self.indent else {
            return Ok(());
        };
        writer.write_all(b"\n")?;
        (0..depth).try_for_each(|_| writer.write_all(b"  "))
    }
}

impl Formatter for PythonJson {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.before_item(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.before_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn capitals_are_those_of_python() {
        let check = |text, expected| assert_eq!(capitalize(text), expected);
        check("the man in a Santa suit", "The man in a santa suit");
        check("", "");
        check("[header] How TO", "[header] how to");
        check("ßA", "Ssa");
        check("ǆUR", "ǅur");
        check("ﬁN", "Fin");
        check("ΑΣ ΟΔΟΣ", "Ας οδος");
        check("Σ", "Σ");
        check("İI", "İi");
        check("აბ", "აბ");
        check("ᾳA", "ᾼa");
        check("ŉA", "ʼNa");
    }

    #[test]
    fn floats_are_those_of_python() {
        let check = |number, expected| assert_eq!(float(number), expected);
        check(1.0, "1.0");
        check(0.0, "0.0");
        check(-0.0, "-0.0");
        check(-139.65318298339844, "-139.65318298339844");
        // Exactly between ...312 and ...313.
        check(f64::from(-92.331_33_f32), "-92.33132934570312");
        check(-0.5, "-0.5");
        check(123.0, "123.0");
        check(100.0, "100.0");
        check(1e16, "1e+16");
        check(1e15, "1000000000000000.0");
        check(123456789012345680.0, "1.2345678901234568e+17");
        check(0.0001, "0.0001");
        check(0.00001, "1e-05");
        check(1.5e-7, "1.5e-07");
        check(1e100, "1e+100");
        check(f64::NEG_INFINITY, "-inf");
    }

    #[test]
    fn json_is_that_of_python() {
        let value = json!({"a": [1, 2.0, []], "b": {}, "c": "é\"\n\u{1}\u{7f}", "d": null});
        assert_eq!(
            json_line(&value),
            "{\"a\": [1, 2.0, []], \"b\": {}, \"c\": \"é\\\"\\n\\u0001\u{7f}\", \"d\": null}"
        );
        let expected = "{\n  \"a\": [\n    1,\n    2.0,\n    []\n  ],\n  \"b\": {}\n}";
        assert_eq!(
            json_indented(&json!({"a": [1, 2.0, []], "b": {}})),
            expected
        );
    }
}
