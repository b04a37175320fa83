//! One error type for every reader and writer here: what is wrong, and where in which file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Where in a file something is wrong. Fields are filled in as the error travels outwards.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The file at fault.
    pub path: Option<PathBuf>,
    /// The tensor or key at fault, spelled as in the file.
    pub tensor: Option<String>,
    /// Byte offset in the file.
    pub offset: Option<u64>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(path) = &self.path {
            write!(f, "{}", path.display())?;
            separator = " ";
        }
        if let Some(offset) = self.offset {
            write!(f, "{separator}at {offset:#x}")?;
        }
        Ok(())
    }
}

/// What is wrong, without the place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The file ends before what its header promises.
    #[error("file is truncated: expected {expected} bytes, found {found}")]
    Truncated {
        /// Bytes the header asks for.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The bytes contradict the format.
    #[error("{0}")]
    Malformed(String),
    /// A count or length above the cap of [`crate::limits`].
    #[error("{what} is {found}, the limit is {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// The cap.
        limit: u64,
        /// The value in the file.
        found: u64,
    },
    /// The format allows it, this reader does not know it.
    #[error("{0}")]
    Unsupported(String),
    /// Something the file refers to does not exist.
    #[error("{0}")]
    Missing(String),
}

/// A fault in a file: the fact, its place, and how to mend it when that is known.
#[derive(Debug)]
pub struct Error {
    /// What is wrong.
    pub kind: ErrorKind,
    /// Where. Boxed because results carry errors by value.
    pub place: Box<Place>,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Error {
    /// An error with an empty place.
    pub fn new(kind: ErrorKind) -> Self {
        Self {
            kind,
            place: Box::default(),
            hint: None,
        }
    }

    /// The bytes contradict the format.
    pub fn malformed(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Malformed(what.into()))
    }

    /// A part of the format that this reader does not know.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported(what.into()))
    }

    /// Something referred to does not exist.
    pub fn missing(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Missing(what.into()))
    }

    /// Names the file, unless it is named already.
    pub fn in_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.place.path.get_or_insert_with(|| path.into());
        self
    }

    /// Says in which folder the file lies that is named without one.
    pub fn in_folder(mut self, folder: &Path) -> Self {
        if let Some(path) = &mut self.place.path {
            *path = folder.join(&*path);
        }
        self
    }

    /// Names the tensor or key, unless it is named already.
    pub fn in_tensor(mut self, name: impl Into<String>) -> Self {
        self.place.tensor.get_or_insert_with(|| name.into());
        self
    }

    /// Gives the byte offset, unless it is given already.
    pub fn at(mut self, offset: u64) -> Self {
        self.place.offset.get_or_insert(offset);
        self
    }

    /// Says how to mend it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::new(ErrorKind::Io(error))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tensor) = &self.place.tensor {
            write!(f, "`{tensor}`: ")?;
        }
        write!(f, "{}", self.kind)?;
        if self.place.path.is_some() || self.place.offset.is_some() {
            write!(f, " ({})", self.place)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ErrorKind::Io(error) => Some(error),
            _ => None,
        }
    }
}
