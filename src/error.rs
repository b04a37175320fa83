//! What can go wrong in a conversion: one variant per stage, saying who is at fault.

use std::{io, path::PathBuf};

pub use nemoconv_formats::Place;

/// A result of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// A fact with its place and, where known, its mend. The command line lays the three out.
#[derive(Debug, Clone, Default)]
pub struct Fault {
    /// What is wrong: lower case, no full stop.
    pub what: String,
    /// File, tensor and offset, as far as they apply.
    pub place: Place,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Fault {
    /// A fault without a place.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            ..Self::default()
        }
    }

    /// Names the file.
    pub fn in_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.place.path = Some(path.into());
        self
    }

    /// Names the tensor.
    pub fn in_tensor(mut self, name: impl Into<String>) -> Self {
        self.place.tensor = Some(name.into());
        self
    }

    /// Gives the byte offset.
    pub fn at(mut self, offset: u64) -> Self {
        self.place.offset = Some(offset);
        self
    }

    /// Says how to mend it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(tensor) = &self.place.tensor {
            write!(f, "`{tensor}`: ")?;
        }
        write!(f, "{}", self.what)?;
        if self.place.path.is_some() || self.place.offset.is_some() {
            write!(f, " ({})", self.place)?;
        }
        Ok(())
    }
}

/// Where a network leaves the numbers. Boxed in errors, which are carried by value.
#[derive(Debug, Clone)]
pub struct NotFinite {
    /// The block whose output it is; `None` of the head.
    pub block: Option<usize>,
    /// What computes it.
    pub fault: Fault,
}

impl From<NotFinite> for Error {
    fn from(not_finite: NotFinite) -> Self {
        Self::NotFinite(Box::new(not_finite))
    }
}

/// Everything a conversion can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that was read is not what it should be.
    #[error(transparent)]
    Input(#[from] nemoconv_formats::Error),
    /// The checkpoint is readable, but is not a model this library knows.
    #[error("{0}")]
    Model(Fault),
    /// What was asked for cannot be stored so.
    #[error("{0}")]
    Plan(Fault),
    /// What was asked for contradicts itself, lacks something, or is out of range.
    #[error("{0}")]
    Usage(Fault),
    /// The weights themselves are refused (NaN, infinities, overflow).
    #[error("{0}")]
    Weights(Fault),
    /// The artifact cannot be written.
    #[error("{fault}: {source}")]
    Write {
        /// What was being done, and where.
        fault: Fault,
        /// The operating system's answer.
        source: io::Error,
    },
    /// What was written does not read back as it was sent.
    #[error("{0}")]
    Verify(Fault),
    /// The model cannot be run on what it was given.
    #[error("{0}")]
    Run(Fault),
    /// A network computes a value that is not finite.
    #[error("{}", .0.fault)]
    NotFinite(Box<NotFinite>),
    /// Benchmark data, or results to compare with, cannot be used.
    #[error("{0}")]
    Data(Fault),
    /// The device cannot be used, or no longer.
    #[cfg(feature = "device")]
    #[error("{0}")]
    Device(#[from] nemoconv_device::DeviceError),
    /// A signal asked to stop.
    #[error("interrupted; nothing was left under the final name")]
    Interrupted,
}

impl Error {
    /// File, tensor and offset of the fault, if it has one.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Self::Input(error) => Some(&error.place),
            Self::Model(fault)
            | Self::Plan(fault)
            | Self::Usage(fault)
            | Self::Weights(fault)
            | Self::Verify(fault)
            | Self::Run(fault)
            | Self::Data(fault) => Some(&fault.place),
            Self::NotFinite(not_finite) => Some(&not_finite.fault.place),
            Self::Write { fault, .. } => Some(&fault.place),
            #[cfg(feature = "device")]
            Self::Device(_) => None,
            Self::Interrupted => None,
        }
    }

    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Input(error) => error.hint.as_deref(),
            Self::Model(fault)
            | Self::Plan(fault)
            | Self::Usage(fault)
            | Self::Weights(fault)
            | Self::Verify(fault)
            | Self::Run(fault)
            | Self::Data(fault) => fault.hint.as_deref(),
            Self::NotFinite(not_finite) => not_finite.fault.hint.as_deref(),
            Self::Write { fault, .. } => fault.hint.as_deref(),
            #[cfg(feature = "device")]
            Self::Device(error) => Some(error.hint()),
            Self::Interrupted => None,
        }
    }
}
