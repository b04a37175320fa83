//! Rows of benchmark data: one JSON object per line, or the rows of a Parquet file.
//!
//! Enters: the folder of the data and a task's names. Leaves: [`DataSet`], rows in order, each knowing where it stood.
//! Knows no field names.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::parquet;
use super::tasks::Task;
use crate::error::{Error, Fault, Result};
use crate::parallel;

/// Longest line: several times the longest page of the known data sets.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Its fields, in the order of the file.
    pub fields: Map<String, Value>,
    /// Which of [`DataSet::files`] it came from.
    pub file: usize,
    /// Line (JSONL) or row (Parquet) in that file, from 1.
    pub line: usize,
}

/// All rows of a task's split.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSet {
    /// Where they came from, in order.
    pub files: Vec<PathBuf>,
    /// The rows of all files.
    pub documents: Vec<Document>,
}

impl DataSet {
    /// Finds and reads the data of `task` below `folder`.
    ///
    /// Looked for, first match wins: `TASK/SPLIT.jsonl`, `TASK/SPLIT.parquet`, `TASK/SPLIT-00000-of-0000N.parquet`,
    /// the same in the folder names of the published data sets, then `TASK.jsonl` and `TASK.parquet`.
    ///
    /// # Errors
    /// No such file, a line that is not a JSON object, a damaged Parquet file, no rows at all.
    pub fn read(folder: &Path, task: Task) -> Result<Self> {
        let files = find(folder, task)?;
        let mut documents = Vec::new();
        for (file, path) in files.iter().enumerate() {
            if is_parquet(path) {
                parquet::read_rows(path, file, &mut documents)?;
            } else {
                read_lines(path, file, &mut documents)?;
            }
        }
        if documents.is_empty() {
            return Err(Error::Data(
                Fault::new("the file has no rows").in_file(&files[0]),
            ));
        }
        Ok(Self { files, documents })
    }

    /// [`read`](Self::read) for some tasks, side by side.
    ///
    /// # Errors
    /// Those of the first task that has some.
    pub fn read_all(folder: &Path, tasks: Vec<Task>) -> Result<Vec<(Task, Self)>> {
        parallel::try_map(tasks, |task| Ok((task, Self::read(folder, task)?)))
    }

    /// A fault of one row: file and line, then what is wrong.
    pub fn fault(&self, document: &Document, what: &str) -> Error {
        let path = &self.files[document.file];
        bad_row(path, document.line, what)
    }
}

/// A row that cannot be used.
pub(super) fn bad_row(path: &Path, line: usize, what: &str) -> Error {
    let unit = if is_parquet(path) { "row" } else { "line" };
    Error::Data(Fault::new(format!("{unit} {line}: {what}")).in_file(path))
}

fn is_parquet(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "parquet")
}

fn find(folder: &Path, task: Task) -> Result<Vec<PathBuf>> {
    let (name, split) = (task.name(), task.split());
    for place in std::iter::once(name).chain(task.published_folders().iter().copied()) {
        let place = folder.join(place);
        for file in [format!("{split}.jsonl"), format!("{split}.parquet")] {
            if place.join(&file).is_file() {
                return Ok(vec![place.join(file)]);
            }
        }
        let parts = numbered_parts(&place, split);
        if !parts.is_empty() {
            return Ok(parts);
        }
    }
    for extension in ["jsonl", "parquet"] {
        let file = folder.join(format!("{name}.{extension}"));
        if file.is_file() {
            return Ok(vec![file]);
        }
    }
    let fault = Fault::new(format!("there is no data of `{name}`"))
        .in_file(folder)
        .hint(format!(
            "put `{name}/{split}.jsonl` or `{name}/{split}.parquet` there, with the fields of the published data set"
        ));
    Err(Error::Data(fault))
}

/// `SPLIT-00000-of-00002.parquet` and so on, by name.
fn numbered_parts(folder: &Path, split: &str) -> Vec<PathBuf> {
    let prefix = format!("{split}-");
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let mut parts: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| is_parquet(path))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        })
        .collect();
    parts.sort();
    parts
}

fn read_lines(path: &Path, file: usize, documents: &mut Vec<Document>) -> Result<()> {
    let unreadable = |error| Error::from(nemoconv_formats::Error::from(error).in_file(path));
    let mut reader = BufReader::new(File::open(path).map_err(unreadable)?);
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = (&mut reader)
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut bytes)
            .map_err(unreadable)?;
        if read == 0 {
            break;
        }
        if read as u64 == MAX_LINE_BYTES {
            return Err(bad_row(
                path,
                line,
                &format!("longer than {MAX_LINE_BYTES} bytes"),
            ));
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let fields = parse_row(&bytes).map_err(|what| bad_row(path, line, &what))?;
        documents.push(Document { fields, file, line });
    }
    Ok(())
}

fn parse_row(bytes: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "text is not UTF-8".to_string())?;
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(format!("expected a JSON object, found {}", kind(&other))),
        Err(error) => Err(format!("not JSON at column {}: {error}", error.column())),
    }
}

/// What sort of JSON a value is, with its article.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<DataSet> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("piqa.jsonl"), content).unwrap();
        DataSet::read(folder.path(), Task::Piqa)
    }

    #[test]
    fn blank_lines_are_skipped_and_counted() {
        let data = read(b"{\"a\": 1}\n\n {\"a\": 2}\r\n").unwrap();
        let lines: Vec<_> = data
            .documents
            .iter()
            .map(|document| document.line)
            .collect();
        assert_eq!(lines, [1, 3]);
        assert_eq!(data.documents[1].fields["a"], 2);
    }

    #[test]
    fn bad_rows_are_named() {
        let check = |content: &[u8], expected: &str| {
            let error = read(content).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.contains("piqa.jsonl"), "{error}");
        };
        check(b"{}\n[1]\n", "line 2: expected a JSON object, found a list");
        check(b"{}\n\n{\"a\": \n", "line 3: not JSON at column");
        check(b"{}\n\xff\n", "line 2: text is not UTF-8");
        check(
            "{\"a\": \"\\ud800\"}".as_bytes(),
            "line 1: not JSON at column",
        );
        check(&b"[".repeat(100_000), "line 1: not JSON at column");
        check(b"\n \n", "the file has no rows");
    }

    #[test]
    fn missing_data_says_what_to_put_where() {
        let folder = tempfile::tempdir().unwrap();
        let error = DataSet::read(folder.path(), Task::ArcEasy).unwrap_err();
        assert!(error.to_string().contains("there is no data of `arc_easy`"));
        assert!(error.hint().unwrap().contains("arc_easy/test.jsonl"));
    }
}
