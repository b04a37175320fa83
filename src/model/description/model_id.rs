//! What a model's name says: organization, base name, size, fine-tune, version.
//!
//! Enters: `org/Name-8B-Instruct-v1.2`. Leaves: [`ModelId`]. Reads no files.
//!
//! Source: llama.cpp `gguf-py/gguf/metadata.py` (`get_model_id_components`, `id_to_title`).

use std::sync::LazyLock;

use regex::Regex;

/// The parts of a model's name, as far as they can be told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ModelId {
    pub(super) name: String,
    pub(super) organization: Option<String>,
    pub(super) basename: Option<String>,
    pub(super) finetune: Option<String>,
    pub(super) version: Option<String>,
    pub(super) size_label: Option<String>,
}

/// What a part between hyphens is taken for. A part may be both a version and of the base name.
#[derive(Debug, Default)]
struct Part {
    text: String,
    basename: bool,
    size_label: bool,
    finetune: bool,
    version: bool,
    quantization: bool,
}

impl Part {
    fn is_labelled(&self) -> bool {
        self.basename || self.size_label || self.finetune || self.version || self.quantization
    }
}

impl ModelId {
    /// Takes `id` apart. `total_parameters` tells sizes (`8B`) from context lengths (`8K`); 0 if
    /// unknown.
    pub(super) fn parse(id: &str, total_parameters: u64) -> Self {
        if id.contains(' ') {
            return Self {
                name: id.to_owned(),
                ..Self::default()
            };
        }
        let (organization, name) = match id.split_once('/') {
            Some((organization, name)) => (Some(organization), name),
            None => (None, id),
        };
        let mut parts = label(name, total_parameters);
        find_basename(&mut parts);
        let join = |has: fn(&Part) -> bool| {
            let texts: Vec<&str> = parts
                .iter()
                .filter(|part| has(part))
                .map(|part| part.text.as_str())
                .collect();
            (!texts.is_empty()).then(|| texts.join("-"))
        };
        let mut this = Self {
            name: name.to_owned(),
            organization: organization
                .filter(|name| !name.starts_with('.'))
                .map(str::to_owned),
            basename: join(|part| part.basename),
            finetune: join(|part| part.finetune),
            version: join(|part| part.version && !part.basename),
            size_label: size_label(&parts),
        };
        if this.size_label.is_none() && this.finetune.is_none() && this.version.is_none() {
            this.basename = None;
        }
        this
    }
}

/// `-` becomes a space; a word in lower case is capitalised unless it is a version or a number.
pub(super) fn title(id: &str) -> String {
    let spaced = id.trim().replace('-', " ");
    let words: Vec<String> = spaced
        .split_whitespace()
        .map(|word| {
            if is_lower(word) && !VERSION_WORD.is_match(word) {
                capitalised(word)
            } else {
                word.to_owned()
            }
        })
        .collect();
    words.join(" ")
}

static VERSION_WORD: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:v\d+(?:\.\d+)*|\d.*)$"));
static VERSION: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?i:(?:v|iter)?\d+(?:[.]\d+)*)$"));
static QUANTIZATION: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^(?i:i?q\d(?:_\w)*|b?fp?(?:16|32))$"));
static SIZE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^(?i:(?:(?:[A]|\d+[x])?\d+(?:[._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl))$")
});
static FINETUNE: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?i:chat|instruct|vision|lora)$"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern")
}

fn label(name: &str, total_parameters: u64) -> Vec<Part> {
    let texts = name.split('-').filter(|text| !text.is_empty());
    let mut parts: Vec<Part> = texts
        .map(|text| Part {
            text: text.to_owned(),
            ..Part::default()
        })
        .collect();
    for (i, part) in parts.iter_mut().enumerate() {
        if VERSION.is_match(&part.text) {
            part.version = true;
        } else if QUANTIZATION.is_match(&part.text) {
            part.quantization = true;
            part.text = part.text.to_uppercase();
        } else if i > 0 && SIZE.is_match(&part.text) {
            label_size(part, total_parameters);
        } else if i > 0 && FINETUNE.is_match(&part.text) {
            part.finetune = true;
        }
    }
    // Words such as `mini` are sizes only where no number says better.
    let has_number = parts
        .iter()
        .any(|part| part.size_label && part.text.contains(char::is_numeric));
    for part in parts
        .iter_mut()
        .filter(|part| has_number && part.text.chars().all(char::is_alphabetic))
    {
        part.size_label = false;
    }
    parts
}

