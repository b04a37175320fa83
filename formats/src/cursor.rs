//! A position in bytes nobody has checked.
//!
//! Enters: the start of a file. Leaves: little-endian numbers and UTF-8 strings, or the offset where they end early.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        reason = "the bytes read here are untrusted"
    )
)]

use crate::{
    Error, ErrorKind, Result,
    limits::{GGUF_MAX_ARRAY_ELEMENTS, GGUF_MAX_STRING_BYTES},
};

/// Reads forward; every error carries the offset at which the value began.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn at(&self) -> u64 {
        self.at as u64
    }

    /// Whether every byte has been read.
    pub fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// The next `count` bytes, borrowed.
    pub fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let taken = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count))
            .and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        match taken {
            Some((end, bytes)) => {
                self.at = end;
                Ok(bytes)
            }
            None => Err(Error::new(ErrorKind::Truncated {
                expected: self.at().saturating_add(count),
                found: self.bytes.len() as u64,
            })
            .at(self.at())),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    /// One number of `N` bytes.
    pub fn number<const N: usize, T>(&mut self, decode: fn([u8; N]) -> T) -> Result<T> {
        self.array().map(decode)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.number(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.number(u64::from_le_bytes)
    }

    /// `count` numbers of `N` bytes each. Allocates after having seen the bytes.
    pub fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let bytes = self.take(count.saturating_mul(N as u64))?;
        Ok(bytes.as_chunks().0.iter().copied().map(decode).collect())
    }

    /// `count` bytes of UTF-8, borrowed.
    pub fn text(&mut self, count: u64) -> Result<&'a str> {
        let start = self.at();
        let bytes = self.take(count)?;
        std::str::from_utf8(bytes).map_err(|e| {
            Error::malformed("text is not UTF-8").at(start.saturating_add(e.valid_up_to() as u64))
        })
    }

    /// A GGUF string: u64 length, then UTF-8.
    pub fn string(&mut self) -> Result<&'a str> {
        let start = self.at();
        let count = self.u64()?;
        within("string length", GGUF_MAX_STRING_BYTES, count).map_err(|e| e.at(start))?;
        self.text(count)
    }

    /// A u64 count of array elements.
    pub fn count(&mut self) -> Result<u64> {
        let start = self.at();
        let count = self.u64()?;
        within("array length", GGUF_MAX_ARRAY_ELEMENTS, count).map_err(|e| e.at(start))?;
        Ok(count)
    }
}

/// Checks a count from a file against its cap.
pub(crate) fn within(what: &'static str, limit: u64, found: u64) -> Result<()> {
    match found > limit {
        true => Err(Error::new(ErrorKind::Limit { what, limit, found })),
        false => Ok(()),
    }
}
