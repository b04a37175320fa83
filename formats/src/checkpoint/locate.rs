//! Where a checkpoint's files are: folders, single files, the hub's cache.
//!
//! Enters: what a user typed. Leaves: a folder, its shards in order, the revision. Makes no request and reads no tensor.
//! The cache layout is huggingface_hub's: `models--org--name/{refs/<branch>, snapshots/<commit>}`.

use super::index_json::{self, Index};
use crate::{Error, Result, limits::MAX_JSON_BYTES};
use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// File name of a checkpoint in one piece.
const SINGLE_FILE: &str = "model.safetensors";

/// File name of the index of a checkpoint in several.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// A branch or commit is one line of a few bytes.
const MAX_REF_BYTES: u64 = 4096;

/// The files of a checkpoint.
#[derive(Debug)]
pub(super) struct Files {
    /// Folder of the shards and of config.json.
    pub folder: PathBuf,
    /// The commit, where the folder is a snapshot of the hub's cache.
    pub revision: Option<String>,
    /// Shards sorted by file name; none of them has been opened.
    pub shards: Vec<PathBuf>,
    /// The index, where there is one.
    pub index: Option<Index>,
}

/// Finds the files of the checkpoint at `path`.
pub(super) fn locate(path: &Path) -> Result<Files> {
    let metadata = fs::metadata(path).map_err(|e| Error::from(e).in_file(path))?;
    if !metadata.is_dir() {
        return single_file(path);
    }
    let folder = match path.join("snapshots").is_dir() {
        true => snapshot(path, None)?,
        false => path.to_owned(),
    };
    let (shards, index) = shards(&folder)?;
    Ok(Files {
        revision: revision(&folder),
        folder,
        shards,
        index,
    })
}

fn single_file(path: &Path) -> Result<Files> {
    if path
        .extension()
        .is_none_or(|extension| extension != "safetensors")
    {
        return Err(
            Error::unsupported("expected a model folder or a `.safetensors` file").in_file(path),
        );
    }
    Ok(file(path))
}

/// A checkpoint of one file.
pub(super) fn file(path: &Path) -> Files {
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Files {
        revision: revision(&folder),
        folder,
        shards: vec![path.to_owned()],
        index: None,
    }
}

/// The commit that a folder of the hub's cache is named after.
fn revision(folder: &Path) -> Option<String> {
    let folder = fs::canonicalize(folder).ok()?;
    let parent = folder.parent()?.file_name()?;
    (parent == "snapshots").then(|| folder.file_name()?.to_str().map(str::to_owned))?
}

/// `model.safetensors`, else what the index names, else every safetensors file.
fn shards(folder: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let single = folder.join(SINGLE_FILE);
    if single.exists() {
        return Ok((vec![single], None));
    }
    let index_path = folder.join(INDEX_FILE);
    if let Some(text) = read_text(&index_path)? {
        let index = index_json::parse(&text).map_err(|e| e.in_file(&index_path))?;
        let names: BTreeSet<&str> = index
            .weight_map
            .iter()
            .map(|(_, shard)| shard.as_str())
            .collect();
        let shards: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        check_complete(&shards)?;
        return Ok((shards, Some(index)));
    }
    let shards = safetensors_files(folder)?;
    match shards.is_empty() {
        true => Err(no_shards(folder)),
        false => Ok((shards, None)),
    }
}

fn check_complete(shards: &[PathBuf]) -> Result<()> {
    match shards.iter().find(|shard| !shard.exists()) {
        None => Ok(()),
        Some(shard) => Err(
            Error::missing("the index names this shard, but it is not there")
                .in_file(shard)
                .hint("the download may be incomplete: fetch the checkpoint again"),
        ),
    }
}

fn no_shards(folder: &Path) -> Error {
    let error = Error::missing("no safetensors file in this folder").in_file(folder);
    match folder.join("pytorch_model.bin").exists()
        || folder.join("pytorch_model.bin.index.json").exists()
    {
        true => error.hint("it has PyTorch weights: save them as safetensors first"),
        false => error,
    }
}

/// Every `*.safetensors` of `folder`, sorted by name.
fn safetensors_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut files: Vec<PathBuf> = entries
        .map_err(|e| Error::from(e).in_file(folder))?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .collect();
    files.sort();
    Ok(files)
}