fn label_size(part: &mut Part, total_parameters: u64) {
    let mut text: Vec<char> = part.text.replace('_', ".").chars().collect();
    // bloom's way of writing 7.1B: 7b1.
    if let [.., unit, digit] = *text.as_slice()
        && digit.is_numeric()
    {
        text.truncate(text.len() - 2);
        text.extend(['.', digit, unit]);
    }
    if let [.., before, unit @ ('k' | 'm' | 'b' | 't')] = text.as_mut_slice()
        && before.is_numeric()
    {
        unit.make_ascii_uppercase();
    }
    let mut label: String = text.iter().collect();
    if total_parameters != 0
        && let Some((unit, number)) = text.split_last()
        && let Some(power) = "KMBT".find(*unit)
        && let Ok(number) = number.iter().collect::<String>().parse::<f64>()
    {
        let claimed = number * 1000_f64.powi(power as i32 + 1);
        let total = total_parameters as f64;
        if (claimed - total).abs() > (7.0 * total / 8.0).floor() {
            // Far from the model's size: likely a context length.
            part.finetune = true;
            label = label.strip_suffix(*unit).map_or(label.clone(), |number| {
                format!("{number}{}", unit.to_ascii_lowercase())
            });
        }
    }
    part.size_label = !part.finetune;
    part.text = label;
}

/// The leading unlabelled words, with versions between them but not after them.
fn find_basename(parts: &mut [Part]) {
    let mut at_start = true;
    for part in parts.iter_mut() {
        let is_word = !part.is_labelled() && part.text.starts_with(char::is_alphabetic);
        if at_start && (is_word || part.version) {
            part.basename = true;
        } else {
            at_start = false;
            part.finetune |= !part.is_labelled();
        }
    }
    for part in parts.iter_mut().rev() {
        if !(part.basename && part.version) {
            break;
        }
        part.basename = false;
    }
}

fn size_label(parts: &[Part]) -> Option<String> {
    let mut labels: Vec<&str> = Vec::new();
    for part in parts.iter().filter(|part| part.size_label) {
        if !labels.contains(&part.text.as_str()) {
            labels.push(&part.text);
        }
    }
    (!labels.is_empty()).then(|| labels.join("-"))
}

fn is_lower(word: &str) -> bool {
    word.chars().any(char::is_lowercase) && !word.chars().any(char::is_uppercase)
}

/// Python's `str.title`: a letter after anything that is not a letter is capitalised.
fn capitalised(word: &str) -> String {
    let mut titled = String::with_capacity(word.len());
    let mut after_letter = false;
    for c in word.chars() {
        let mut upper = c.to_uppercase();
        match upper.next() {
            Some(first) if !after_letter => {
                titled.push(first);
                titled.extend(upper.flat_map(char::to_lowercase));
            }
            _ => titled.push(c),
        }
        after_letter = c.is_lowercase();
    }
    titled
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the real converter, size by size.
    #[test]
    fn names_are_taken_apart_as_the_converter_does() {
        for line in nemoconv_fixtures::metadata::model_ids() {
            let text = |i: usize| line[i].as_str();
            let (id, total) = (text(0).unwrap(), line[1].as_u64().unwrap());
            let found = ModelId::parse(id, total);
            let fields = [
                &found.organization,
                &found.basename,
                &found.finetune,
                &found.version,
                &found.size_label,
            ];
            assert_eq!(title(&found.name), text(2).unwrap(), "{id}");
            assert_eq!(
                fields.map(Option::as_deref),
                [3, 4, 5, 6, 7].map(text),
                "{id} of {total}"
            );
        }
    }

    #[test]
    fn titles_capitalise_words_in_lower_case() {
        for (id, expected) in [
            ("llama-3-8b-instruct-v1.2", "Llama 3 8b Instruct v1.2"),
            ("NVIDIA-Nemotron", "NVIDIA Nemotron"),
            ("qwen2vl", "Qwen2Vl"),
            ("  straße-ßa ", "Straße Ssa"),
        ] {
            assert_eq!(title(id), expected);
        }
    }
}
