//! Token sequences that a model reads while it is calibrated.
//!
//! Enters: text or documents and a tokenizer. Leaves: sequences with their digest. Knows no model.

use std::path::Path;

use nemoconv_formats::Error as FormatError;
use sha2::{Digest, Sha256};

use super::cells::cells;
use super::documents::Documents;
use crate::error::{Error, Fault, Result};
use crate::model::tokenizer::{ChatTemplates, TextEncoder};

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSettings {
    /// Tokens per sequence.
    pub context_tokens: usize,
    /// Sequences at most.
    pub max_sequences: usize,
    /// Chooses among more sequences than that.
    pub seed: u64,
}

impl Default for SampleSettings {
    fn default() -> Self {
        Self {
            context_tokens: 512,
            max_sequences: 512,
            seed: 0,
        }
    }
}

/// Sequences of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    /// Each is run from an empty state.
    pub sequences: Vec<Vec<u32>>,
}

impl Samples {
    /// Reads a file: documents where its name ends in `.jsonl`, else one text.
    ///
    /// # Errors
    /// As [`Self::read_text`] and [`Self::read_documents`].
    pub fn read(
        encoder: &TextEncoder,
        templates: &ChatTemplates,
        path: &Path,
        settings: SampleSettings,
    ) -> Result<Self> {
        match path.extension().is_some_and(|ending| ending == "jsonl") {
            true => Self::read_documents(encoder, templates, path, settings),
            false => Self::read_text(encoder, path, settings),
        }
    }

    /// Reads a text file and cuts it as [`Self::of_text`] does.
    ///
    /// # Errors
    /// As there, and a file that cannot be read or is not UTF-8; each with the path.
    pub fn read_text(encoder: &TextEncoder, path: &Path, settings: SampleSettings) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| FormatError::from(error).in_file(path))?;
        Self::of_text(encoder, &text, settings).map_err(|error| match error {
            Error::Data(fault) => Error::Data(fault.in_file(path)),
            Error::Input(error) => Error::Input(error.in_file(path)),
            other => other,
        })
    }

    /// Reads documents, one per line, see [`Documents`], and packs them into sequences of at most `context_tokens`.
    ///
    /// Documents are taken in order. A longer one is cut after every `context_tokens` tokens; where the tokenizer puts BOS
    /// before a text, it replaces the first token of every later piece. Pieces share a sequence as long as they fit whole;
    /// the first that does not begins the next. So every sequence begins with a document or with a piece of a long one,
    /// and none but the last documents of sequences leave tokens unused. Documents of no token but BOS are left out. Of
    /// more sequences than `max_sequences` a seeded choice stays, in order.
    ///
    /// # Errors
    /// As [`Documents::read`]; no document has a token.
    pub fn read_documents(
        encoder: &TextEncoder,
        templates: &ChatTemplates,
        path: &Path,
        settings: SampleSettings,
    ) -> Result<Self> {
        let bos = encoder.bos().map(|bos| bos.id);
        let mut packing = Packing {
            context_tokens: settings.context_tokens,
            bos,
            sequences: Vec::new(),
            open: Vec::new(),
        };
        let documents = Documents::new(encoder, templates);
        documents.read(path, |tokens| packing.add(&tokens))?;
        packing.close();
        match packing.sequences.is_empty() {
            true => Err(Error::Data(
                Fault::new("no document has any text").in_file(path),
            )),
            false => Ok(Self {
                sequences: choose(packing.sequences, settings),
            }),
        }
    }

    /// Cuts a text into windows as llama-imatrix and llama-perplexity do: whole windows only, and where the tokenizer puts
    /// BOS before a text it replaces the first token of each. Of more windows than `max_sequences` a seeded choice stays,
    /// in order.
    ///
    /// # Errors
    /// The text is shorter than one window, or the encoder refuses it.
    pub fn of_text(encoder: &TextEncoder, text: &str, settings: SampleSettings) -> Result<Self> {
        let tokens = encoder.encode(text, None)?;
        let bos = encoder
            .bos()
            .map(|bos| bos.id)
            .filter(|bos| tokens.first() == Some(bos));
        let mut sequences: Vec<Vec<u32>> = tokens
            .chunks_exact(settings.context_tokens)
            .map(<[u32]>::to_vec)
            .collect();
        if text.is_empty() {
            return Err(Error::Data(Fault::new("the calibration text is empty")));
        }
        if sequences.is_empty() {
            let what = format!(
                "the calibration text has {} tokens, one sequence needs {}",
                tokens.len(),
                settings.context_tokens
            );
            let hint = "use a longer text, or shorter sequences with `--calibration-context`";
            return Err(Error::Data(Fault::new(what).hint(hint)));
        }
        for sequence in &mut sequences {
            if let Some(bos) = bos {
                sequence[0] = bos;
            }
        }
        Ok(Self {
            sequences: choose(sequences, settings),
        })
    }

    /// Every token has a row in an embedding of `vocab_size` rows.
    ///
    /// # Errors
    /// One has none.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<()> {
        let mut tokens = self.sequences.iter().flatten();
        match tokens.find(|token| **token as usize >= vocab_size) {
            None => Ok(()),
            Some(token) => {
                let what = format!(
                    "the tokenizer gives token {token}, the embedding has {vocab_size} rows"
                );
                Err(Error::Model(Fault::new(what).hint(
                    "the tokenizer's files belong to another model, or the embedding was cut",
                )))
            }
        }
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// The sequences of every cell.
    pub fn cells(&self) -> impl Iterator<Item = &[Vec<u32>]> {
        cells(self.sequences.len()).map(|range| &self.sequences[range])
    }

    /// SHA-256 of the ids, little-endian, each sequence after its length.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        for sequence in &self.sequences {
            hasher.update((sequence.len() as u64).to_le_bytes());
            sequence
                .iter()
                .for_each(|id| hasher.update(id.to_le_bytes()));
        }
        hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Documents on their way into sequences.