/// The snapshot folder of the cache entry `entry`: of `revision`, else of the branch `main`, else the only one.
fn snapshot(entry: &Path, revision: Option<&str>) -> Result<PathBuf> {
    let snapshots = entry.join("snapshots");
    let commit = read_ref(entry, revision.unwrap_or("main"))?;
    if let Some(name) = commit.as_deref().or(revision) {
        let folder = snapshots.join(name);
        return match is_plain(name) && folder.is_dir() {
            true => Ok(folder),
            false => {
                Err(Error::missing(format!("no snapshot of revision `{name}`")).in_file(entry))
            }
        };
    }
    let entries = fs::read_dir(&snapshots).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut found: Vec<PathBuf> = entries
        .map_err(|e| Error::from(e).in_file(&snapshots))?
        .iter()
        .map(fs::DirEntry::path)
        .collect();
    found.retain(|path| path.is_dir());
    match found.pop() {
        None => Err(Error::missing("no snapshot in this cache entry").in_file(entry)),
        Some(only) if found.is_empty() => Ok(only),
        Some(_) => Err(
            Error::missing("several snapshots and no `refs/main` to choose one")
                .in_file(entry)
                .hint("give the folder of one snapshot"),
        ),
    }
}

/// The commit that branch or tag `name` stands for, if the cache knows it.
fn read_ref(entry: &Path, name: &str) -> Result<Option<String>> {
    let path = entry.join("refs").join(name);
    if !name.split('/').all(is_plain) || !path.is_file() {
        return Ok(None);
    }
    let text = read_capped(&path, MAX_REF_BYTES)?;
    Ok(text.map(|text| text.trim().to_owned()))
}

/// Whether `name` is one ordinary path component.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\'])
}

/// The snapshot folder of hub id `org/name`, `org/name@branch` or `org/name@commit` in the hub's cache. No request is
/// made.
///
/// The cache is `HF_HUB_CACHE`, else `HF_HOME/hub`, else `huggingface/hub` in `XDG_CACHE_HOME` or `~/.cache`.
///
/// # Errors
/// `id` has another form, or the cache does not hold it; then the hint says what fetches it.
pub fn resolve_hub_id(id: &str) -> Result<PathBuf> {
    resolve_in(hub_cache(|name| std::env::var_os(name)), id)
}

fn resolve_in(cache: Option<PathBuf>, id: &str) -> Result<PathBuf> {
    let (repository, revision) = id
        .split_once('@')
        .map_or((id, None), |(id, revision)| (id, Some(revision)));
    let Some((org, name)) = repository
        .split_once('/')
        .filter(|(org, name)| is_plain(org) && is_plain(name))
    else {
        return Err(Error::malformed(format!(
            "`{id}` is neither a path nor a hub id of the form `org/name[@revision]`"
        )));
    };
    let fetch = match revision {
        None => format!("fetch it with `hf download {repository}`"),
        Some(revision) => format!("fetch it with `hf download {repository} --revision {revision}`"),
    };
    let absent = || Error::missing(format!("`{id}` is not in the hub's cache")).hint(&fetch);
    let cache = cache.ok_or_else(absent)?;
    let entry = cache.join(format!("models--{org}--{name}"));
    if !entry.join("snapshots").is_dir() {
        return Err(absent().in_file(cache));
    }
    snapshot(&entry, revision).map_err(|e| e.hint(&fetch))
}

/// The hub's cache folder, from environment variables.
fn hub_cache(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name: &str| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || folder("HOME").or_else(|| folder("USERPROFILE"));
    let cache = || folder("XDG_CACHE_HOME").or_else(|| Some(home()?.join(".cache")));
    folder("HF_HUB_CACHE")
        .or_else(|| Some(folder("HF_HOME")?.join("hub")))
        .or_else(|| Some(cache()?.join("huggingface").join("hub")))
}

/// The text of a file of at most [`MAX_JSON_BYTES`]; `None` if there is no such file.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    read_capped(path, MAX_JSON_BYTES)
}

