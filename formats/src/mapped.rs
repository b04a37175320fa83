//! Files as bytes: read-only memory maps.
//!
//! Enters: a path. Leaves: its bytes, paged in on demand. Knows no format.

use crate::{Error, Result};
use memmap2::Mmap;
use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

/// A file mapped read-only. Pages come from disk when touched and can be given back with [`Self::release`].
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the regular file at `path`; an empty file gives no bytes.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let name = |error: Error| error.in_file(path);
        // Asked before opening: to open a pipe is to wait for its writer.
        if !std::fs::metadata(path)
            .map_err(|e| name(e.into()))?
            .is_file()
        {
            return Err(name(Error::unsupported("not a regular file")));
        }
        let file = File::open(path).map_err(|e| name(e.into()))?;
        let map = map_read_only(&file).map_err(|e| name(e.into()))?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets the system drop the resident pages that hold `range`, so that a pass over a file larger than the memory
    /// stays small. The bytes stay readable; a later read fetches them again. Advice only: nothing happens where the
    /// system has no such call, or where part of the range lies outside the file.
    pub fn release(&self, range: Range<usize>) {
        if range.start < range.end && range.end <= self.map.len() {
            let start = range.start.saturating_sub(FAULT_AROUND_BYTES);
            let end = range
                .end
                .saturating_add(FAULT_AROUND_BYTES)
                .min(self.map.len());
            drop_pages(&self.map, start..end);
        }
    }
}

/// Linux maps up to this much around the page that was asked for (`fault_around_bytes`): a neighbour's first read
/// brings back pages that were dropped, so that a release reaches this far beyond its range.
const FAULT_AROUND_BYTES: usize = 64 << 10;

/// The one place that maps a file.
#[allow(unsafe_code, reason = "memory maps have no safe constructor")]
fn map_read_only(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private to this module and handed out as `&[u8]` only. Nothing in this process writes
    // through it. Another process that rewrites the file changes the bytes, one that truncates it raises SIGBUS:
    // every reader of mapped checkpoints takes that risk, and output files are written elsewhere and renamed.
    unsafe { Mmap::map(file) }
}

#[cfg(unix)]
#[allow(
    unsafe_code,
    reason = "memmap2 marks this advice unsafe because it discards private writes"
)]
fn drop_pages(map: &Mmap, range: Range<usize>) {
    // SAFETY: discarding pages of a shared read-only file map loses nothing, they are read from the file again.
    // A refusal is of no consequence: the pages stay.
    let _ = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
    };
}

#[cfg(not(unix))]
fn drop_pages(_: &Mmap, _: Range<usize>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), bytes);
        for range in [
            0..100_000,
            5_000..5_001,
            7..7,
            99_999..100_001,
            usize::MAX - 1..usize::MAX,
        ] {
            file.release(range);
            assert_eq!(file.bytes(), bytes);
        }
    }

    #[test]
    fn an_empty_file_has_no_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert!(MappedFile::open(&path).unwrap().bytes().is_empty());
    }

    #[test]
    fn what_is_no_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().to_owned(), folder.path().join("absent")] {
            let error = MappedFile::open(&path).unwrap_err();
            assert_eq!(error.place.path, Some(path));
        }
    }
}