struct Packing {
    context_tokens: usize,
    bos: Option<u32>,
    sequences: Vec<Vec<u32>>,
    /// The sequence that still has room.
    open: Vec<u32>,
}

impl Packing {
    fn add(&mut self, document: &[u32]) {
        let bos = self.bos.filter(|bos| document.first() == Some(bos));
        if document.is_empty() || bos.is_some() && document.len() == 1 {
            return;
        }
        for (index, piece) in document.chunks(self.context_tokens).enumerate() {
            if self.open.len() + piece.len() > self.context_tokens {
                self.close();
            }
            let begin = self.open.len();
            self.open.extend_from_slice(piece);
            if let (Some(bos), true) = (bos, index > 0) {
                self.open[begin] = bos;
            }
        }
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            self.sequences.push(std::mem::take(&mut self.open));
        }
    }
}

/// The sequences with the smallest hashes of seed and position.
fn choose(sequences: Vec<Vec<u32>>, settings: SampleSettings) -> Vec<Vec<u32>> {
    if sequences.len() <= settings.max_sequences {
        return sequences;
    }
    let rank =
        |at: usize| xxhash_rust::xxh3::xxh3_64_with_seed(&(at as u64).to_le_bytes(), settings.seed);
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|at| rank(*at));
    let mut kept = vec![false; sequences.len()];
    order[..settings.max_sequences]
        .iter()
        .for_each(|at| kept[*at] = true);
    let chosen = sequences.into_iter().zip(kept);
    chosen
        .filter(|(_, kept)| *kept)
        .map(|(sequence, _)| sequence)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tokenizer::TokenizerFiles;

    fn encoder() -> TextEncoder {
        let files = TokenizerFiles::read(&nemoconv_fixtures::nano()).unwrap();
        TextEncoder::of_files(&files, 1024).unwrap()
    }

    fn settings(context_tokens: usize) -> SampleSettings {
        SampleSettings {
            context_tokens,
            ..SampleSettings::default()
        }
    }

    /// Sequences of documents of these lengths; tokens count up from 100, BOS is 1.
    fn packed(lengths: &[usize], bos: Option<u32>) -> Vec<Vec<u32>> {
        let mut packing = Packing {
            context_tokens: 4,
            bos: Some(1),
            sequences: Vec::new(),
            open: Vec::new(),
        };
        let mut next = 100..;
        for length in lengths {
            let text = next.by_ref().take(*length);
            packing.add(&bos.into_iter().chain(text).collect::<Vec<_>>());
        }
        packing.close();
        packing.sequences
    }

    #[test]
    fn documents_are_packed_whole_and_long_ones_are_cut() {
        let fit = packed(&[1, 2, 3], None);
        assert_eq!(fit, [vec![100, 101, 102], vec![103, 104, 105]]);
        let long = packed(&[1, 9, 2], None);
        let expected: [&[u32]; 4] = [
            &[100],
            &[101, 102, 103, 104],
            &[105, 106, 107, 108],
            &[109, 110, 111],
        ];
        assert_eq!(long, expected);
        let expected: [&[u32]; 3] = [&[1, 100, 101, 102], &[1, 104, 1, 105], &[1, 106]];
        assert_eq!(packed(&[5, 1, 1], Some(1))[..2], expected[..2]);
        assert!(packed(&[0], Some(1)).is_empty() && packed(&[0], None).is_empty());
    }

    #[test]
    fn documents_and_text_say_what_is_wrong_with_them() {
        let folder = tempfile::tempdir().unwrap();
        let check = |name: &str, content: &str, expected: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            let templates = ChatTemplates::default();
            let found = Samples::read(&encoder(), &templates, &path, settings(16)).unwrap_err();
            let message = found.to_string();
            assert!(message.contains(expected), "{message}");
            assert!(message.contains(name), "{message}");
        };
        check("a.txt", "", "the calibration text is empty");
        check("a.txt", "short", "one sequence needs 16");
        check("a.jsonl", "\n\n", "no document has any text");
        check("a.jsonl", "{\"text\": \"\"}\n", "no document has any text");
        check(
            "a.jsonl",
            "\n{\"text\": 1}",
            "line 2: expected `text` to be a string",
        );
        check("a.jsonl", "[]", "line 1: expected an object");
        check("a.jsonl", "{", "line 1: not JSON");
        check(
            "a.jsonl",
            "{\"messages\": 1}",
            "line 1: expected `messages` to be an array",
        );
        check(
            "a.jsonl",
            "{\"a\": 1}",
            "line 1: has neither `text` nor `messages`",
        );
        check(
            "a.jsonl",
            "{\"messages\": []}",
            "line 1: the model has no chat template",
        );
        let missing = Path::new("/nowhere/a.jsonl");
        let templates = ChatTemplates::default();
        let error = Samples::read(&encoder(), &templates, missing, settings(16)).unwrap_err();
        assert!(error.to_string().contains("/nowhere/a.jsonl"), "{error}");
    }

    #[test]
    fn messages_are_laid_out_by_the_template() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let rows =
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a b\"}]}\n{\"text\": \"a b\"}\n";
        std::fs::write(&path, rows).unwrap();
        let read = |template: &str| {
            let templates = ChatTemplates {
                default: Some(template.to_owned()),
                named: Vec::new(),
            };
            Samples::read(&encoder(), &templates, &path, settings(8))
        };
        let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
        // BOS from the template and BOS from the tokenizer: one each.
        assert_eq!(
            read(template).unwrap().sequences,
            [[1, 96, 301, 1, 96, 301]]
        );
        let error = read("{{ raise_exception('no') }}").unwrap_err().to_string();
        assert!(
            error.contains("line 1: the chat template refuses it"),
            "{error}"
        );
        let error = read("{% if %}").unwrap_err().to_string();
        assert!(
            error.contains("the model's chat template cannot be used"),
            "{error}"
        );
    }

    #[test]
    fn a_token_without_a_row_is_named() {
        let samples = Samples {
            sequences: vec![vec![1, 2], vec![1024]],
        };
        assert!(samples.check_vocabulary(1025).is_ok());
        let error = samples.check_vocabulary(1024).unwrap_err();
        assert!(error.to_string().contains("token 1024"), "{error}");
    }
}