fn read_capped(path: &Path, limit: u64) -> Result<Option<String>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| Error::from(e).in_file(path))?,
    };
    let mut bytes = Vec::new();
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|e| Error::from(e).in_file(path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::unsupported(format!("file is longer than {limit} bytes")).in_file(path));
    }
    String::from_utf8(bytes).map(Some).map_err(|e| {
        Error::malformed("text is not UTF-8")
            .at(e.utf8_error().valid_up_to() as u64)
            .in_file(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A cache with one entry, its snapshots, and `refs/main` if given.
    fn cache(snapshots: &[&str], main: Option<&str>) -> TempDir {
        let cache = tempfile::tempdir().unwrap();
        let entry = cache.path().join("models--org--name");
        for snapshot in snapshots {
            fs::create_dir_all(entry.join("snapshots").join(snapshot)).unwrap();
        }
        fs::create_dir_all(entry.join("refs/refs/pr")).unwrap();
        fs::write(entry.join("refs/refs/pr/1"), "bbb").unwrap();
        if let Some(main) = main {
            fs::write(entry.join("refs/main"), main).unwrap();
        }
        cache
    }

    /// The name of the snapshot that `id` resolves to, or the error and its hint.
    #[track_caller]
    fn check(cache: &TempDir, id: &str, expected: std::result::Result<&str, (&str, &str)>) {
        let found = resolve_in(Some(cache.path().to_owned()), id);
        let root = cache.path().display().to_string();
        match (found, expected) {
            (Ok(folder), Ok(name)) => {
                assert_eq!(
                    folder,
                    cache.path().join("models--org--name/snapshots").join(name)
                );
            }
            (Err(error), Err((message, hint))) => {
                assert_eq!(error.to_string().replace(&root, "CACHE"), message);
                assert_eq!(error.hint.unwrap_or_default(), hint);
            }
            (found, expected) => panic!("found {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn a_hub_id_names_a_snapshot() {
        let two = cache(&["aaa", "bbb"], Some("aaa\n"));
        check(&two, "org/name", Ok("aaa"));
        check(&two, "org/name@bbb", Ok("bbb"));
        check(&two, "org/name@main", Ok("aaa"));
        check(&two, "org/name@refs/pr/1", Ok("bbb"));
        check(&cache(&["ccc"], None), "org/name", Ok("ccc"));
    }

    #[test]
    fn what_is_not_cached_says_what_fetches_it() {
        let one = cache(&["aaa"], Some("aaa"));
        check(
            &one,
            "org/other",
            Err((
                "`org/other` is not in the hub's cache (CACHE)",
                "fetch it with `hf download org/other`",
            )),
        );
        check(
            &one,
            "org/name@v2",
            Err((
                "no snapshot of revision `v2` (CACHE/models--org--name)",
                "fetch it with `hf download org/name --revision v2`",
            )),
        );
        check(
            &cache(&["aaa"], Some("gone")),
            "org/name",
            Err((
                "no snapshot of revision `gone` (CACHE/models--org--name)",
                "fetch it with `hf download org/name`",
            )),
        );
    }

    #[test]
    fn what_is_no_hub_id_is_refused() {
        let one = cache(&["aaa"], Some("../../.."));
        for id in ["name", "a/b/c", "../name", "org/..", "/name", "org/", ""] {
            let message =
                format!("`{id}` is neither a path nor a hub id of the form `org/name[@revision]`");
            check(&one, id, Err((&message, "")));
        }
        let hint = "fetch it with `hf download org/name`";
        check(
            &one,
            "org/name",
            Err((
                "no snapshot of revision `../../..` (CACHE/models--org--name)",
                hint,
            )),
        );
    }

    #[test]
    fn the_cache_follows_the_environment() {
        let check = |variables: &[(&str, &str)], expected: Option<&str>| {
            let found =
                hub_cache(|name| Some(variables.iter().find(|(n, _)| *n == name)?.1.into()));
            assert_eq!(found, expected.map(PathBuf::from));
        };
        check(&[], None);
        check(&[("HOME", "/h")], Some("/h/.cache/huggingface/hub"));
        check(
            &[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")],
            Some("/x/huggingface/hub"),
        );
        check(&[("HOME", "/h"), ("HF_HOME", "/f")], Some("/f/hub"));
        check(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")], Some("/c"));
        check(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/f")], Some("/f/hub"));
    }

    #[test]
    fn several_snapshots_need_a_choice() {
        let two = cache(&["aaa", "bbb"], None);
        let error = locate(&two.path().join("models--org--name")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("several snapshots and no `refs/main`"),
            "{error}"
        );
    }
}
