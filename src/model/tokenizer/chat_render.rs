//! Chat templates rendered as transformers renders them.
//!
//! Enters: a template, a conversation, the special tokens. Leaves: the prompt, or why there is none. The date is fixed:
//! the same template gives the same prompt on every day.
//!
//! Source: transformers 5, `utils/chat_template_utils.py` (`_compile_jinja_template`).

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;
use serde::Serialize;

/// Steps of one rendering; real templates take a few thousand.
const FUEL: u64 = 10_000_000;

/// A template that parses.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
}

const NAME: &str = "chat_template";

/// Marks the text a model is trained on; prompts are the same without.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%(-?)\s*(end)?generation\s*(-?)%\}").expect("the pattern is well formed")
});

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// What does not parse, with its line.
    pub fn parse(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| describe(&error))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", strftime_now);
        let source = GENERATION.replace_all(source, |found: &regex::Captures| {
            let keyword = if found.get(2).is_some() {
                "endif"
            } else {
                "if true"
            };
            format!("{{%{} {keyword} {}%}}", &found[1], &found[3])
        });
        environment
            .add_template_owned(NAME, source.into_owned())
            .map_err(|error| describe(&error))?;
        Ok(Self { environment })
    }

    /// The prompt of a conversation: an object with `messages` and whatever else the template asks for.
    ///
    /// # Errors
    /// What the template refuses, with its line.
    pub fn render(
        &self,
        conversation: &serde_json::Value,
        bos_token: &str,
        eos_token: &str,
    ) -> Result<String, String> {
        let mut context = conversation.clone();
        context["bos_token"] = bos_token.into();
        context["eos_token"] = eos_token.into();
        let template = self.environment.get_template(NAME);
        template
            .and_then(|template| template.render(Value::from(Serde(&context))))
            .map_err(|error| describe(&error))
    }
}

fn describe(error: &Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// `json.dumps` of Python without ASCII escapes.
fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted by transformers; the order of keys is that of the conversation.
    let _: (Option<bool>, Option<bool>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let failed = |error| Error::new(ErrorKind::BadSerialization, format!("{error}"));
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, format);
            value.serialize(&mut serializer).map_err(failed)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonFormat);
            value.serialize(&mut serializer).map_err(failed)?;
        }
    }
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
}

/// `, ` and `: ` between parts.
struct PythonFormat;

impl serde_json::ser::Formatter for PythonFormat {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The second of January 2026, a Friday, 03:04:05.
fn strftime_now(format: String) -> String {
    let parts = [
        ("%Y", "2026"),
        ("%m", "01"),
        ("%d", "02"),
        ("%B", "January"),
        ("%b", "Jan"),
        ("%A", "Friday"),
        ("%a", "Fri"),
        ("%H", "03"),
        ("%M", "04"),
        ("%S", "05"),
    ];
    parts
        .iter()
        .fold(format, |text, (code, value)| text.replace(code, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn conversation() -> serde_json::Value {
        let user = json!({"role": "user", "content": "What is 2 + 2?"});
        let system = json!({"role": "system", "content": "You answer in one word."});
        let assistant = json!({"role": "assistant", "content": "Four."});
        json!({"messages": [system, user, assistant, user], "add_generation_prompt": true})
    }

    fn check(template: &str, expected: Result<&str, &str>) {
        let rendered = Template::parse(template)
            .and_then(|parsed| parsed.render(&conversation(), "<s>", "</s>"));
        let expected = expected.map(str::to_owned).map_err(str::to_owned);
        assert_eq!(rendered, expected, "{template}");
    }

    /// Each expectation is what transformers 5.23 answers.
    #[test]
    fn templates_render_as_in_transformers() {
        check(
            "{{ bos_token }}{% for m in messages %}\n    {%- if m['role'] == 'user' %}\n[INST]{{ m.content[:4].upper() }}[/INST]\n    {% endif %}\n{% endfor %}",
            Ok("<s>[INST]WHAT[/INST]\n[INST]WHAT[/INST]\n"),
        );
        check(
            "{{ {'a': [1, 'ü<', none, true]} | tojson }}",
            Ok("{\"a\": [1, \"ü<\", null, true]}"),
        );
        check(
            "{{ {'a': [1], 'b': {}} | tojson(indent=2) }}",
            Ok("{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}"),
        );
        check(
            "{{ 1.5 }} {{ none }} {{ [1, 'a'] }}",
            Ok("1.5 None [1, 'a']"),
        );
        check("{{ strftime_now('%d %B %Y') }}", Ok("02 January 2026"));
        check("{% generation %}a{% endgeneration %}", Ok("a"));
        check(
            "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role.startswith('s') }}{% endfor %}",
            Ok("TrueFalse"),
        );
        check(
            "{{ raise_exception('no system message') }}",
            Err("invalid operation: no system message (line 1)"),
        );
    }

    #[test]
    fn what_does_not_parse_names_its_line() {
        let error = Template::parse("a\n{% if x %}b").err().unwrap();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn endless_templates_end() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let error = Template::parse(source)
            .unwrap()
            .render(&json!({}), "", "")
            .unwrap_err();
        assert!(error.contains("fuel"), "{error}");
    }
}
