//! A folder beside the artifact that holds finished tensors, so that a run that was killed goes on where it was.
//!
//! Enters: bytes and outcome of a tensor. Leaves: the same, in this run or a later one. A tensor counts once its line is in
//! the journal; its bytes are on the disk before that.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::TensorOutcome;
use crate::error::{Error, Fault, Result};

/// Finished tensors.
#[derive(Debug)]
pub struct Workspace {
    folder: PathBuf,
    journal: File,
    finished: BTreeMap<String, Line>,
    /// Tensors that an earlier run left.
    pub resumed: usize,
    /// Of a second artifact that is rounded by the same walk.
    twin: Option<Box<Workspace>>,
}

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Line {
    bytes: u64,
    digest: u64,
    outcome: TensorOutcome,
}

const JOURNAL: &str = "journal.jsonl";

impl Workspace {
    /// Opens the workspace of a run. What an earlier run of the same `key` finished is kept, anything else is removed.
    ///
    /// # Errors
    /// The folder cannot be made, read or written; another run is using it.
    pub fn open(folder: &Path, key: &str) -> Result<Self> {
        let failed = |source| write_error("cannot use the workspace", folder, source);
        fs::create_dir_all(folder).map_err(failed)?;
        let path = folder.join(JOURNAL);
        // The folder is removed in the end.
        if !path.exists() && fs::read_dir(folder).map_err(failed)?.next().is_some() {
            let fault = Fault::new("holds files that no conversion left there").in_file(folder);
            return Err(Error::Plan(
                fault.hint("move the folder, or write the artifact under another name"),
            ));
        }
        let mut options = OpenOptions::new();
        let journal = options
            .create(true)
            .append(true)
            .read(true)
            .open(&path)
            .map_err(failed)?;
        if fs4::FileExt::try_lock(&journal).is_err() {
            let fault = Fault::new("another run is using this workspace").in_file(folder);
            return Err(Error::Plan(
                fault.hint("wait for it, or write the artifact under another name"),
            ));
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        let finished = finished_of(&text, key, folder);
        let mut workspace = Self {
            resumed: finished.as_ref().map_or(0, BTreeMap::len),
            finished: finished.unwrap_or_default(),
            folder: folder.to_owned(),
            journal,
            twin: None,
        };
        workspace.rewrite(key)?;
        Ok(workspace)
    }

    /// Starts the journal anew with what is kept: a torn last line goes with it.
    fn rewrite(&mut self, key: &str) -> Result<()> {
        let mut text = format!("{}\n", serde_json::json!({ "key": key }));
        for line in self.finished.values() {
            text.push_str(&line_text(line));
        }
        let failed = |source| write_error("cannot write", &self.folder.join(JOURNAL), source);
        self.journal.set_len(0).map_err(failed)?;
        self.journal.write_all(text.as_bytes()).map_err(failed)?;
        self.journal.sync_data().map_err(failed)
    }

    /// With that of a second artifact beside it.
    pub fn with_twin(self, twin: Self) -> Self {
        Self {
            twin: Some(Box::new(twin)),
            ..self
        }
    }

    /// The first artifact's, and the second's.
    pub fn split(self) -> (Self, Option<Self>) {
        let Self { twin, .. } = self;
        let first = Self { twin: None, ..self };
        (first, twin.map(|twin| *twin))
    }

    /// The first artifact's, or the second's where there is one.
    pub fn of(&mut self, is_twin: bool) -> &mut Self {
        match (&mut self.twin, is_twin) {
            (Some(_), true) => self.twin.as_mut().expect("it was there just now"),
            _ => self,
        }
    }

    /// Whether a tensor is done, in every artifact.
    pub fn is_finished(&self, tensor: &str) -> bool {
        self.holds(tensor) && self.twin.as_ref().is_none_or(|twin| twin.holds(tensor))
    }

    /// Whether a tensor of this artifact is done.
    pub fn holds(&self, tensor: &str) -> bool {
        self.finished.contains_key(tensor)
    }

    /// What became of all tensors, by name.
    pub fn outcomes(&self) -> impl Iterator<Item = &TensorOutcome> {
        self.finished.values().map(|line| &line.outcome)
    }

    /// The stored bytes of a finished tensor.
    ///
    /// # Errors
    /// They cannot be read or are not those that were written.
    pub fn read(&self, tensor: &str) -> Result<Vec<u8>> {
        let path = self.path(tensor);
        let bytes =
            fs::read(&path).map_err(|error| nemoconv_formats::Error::from(error).in_file(&path))?;
        let line = &self.finished[tensor];
        if xxh3_64(&bytes) == line.digest {
            return Ok(bytes);
        }
        let fault = Fault::new("does not read back as it was written")
            .in_tensor(tensor)
            .in_file(&path);
        Err(Error::Verify(
            fault.hint("check the disk; remove the workspace to start anew"),
        ))
    }

    /// Fills `out` with stored bytes of a finished tensor from `offset` on.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn read_at(&self, tensor: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let path = self.path(tensor);
        let read = File::open(&path).and_then(|file| file.read_exact_at(out, offset));
        Ok(read.map_err(|error| nemoconv_formats::Error::from(error).in_file(&path))?)
    }

    /// Keeps a tensor.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(&mut self, bytes: &[u8], outcome: TensorOutcome) -> Result<()> {
        let path = self.path(&outcome.tensor);
        let failed = |source| write_error("cannot write", &path, source);
        let mut file = File::create(&path).map_err(failed)?;
        file.write_all(bytes).map_err(failed)?;
        file.sync_data().map_err(failed)?;
        let line = Line {
            bytes: bytes.len() as u64,
            digest: xxh3_64(bytes),
            outcome,
        };
        self.journal
            .write_all(line_text(&line).as_bytes())
            .map_err(failed)?;
        self.journal.sync_data().map_err(failed)?;
        self.finished.insert(line.outcome.tensor.clone(), line);
        Ok(())
    }

    /// Removes everything.
    ///
    /// # Errors
    /// The folder cannot be removed.
    pub fn remove(self) -> Result<()> {
        drop(self.journal);
        fs::remove_dir_all(&self.folder)
            .map_err(|source| write_error("cannot remove", &self.folder, source))
    }

    fn path(&self, tensor: &str) -> PathBuf {
        self.folder.join(format!("{tensor}.bin"))
    }
}

fn line_text(line: &Line) -> String {
    let json =
        serde_json::to_string(line).expect("a line has no maps with other keys than strings");
    format!("{json}\n")
}

/// The tensors of a journal of this key whose bytes are whole.
fn finished_of(journal: &str, key: &str, folder: &Path) -> Option<BTreeMap<String, Line>> {
    let mut lines = journal.lines();
    let header: serde_json::Value = serde_json::from_str(lines.next()?).ok()?;
    if header["key"] != key {
        return None;
    }
    let lines = lines.map_while(|line| serde_json::from_str::<Line>(line).ok());
    let is_whole = |line: &Line| {
        let path = folder.join(format!("{}.bin", line.outcome.tensor));
        fs::metadata(path).is_ok_and(|found| found.len() == line.bytes)
    };
    Some(
        lines
            .filter(is_whole)
            .map(|line| (line.outcome.tensor.clone(), line))
            .collect(),
    )
}

fn write_error(what: &str, path: &Path, source: std::io::Error) -> Error {
    Error::Write {
        fault: Fault::new(what).in_file(path),
        source,
    }
}
