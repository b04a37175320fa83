//! Reads and writes at an offset, from any thread, without a shared cursor.

use std::{fs::File, io};

/// Fills `bytes` from `offset` on.
///
/// # Errors
/// The system refuses, or the file ends before (`UnexpectedEof`).
#[cfg(unix)]
pub fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Writes all of `bytes` from `offset` on.
///
/// # Errors
/// The system refuses.
#[cfg(unix)]
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Fills `bytes` from `offset` on.
///
/// # Errors
/// The system refuses, or the file ends before (`UnexpectedEof`).
#[cfg(windows)]
pub fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = bytes.split_at_mut(count).1;
        offset = offset.saturating_add(count as u64);
    }
    Ok(())
}

/// Writes all of `bytes` from `offset` on.
///
/// # Errors
/// The system refuses.
#[cfg(windows)]
pub fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.split_at(count).1;
        offset = offset.saturating_add(count as u64);
    }
    Ok(())
}
