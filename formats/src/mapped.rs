//! Files as bytes: read-only memory maps.
//!
//! Enters: a path. Leaves: its bytes, paged in on demand. Knows no format.

use crate::{Error, Result, positioned};
use memmap2::Mmap;
use std::{
    fs::File,
    path::{Path, PathBuf},
};

/// A file mapped read-only. Headers are read from the map; what is streamed goes through [`Self::read_at`], whose
/// memory is the caller's buffer: pages of a map stay resident behind a pass over it.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
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
            file,
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

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// The file cannot be read, or ends before; with its path and the offset.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        positioned::read_exact_at(&self.file, bytes, offset)
            .map_err(|e| Error::from(e).in_file(&self.path).at(offset))
    }
}

/// The one place that maps a file.
#[allow(unsafe_code, reason = "memory maps have no safe constructor")]
fn map_read_only(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private to this module and handed out as `&[u8]` only. Nothing in this process writes
    // through it. Another process that rewrites the file changes the bytes, one that truncates it raises SIGBUS:
    // every reader of mapped checkpoints takes that risk, and output files are written elsewhere and renamed.
    unsafe { Mmap::map(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_read_as_they_are_mapped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), bytes);
        let mut part = [0; 77];
        file.read_at(5_000, &mut part).unwrap();
        assert_eq!(part, bytes[5_000..5_077]);
        for beyond in [99_999, 100_000, u64::MAX] {
            let error = file.read_at(beyond, &mut part).unwrap_err();
            assert_eq!(
                (error.place.path, error.place.offset),
                (Some(path.clone()), Some(beyond))
            );
        }
    }

    /// A file cut while it is mapped is an error of the read, not a signal.
    #[test]
    fn a_file_cut_meanwhile_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, [1; 10_000]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(100)
            .unwrap();
        assert!(file.read_at(5_000, &mut [0; 10]).is_err());
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
