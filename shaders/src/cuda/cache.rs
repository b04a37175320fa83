//! Machine code of earlier runs, in the user's cache folder.
//!
//! Enters: what determines a compilation. Leaves: its result, from the folder or compiled. A folder that cannot be read or
//! written costs time and nothing else.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::Result;

/// A folder with one file per kernel, architecture and version of the compiler.
#[derive(Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

/// Bytes of SHA-256 before the machine code.
const DIGEST: usize = 32;

impl Cache {
    /// `nemoconv/kernels` where the user keeps such things.
    pub fn of_user() -> Self {
        let absolute = |name| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let base = match cfg!(windows) {
            true => absolute("LOCALAPPDATA"),
            false => absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache"))),
        };
        Self {
            folder: base.map(|base| base.join("nemoconv").join("kernels")),
        }
    }

    /// What was kept for these ingredients, or else what `compile` gives, which is kept.
    ///
    /// # Errors
    /// Those of `compile`.
    pub fn get_or(
        &self,
        ingredients: &[&str],
        compile: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let path = self.path(ingredients);
        if let Some(kept) = path.as_deref().and_then(read) {
            return Ok(kept);
        }
        let code = compile()?;
        if let Some(path) = path {
            // The next run compiles again.
            let _ = write(&path, &code);
        }
        Ok(code)
    }

    /// Takes an entry away that turned out to be useless.
    pub fn forget(&self, ingredients: &[&str]) {
        if let Some(path) = self.path(ingredients) {
            // Then the entry is overwritten, or used in vain again.
            let _ = fs::remove_file(path);
        }
    }

    fn path(&self, ingredients: &[&str]) -> Option<PathBuf> {
        let mut hash = Sha256::new();
        for ingredient in ingredients {
            hash.update((ingredient.len() as u64).to_le_bytes());
            hash.update(ingredient);
        }
        let name: String = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Some(self.folder.as_ref()?.join(name).with_extension("cubin"))
    }
}

/// The content of an entry, if it is what was written.
fn read(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (digest, code) = bytes.split_at_checked(DIGEST)?;
    (Sha256::digest(code).as_slice() == digest).then(|| code.to_vec())
}

/// Whole or not at all: other processes may read and write at the same time.
fn write(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let content = [Sha256::digest(code).as_slice(), code].concat();
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of this test alone.
    fn cache(name: &str) -> Cache {
        let folder = env::temp_dir().join(format!("nemoconv-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        Cache {
            folder: Some(folder),
        }
    }

    #[test]
    fn entries_are_found_again() {
        let cache = cache("found");
        assert_eq!(
            cache.get_or(&["a", "bc"], || Ok(vec![1, 2, 3])).unwrap(),
            [1, 2, 3]
        );
        let kept = cache
            .get_or(&["a", "bc"], || panic!("compiled twice"))
            .unwrap();
        assert_eq!(kept, [1, 2, 3]);
        // Other ingredients, although joined they are the same.
        assert_eq!(cache.get_or(&["ab", "c"], || Ok(vec![4])).unwrap(), [4]);
        cache.forget(&["a", "bc"]);
        assert_eq!(cache.get_or(&["a", "bc"], || Ok(vec![5])).unwrap(), [5]);
        fs::remove_dir_all(cache.folder.unwrap()).unwrap();
    }

    #[test]
    fn corrupt_entries_are_compiled_again() {
        let cache = cache("corrupt");
        cache.get_or(&["a"], || Ok(vec![1, 2, 3])).unwrap();
        let path = cache.path(&["a"]).unwrap();
        for damaged in [vec![], vec![7; 10], vec![7; 40]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.get_or(&["a"], || Ok(vec![9])).unwrap(), [9]);
            assert_eq!(read(&path).unwrap(), [9]);
        }
        fs::remove_dir_all(cache.folder.unwrap()).unwrap();
    }

    #[test]
    fn without_a_folder_everything_is_compiled() {
        let cache = Cache { folder: None };
        assert_eq!(cache.get_or(&["a"], || Ok(vec![1])).unwrap(), [1]);
        assert_eq!(cache.get_or(&["a"], || Ok(vec![2])).unwrap(), [2]);
    }
}
