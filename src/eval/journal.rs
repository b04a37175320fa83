//! Answers on disk while a run goes on, so that a killed run is continued.
//!
//! Enters: answers with the digest of what was asked. Leaves: the same after a restart. Knows no task and no metric.
//!
//! The file is only appended to, one JSON line per document after a first line that names the model and settings. A
//! line that a kill left unfinished is cut off.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::requests::Answer;
use crate::error::{Error, Fault, Result};

/// Answers given so far.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    answers: HashMap<String, Vec<Answer>>,
}

impl Journal {
    /// Opens or begins the journal at `path`. One for other settings than `key` names is begun anew.
    ///
    /// # Errors
    /// The file cannot be read or written, or another process has it.
    pub fn open(path: &Path, key: &str) -> Result<Self> {
        let failed = |source| write_error(path, source);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        if file.try_lock().is_err() {
            let fault = Fault::new("another process is writing these results")
                .in_file(path)
                .hint("wait for it, or choose another `--output`");
            return Err(Error::Data(fault));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        let header = format!("{}\n", json!({ "nemoconv_eval_journal": 1, "key": key }));
        let (answers, good_bytes) = match bytes.strip_prefix(header.as_bytes()) {
            Some(lines) => {
                let (answers, good_bytes) = read_lines(lines);
                (answers, header.len() + good_bytes)
            }
            None => (HashMap::new(), 0),
        };
        file.set_len(good_bytes as u64).map_err(failed)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        if good_bytes == 0 {
            file.write_all(header.as_bytes()).map_err(failed)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            answers,
        })
    }

    /// The answers to what has this digest.
    pub fn find(&self, digest: &str) -> Option<&[Answer]> {
        self.answers.get(digest).map(Vec::as_slice)
    }

    /// How many documents are answered.
    pub fn answered(&self) -> usize {
        self.answers.len()
    }

    /// Adds answered documents, in one write.
    ///
    /// # Errors
    /// The system refuses, most often for want of space.
    pub fn append<'a>(
        &mut self,
        answered: impl IntoIterator<Item = (&'a str, &'a [Answer])>,
    ) -> Result<()> {
        let mut lines = String::new();
        for (digest, answers) in answered {
            let answers: Vec<_> = answers
                .iter()
                .map(|answer| json!([answer.log_likelihood, answer.is_greedy]))
                .collect();
            lines += &format!("{}\n", json!({ "digest": digest, "answers": answers }));
        }
        self.file
            .write_all(lines.as_bytes())
            .map_err(|source| write_error(&self.path, source))
    }

    /// Removes the file: its answers stand in results now.
    pub fn remove(self) {
        // A journal that stays is harmless: its answers are found again.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The answers, and the bytes up to the end of the last whole line.
fn read_lines(bytes: &[u8]) -> (HashMap<String, Vec<Answer>>, usize) {
    let mut answers = HashMap::new();
    let mut good_bytes = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some((digest, answer)) = line.strip_suffix(b"\n").and_then(parse_line) else {
            break;
        };
        answers.insert(digest, answer);
        good_bytes += line.len();
    }
    (answers, good_bytes)
}

fn parse_line(line: &[u8]) -> Option<(String, Vec<Answer>)> {
    let line: Value = serde_json::from_slice(line).ok()?;
    let answer = |pair: &Value| {
        Some(Answer {
            log_likelihood: pair.get(0)?.as_f64()?,
            is_greedy: pair.get(1)?.as_bool()?,
        })
    };
    let answers = line.get("answers")?.as_array()?.iter().map(answer);
    Some((
        line.get("digest")?.as_str()?.to_string(),
        answers.collect::<Option<_>>()?,
    ))
}

fn write_error(path: &Path, source: io::Error) -> Error {
    Error::Write {
        fault: Fault::new("cannot keep the journal").in_file(path),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: Answer = Answer {
        log_likelihood: -1.0 / 3.0,
        is_greedy: true,
    };

    #[test]
    fn an_unfinished_line_is_cut_off_at_any_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut journal = Journal::open(&path, "k").unwrap();
        journal.append([("a", &[ANSWER][..])]).unwrap();
        let first = std::fs::metadata(&path).unwrap().len();
        journal.append([("b", &[ANSWER, ANSWER][..])]).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for length in first as usize..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let mut journal = Journal::open(&path, "k").unwrap();
            assert_eq!(journal.find("a"), Some(&[ANSWER][..]));
            assert_eq!(journal.find("b"), None);
            journal.append([("b", &[ANSWER, ANSWER][..])]).unwrap();
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn other_settings_begin_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut journal = Journal::open(&path, "k").unwrap();
        journal.append([("a", &[ANSWER][..])]).unwrap();
        drop(journal);
        assert_eq!(Journal::open(&path, "other").unwrap().answered(), 0);
        assert_eq!(Journal::open(&path, "k").unwrap().answered(), 0);
    }

    #[test]
    fn a_second_process_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let _journal = Journal::open(&path, "k").unwrap();
        let error = Journal::open(&path, "k").unwrap_err();
        assert!(error.to_string().contains("another process"), "{error}");
    }
}
