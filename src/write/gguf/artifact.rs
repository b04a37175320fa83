//! Files that appear whole: written under temporary names, synced, re-read, renamed.
//!
//! Enters: [`Parts`] and bytes at offsets, from any thread in any order. Leaves: files under their final
//! names, or none. Knows nothing of what the bytes mean.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nemoconv_formats::gguf::Gguf;
use nemoconv_formats::positioned::{read_exact_at, write_all_at};
use tempfile::NamedTempFile;

use super::parts::Parts;
use crate::error::{Error, Fault, Result};

/// Files being written. Dropping it removes them.
#[derive(Debug)]
pub struct Artifact<'a> {
    parts: &'a Parts,
    files: Vec<NamedTempFile>,
}

impl<'a> Artifact<'a> {
    /// Opens a temporary sibling for every part, writes the headers and reserves the lengths.
    ///
    /// # Errors
    /// A folder that cannot be written to, or has too little space.
    pub fn create(parts: &'a Parts) -> Result<Self> {
        check_space(parts)?;
        let mut files = Vec::new();
        for part in &parts.parts {
            let file = create_sibling(&part.path)?;
            let header = part.layout.header_bytes();
            let reserve = || {
                file.as_file().set_len(part.layout.file_bytes())?;
                write_all_at(file.as_file(), header, 0)
            };
            reserve().map_err(|source| write_error(&part.path, source))?;
            files.push(file);
        }
        Ok(Self { parts, files })
    }

    /// Writes `bytes` at `offset` of a part.
    ///
    /// # Errors
    /// The system refuses, most often for want of space.
    pub fn write_at(&self, part: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(self.files[part].as_file(), bytes, offset)
            .map_err(|source| write_error(&self.parts.parts[part].path, source))
    }

    /// Reads back what was written.
    ///
    /// # Errors
    /// The system refuses.
    pub fn read_at(&self, part: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        read_exact_at(self.files[part].as_file(), bytes, offset)
            .map_err(|source| write_error(&self.parts.parts[part].path, source))
    }

    /// Forces everything to the disk and parses every header again.
    ///
    /// # Errors
    /// The system refuses, or a header does not read back.
    pub fn sync(&self) -> Result<()> {
        for (file, part) in self.files.iter().zip(&self.parts.parts) {
            file.as_file()
                .sync_all()
                .map_err(|source| write_error(&part.path, source))?;
            let gguf = Gguf::open(file.path())?;
            if gguf.header().tensors.len() != part.layout.tensor_count() {
                let fault = Fault::new("the header does not read back as it was written");
                return Err(Error::Verify(fault.in_file(&part.path)));
            }
        }
        Ok(())
    }

    /// Gives the files their final names, the first part last: a set is complete when it can be opened.
    ///
    /// # Errors
    /// The system refuses a rename.
    pub fn publish(self) -> Result<Vec<PathBuf>> {
        for (file, part) in self.files.into_iter().zip(&self.parts.parts).rev() {
            file.persist(&part.path)
                .map_err(|error| write_error(&part.path, error.error))?;
            sync_folder(&part.path);
        }
        Ok(self
            .parts
            .parts
            .iter()
            .map(|part| part.path.clone())
            .collect())
    }
}

/// A temporary file beside `path`, readable by whoever may read other new files.
pub fn create_sibling(path: &Path) -> Result<NamedTempFile> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.");
    builder.prefix(&prefix).suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder_of(path)).map_err(|source| {
        let fault = Fault::new("cannot create a file in the output folder")
            .in_file(folder_of(path))
            .hint("check that the folder exists and is writable, or name another");
        Error::Write { fault, source }
    })
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Fails early where the disk is plainly too small; a disk that fills up meanwhile fails the write.
fn check_space(parts: &Parts) -> Result<()> {
    let Some(first) = parts.parts.first() else {
        return Ok(());
    };
    let Ok(free) = fs4::available_space(folder_of(&first.path)) else {
        return Ok(());
    };
    let needed = parts.file_bytes();
    if free < needed {
        let fault = Fault::new(format!("{needed} bytes are needed, {free} are free"))
            .in_file(folder_of(&first.path))
            .hint("free some space or choose another `--outfile`");
        return Err(Error::Write {
            fault,
            source: io::ErrorKind::StorageFull.into(),
        });
    }
    Ok(())
}

fn write_error(path: &Path, source: io::Error) -> Error {
    let mut fault = Fault::new("cannot write").in_file(path);
    if source.kind() == io::ErrorKind::StorageFull {
        fault = fault.hint("free some space or choose another `--outfile`");
    }
    Error::Write { fault, source }
}

/// Makes a rename durable; a system that cannot sync folders loses nothing but that.
fn sync_folder(path: &Path) {
    if let Ok(folder) = File::open(folder_of(path)) {
        let _ = folder.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::gguf::parts::SplitLimits;
    use nemoconv_formats::GgmlType;
    use nemoconv_formats::gguf::{Metadata, NewTensor};

    fn parts(outfile: &Path) -> Parts {
        let tensor = NewTensor {
            name: "a.weight".into(),
            dims: vec![32],
            ty: GgmlType::F32,
        };
        Parts::new(
            outfile,
            &Metadata::new(),
            vec![tensor],
            SplitLimits::default(),
        )
        .unwrap()
    }

    #[test]
    fn nothing_is_left_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let parts = parts(&folder.path().join("m.gguf"));
        drop(Artifact::create(&parts).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_published_file_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let parts = parts(&path);
        let artifact = Artifact::create(&parts).unwrap();
        artifact
            .write_at(0, parts.slots[0].offset, &[7; 128])
            .unwrap();
        artifact.sync().unwrap();
        assert_eq!(artifact.publish().unwrap(), std::slice::from_ref(&path));
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.tensor_bytes(&gguf.header().tensors[0]), [7; 128]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let parts = parts(Path::new("/nonexistent-folder/m.gguf"));
        let error = Artifact::create(&parts).unwrap_err();
        assert!(error.to_string().contains("/nonexistent-folder"), "{error}");
    }
}
