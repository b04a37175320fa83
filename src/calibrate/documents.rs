//! Documents of a JSONL file: raw texts, and conversations laid out by the model's own chat template.
//!
//! Enters: a file nobody has checked, one object per line, with `text` or with `messages` (and `tools`, if the template
//! reads them). Leaves: token ids, document by document. Decides nothing about sequences.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use nemoconv_formats::Error as FormatError;
use serde_json::{Map, Value, json};

use crate::error::{Error, Fault, Result};
use crate::model::tokenizer::chat_render::Template;
use crate::model::tokenizer::{ChatTemplates, NamedToken, TextEncoder};

/// Turns lines into token ids.
pub struct Documents<'a> {
    encoder: &'a TextEncoder,
    /// The model's template; why it cannot be used, if it does not parse.
    template: Option<std::result::Result<Template, String>>,
}

impl<'a> Documents<'a> {
    /// For the tokenizer and templates of one model.
    pub fn new(encoder: &'a TextEncoder, templates: &ChatTemplates) -> Self {
        Self {
            encoder,
            template: templates.default.as_deref().map(Template::parse),
        }
    }

    /// Gives the ids of every document of the file to `add`, in order, each as the tokenizer encodes a text: with BOS
    /// where it puts one. Blank lines are passed over.
    ///
    /// # Errors
    /// The file cannot be read; a line is no object with `text` or `messages`, or the template refuses it, each with the
    /// number of the line; the encoder refuses a text.
    pub fn read(&self, path: &Path, mut add: impl FnMut(Vec<u32>)) -> Result<()> {
        let failed = |error| FormatError::from(error).in_file(path);
        let file = BufReader::new(File::open(path).map_err(failed)?);
        for (index, line) in file.lines().enumerate() {
            let line = line.map_err(failed)?;
            if line.trim().is_empty() {
                continue;
            }
            let text = self.text(&line).map_err(|fault| {
                let what = format!("line {}: {}", index + 1, fault.what);
                Error::Data(Fault { what, ..fault }.in_file(path))
            })?;
            let ids = self.encoder.encode(&text, None);
            add(ids.map_err(|error| error.in_file(path))?);
        }
        Ok(())
    }

    /// The text of one line. Where there is both a text and messages, the text is taken.
    fn text(&self, line: &str) -> std::result::Result<String, Fault> {
        let row: Value =
            serde_json::from_str(line).map_err(|error| Fault::new(format!("not JSON: {error}")))?;
        let expected = "a document is `{\"text\": \"...\"}` or `{\"messages\": [...]}`";
        let Value::Object(row) = row else {
            return Err(Fault::new("expected an object").hint(expected));
        };
        match (row.get("text"), row.get("messages")) {
            (Some(Value::String(text)), _) => Ok(text.clone()),
            (Some(_), _) => Err(Fault::new("expected `text` to be a string").hint(expected)),
            (None, Some(Value::Array(_))) => self.render(&row),
            (None, Some(_)) => Err(Fault::new("expected `messages` to be an array").hint(expected)),
            (None, None) => Err(Fault::new("has neither `text` nor `messages`").hint(expected)),
        }
    }

    fn render(&self, row: &Map<String, Value>) -> std::result::Result<String, Fault> {
        let template = match &self.template {
            Some(Ok(template)) => template,
            Some(Err(error)) => {
                return Err(Fault::new(format!(
                    "the model's chat template cannot be used: {error}"
                )));
            }
            None => {
                return Err(Fault::new("the model has no chat template to lay out `messages`")
                    .hint("give documents as `text`, or add `chat_template` to the model's tokenizer_config.json"));
            }
        };
        let mut conversation = json!({
            "messages": row.get("messages"), "add_generation_prompt": false
        });
        if let Some(tools) = row.get("tools") {
            conversation["tools"] = tools.clone();
        }
        let text = |token: Option<&'a NamedToken>| token.map_or("", |token| &token.text);
        let (bos, eos) = (text(self.encoder.bos()), text(self.encoder.eos()));
        template
            .render(&conversation, bos, eos)
            .map_err(|error| Fault::new(format!("the chat template refuses it: {error}")))
    }
}
