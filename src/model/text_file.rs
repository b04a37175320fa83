//! Small files of a checkpoint folder, read whole.
//!
//! Enters: a path that need not exist. Leaves: its bytes or text, at most
//! [`MAX_JSON_BYTES`]. Interprets nothing.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use nemoconv_formats::limits::MAX_JSON_BYTES;
use nemoconv_formats::{Error, ErrorKind, Result};

/// The bytes of `path`, or `None` if there is no such file.
pub(crate) fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(MAX_JSON_BYTES + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| Error::from(error).in_file(path))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        let limit = ErrorKind::Limit {
            what: "file size in bytes",
            limit: MAX_JSON_BYTES,
            found: path
                .metadata()
                .map_or(bytes.len() as u64, |metadata| metadata.len()),
        };
        return Err(Error::new(limit).in_file(path));
    }
    Ok(Some(bytes))
}

/// The text of `path` with every line end as `\n`, as Python's text mode reads it.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = read_file(path)? else {
        return Ok(None);
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to() as u64;
        Error::malformed("text is not UTF-8").in_file(path).at(at)
    })?;
    Ok(Some(if text.contains('\r') {
        text.replace("\r\n", "\n").replace('\r', "\n")
    } else {
        text
    }))
}
