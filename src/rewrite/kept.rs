//! Arrays that are wanted again much later: large ones wait in a nameless file, so that memory is there for one block.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::error::{Error, Fault, Result};

/// Values that stay in memory at most.
const SMALL: usize = 1 << 21;

/// F64 values, in memory or in a file.
#[derive(Debug, Clone)]
pub struct Kept(Place);

#[derive(Debug, Clone)]
enum Place {
    Memory(Vec<f64>),
    /// How many there are.
    File(Arc<File>, usize),
}

impl Kept {
    /// Puts values away, large arrays in a file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(values: Vec<f64>) -> Result<Self> {
        match values.len() <= SMALL {
            true => Ok(values.into()),
            false => Self::in_file(&values),
        }
    }

    fn in_file(values: &[f64]) -> Result<Self> {
        let write = || {
            let file = tempfile::tempfile()?;
            file.write_all_at(bytemuck::cast_slice(values), 0)?;
            Ok(file)
        };
        let file = write().map_err(failed)?;
        Ok(Self(Place::File(Arc::new(file), values.len())))
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Memory(values) => values.len(),
            Place::File(_, len) => *len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self) -> Result<Cow<'_, [f64]>> {
        match &self.0 {
            Place::Memory(values) => Ok(values.into()),
            Place::File(file, len) => {
                let mut values = vec![0.0; *len];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                file.read_exact_at(bytes, 0).map_err(failed)?;
                Ok(values.into())
            }
        }
    }

    /// Bytes of memory that so many values take while they are put away.
    pub fn held_bytes(values: u64) -> u64 {
        match values <= SMALL as u64 {
            true => 8 * values,
            false => 0,
        }
    }
}

impl From<Vec<f64>> for Kept {
    fn from(values: Vec<f64>) -> Self {
        Self(Place::Memory(values))
    }
}

/// The same values; what cannot be read equals nothing.
impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        matches!((self.read(), other.read()), (Ok(a), Ok(b)) if a == b)
    }
}

fn failed(source: std::io::Error) -> Error {
    let fault = Fault::new("cannot keep statistics in a temporary file");
    Error::Write {
        fault: fault.hint("set TMPDIR to a folder with room"),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_from_memory_and_file() {
        let values: Vec<f64> = (0..9).map(f64::from).collect();
        let (held, filed) = (Kept::from(values.clone()), Kept::in_file(&values).unwrap());
        assert_eq!(filed.read().unwrap(), values);
        assert!(filed.len() == 9 && !filed.is_empty() && held == filed);
        let other = Kept::in_file(&values[1..]).unwrap();
        assert!(held != other);
        assert!(matches!(Kept::new(values).unwrap().0, Place::Memory(_)));
        let large = Kept::new(vec![1.5; SMALL + 1]).unwrap();
        assert!(matches!(large.0, Place::File(..)));
        assert_eq!(large.read().unwrap()[SMALL], 1.5);
    }
}
