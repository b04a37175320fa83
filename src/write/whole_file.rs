//! One file that appears whole or not at all.
//!
//! Enters: a path, tried before the work begins, and later the bytes. Leaves: the file and its SHA-256.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use nemoconv_formats::Error as FormatError;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::gguf::artifact::create_sibling;
use crate::error::{Error, Fault, Result};

/// A file that is not there yet. Dropping it leaves nothing behind.
#[derive(Debug)]
pub struct WholeFile {
    path: PathBuf,
    file: NamedTempFile,
}

impl WholeFile {
    /// Opens a temporary sibling of `path`.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: create_sibling(path)?,
        })
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets `write` fill the file, forces it to the disk and gives it its name; returns its SHA-256, lower-case
    /// hexadecimal.
    ///
    /// # Errors
    /// The system refuses.
    pub fn publish(self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<String> {
        let refused = |source| Error::Write {
            fault: Fault::new("cannot write").in_file(&self.path),
            source,
        };
        let mut out = BufWriter::new(Hashed::new(self.file.as_file()));
        write(&mut out).map_err(refused)?;
        let written = out
            .into_inner()
            .map_err(|error| refused(error.into_error()))?;
        let sha256 = written.finish();
        self.file.as_file().sync_all().map_err(refused)?;
        self.file
            .persist(&self.path)
            .map_err(|error| refused(error.error))?;
        Ok(sha256)
    }
}

/// SHA-256 of a file, lower-case hexadecimal.
///
/// # Errors
/// It cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let named = |error: io::Error| FormatError::from(error).in_file(path);
    let mut file = File::open(path).map_err(named)?;
    let mut sink = Hashed::new(io::sink());
    io::copy(&mut file, &mut sink).map_err(named)?;
    Ok(sink.finish())
}

/// Hashes what passes through.
struct Hashed<W> {
    inner: W,
    hasher: Sha256,
}

impl<W> Hashed<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
        }
    }

    fn finish(self) -> String {
        let mut text = String::new();
        for byte in self.hasher.finalize() {
            // A string takes whatever is written to it.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let half = |out: &mut dyn Write| {
            out.write_all(b"half")?;
            Err(io::Error::other("no more"))
        };
        let error = WholeFile::create(&path).unwrap().publish(half).unwrap_err();
        assert!(error.to_string().contains("no more"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let file = WholeFile::create(&path).unwrap();
        let sha256 = file.publish(|out| out.write_all(b"whole")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(sha256_of(&path).unwrap(), sha256);
    }
}
