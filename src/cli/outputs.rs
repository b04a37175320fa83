//! Output paths are tried before the long run: a file can be made there, and its name is free for one.

use std::path::Path;

use nemoconv::error::{Error, Fault, Result};
use nemoconv::write::gguf::artifact::create_sibling;

/// Refuses a path, given by `flag`, under which no file can be written.
pub fn try_file(flag: &str, path: Option<&Path>) -> Result<()> {
    let Some(path) = path else {
        return Ok(());
    };
    if path.is_dir() {
        let what = format!("`{flag}` must name a file, found a folder");
        let fault = Fault::new(what).in_file(path);
        return Err(Error::Plan(fault.hint("add the name of a file to it")));
    }
    try_sibling(flag, path)
}

/// Refuses a path, given by `flag`, beside which nothing can be written.
pub fn try_sibling(flag: &str, path: &Path) -> Result<()> {
    let tried = create_sibling(path).map(drop);
    tried.map_err(|error| match error {
        Error::Write { mut fault, source } => {
            fault.what = format!("{} of `{flag}`", fault.what);
            Error::Write { fault, source }
        }
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_what_lies_in_none_are_refused_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let check = |name: &str, expected: Option<&str>| {
            let tried = try_file("--html", Some(&folder.path().join(name)));
            let said = tried.err().map(|error| error.to_string());
            assert_eq!(said.is_some(), expected.is_some(), "{said:?}");
            assert!(
                said.unwrap_or_default()
                    .contains(expected.unwrap_or_default())
            );
        };
        check("report.html", None);
        check("", Some("`--html` must name a file, found a folder"));
        check("absent/report.html", Some("output folder of `--html`"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
