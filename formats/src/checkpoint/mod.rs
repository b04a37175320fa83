//! Hugging Face checkpoints: safetensors shards with the JSON files beside them.
//!
//! Enters: a folder, a file or a cache entry nobody has checked. Leaves: every tensor's name, type, shape and bytes, the
//! latter mapped and read on demand. Knows no architecture: names mean nothing here.

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

pub mod config_json;
pub mod index_json;
mod locate;
mod shard;

pub use locate::resolve_hub_id;
pub use shard::{Shard, parse_header};

use crate::{Dtype, Error, Result};
use index_json::Index;
use locate::INDEX_FILE;
use serde_json::Value;
use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
};

/// A tensor of a checkpoint; shape and size agree, and the bytes are inside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorEntry {
    /// The name, such as `backbone.layers.0.mixer.in_proj.weight`.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// The shape, slowest dimension first: `[out_features, in_features]` for a matrix.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::shards`] holds it.
    pub shard: usize,
    /// Where it begins, in bytes from the start of its file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl TensorEntry {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.bytes
            .checked_div(self.dtype.bytes() as u64)
            .unwrap_or_default()
    }

    /// The bytes `part` of the tensor, as a range of its file; `None` if they reach past the tensor.
    fn range(&self, part: Range<usize>) -> Option<Range<usize>> {
        let offset = usize::try_from(self.offset).ok()?;
        let within = part.start <= part.end && part.end as u64 <= self.bytes;
        within.then(|| Some(offset.checked_add(part.start)?..offset.checked_add(part.end)?))?
    }
}

/// A checkpoint, its shards mapped and their headers checked.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    revision: Option<String>,
    shards: Vec<Shard>,
    tensors: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a model folder (`model.safetensors`, or an index with its shards, or safetensors files without an index), a
    /// single `.safetensors` file, or an entry `models--org--name` of the hub's cache.
    ///
    /// # Errors
    /// A file is missing, or contradicts the format or the other files; with the path, and tensor and offset where they
    /// are known.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(locate::locate(path)?)
    }

    /// Opens one safetensors file, whatever its name ends in.
    ///
    /// # Errors
    /// It cannot be read, or its header is broken.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::of(locate::file(path))
    }

    fn of(files: locate::Files) -> Result<Self> {
        let mut shards = Vec::new();
        let mut tensors = Vec::new();
        for (number, path) in files.shards.iter().enumerate() {
            let (shard, entries) = Shard::open(path, number)?;
            shards.push(shard);
            tensors.extend(entries);
        }
        let by_name = by_name(&tensors, &shards)?;
        let checkpoint = Self {
            folder: files.folder,
            revision: files.revision,
            shards,
            tensors,
            by_name,
        };
        if let Some(index) = &files.index {
            checkpoint
                .check_index(index)
                .map_err(|e| e.in_file(checkpoint.folder.join(INDEX_FILE)))?;
        }
        Ok(checkpoint)
    }

    /// Every tensor must be where the index says.
    fn check_index(&self, index: &Index) -> Result<()> {
        for (name, shard_name) in &index.weight_map {
            let Some(entry) = self.tensor(name) else {
                return Err(Error::missing(format!(
                    "the index places it in `{shard_name}`, which does not hold it"
                ))
                .in_tensor(name));
            };
            let found = self
                .shards
                .get(entry.shard)
                .and_then(|shard| shard.path().file_name());
            if found.is_none_or(|found| found != shard_name.as_str()) {
                let found = found.unwrap_or_default().display();
                return Err(Error::malformed(format!(
                    "the index places it in `{shard_name}`, found in `{found}`"
                ))
                .in_tensor(name));
            }
        }
        Ok(())
    }

    /// Folder of the shards, of config.json and the tokenizer.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit, where the folder is a snapshot of the hub's cache.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// The safetensors files, sorted by file name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Every tensor, by shard, then by place in the file.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(self.position(name)?)
    }

    /// Where in [`Self::tensors`] the tensor of this name is.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The data of `entry`, row-major, little-endian. Empty for an entry that is not of this checkpoint and reaches
    /// past a file's end.
    pub fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        let whole = usize::try_from(entry.bytes)
            .ok()
            .and_then(|bytes| entry.range(0..bytes));
        let shard = self.shards.get(entry.shard);
        whole
            .and_then(|range| shard?.bytes().get(range))
            .unwrap_or_default()
    }

    /// Fills `bytes` with the tensor's bytes from `start` on.
    ///
    /// # Errors
    /// The part reaches past the tensor, or the shard cannot be read; with path, tensor and offset.
    pub fn read_at(&self, entry: &TensorEntry, start: usize, bytes: &mut [u8]) -> Result<()> {
        let part = start..start.saturating_add(bytes.len());
        let (Some(shard), Some(range)) = (self.shards.get(entry.shard), entry.range(part)) else {
            let what = "a part was asked for that reaches past the tensor";
            return Err(Error::malformed(what).in_tensor(&entry.name));
        };
        let read = shard.file().read_at(range.start as u64, bytes);
        read.map_err(|e| e.in_tensor(&entry.name))
    }

    /// The JSON file `name` of the folder; `None` if there is no such file. Bare infinities and NaN become strings, see
    /// [`config_json::parse`].
    ///
    /// # Errors
    /// The file cannot be read, is longer than [`crate::limits::MAX_JSON_BYTES`], or is not JSON.
    pub fn read_json(&self, name: &str) -> Result<Option<Value>> {
        let text = self.read_text(name)?;
        text.map(|text| config_json::parse(&text).map_err(|e| e.in_file(self.folder.join(name))))
            .transpose()
    }

    /// The text file `name` of the folder; `None` if there is no such file.
    ///
    /// # Errors
    /// The file cannot be read, is longer than [`crate::limits::MAX_JSON_BYTES`], or is not UTF-8.
    pub fn read_text(&self, name: &str) -> Result<Option<String>> {
        locate::read_text(&self.folder.join(name))
    }
}

/// Positions by name; no name may be in two shards.
fn by_name(tensors: &[TensorEntry], shards: &[Shard]) -> Result<HashMap<String, usize>> {
    let path = |entry: &TensorEntry| {
        shards
            .get(entry.shard)
            .map(Shard::path)
            .unwrap_or(Path::new(""))
    };
    let mut by_name = HashMap::with_capacity(tensors.len());
    for (position, entry) in tensors.iter().enumerate() {
        let before = by_name.insert(entry.name.clone(), position);
        if let Some(first) = before.and_then(|before: usize| tensors.get(before)) {
            return Err(
                Error::malformed(format!("tensor is in `{}` too", path(first).display()))
                    .in_tensor(&entry.name)
                    .at(entry.offset)
                    .in_file(path(entry)),
            );
        }
    }
    Ok(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    /// Bytes of a safetensors file of F32 vectors, their values counting from 0.
    fn shard(tensors: &[(&str, usize)]) -> Vec<u8> {
        let mut data = Vec::new();
        let mut entries = Vec::new();
        for (name, length) in tensors {
            let begin = data.len();
            data.extend((0..*length).flat_map(|value| (value as f32).to_le_bytes()));
            let end = data.len();
            entries.push(format!(
                r#""{name}":{{"dtype":"F32","shape":[{length}],"data_offsets":[{begin},{end}]}}"#
            ));
        }
        let header = format!("{{{}}}", entries.join(","));
        [
            &(header.len() as u64).to_le_bytes(),
            header.as_bytes(),
            &data,
        ]
        .concat()
    }

    /// A folder with these files.
    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    const INDEX: &[u8] = br#"{"weight_map":{"z":"m-1.safetensors","a":"m-2.safetensors"}}"#;

    fn names(checkpoint: &Checkpoint) -> Vec<&str> {
        checkpoint
            .tensors()
            .iter()
            .map(|t| t.name.as_str())
            .collect()
    }

    #[track_caller]
    fn check_refused(files: &[(&str, &[u8])], expected: &str) {
        let folder = folder(files);
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert_eq!(
            error
                .to_string()
                .replace(&folder.path().display().to_string(), "DIR"),
            expected
        );
    }

    #[test]
    fn a_single_file_is_read() {
        let folder = folder(&[
            ("model.safetensors", &shard(&[("b", 2), ("a", 3)])),
            ("other.safetensors", b"ignored"),
        ]);
        for path in [
            folder.path().to_owned(),
            folder.path().join("model.safetensors"),
        ] {
            let checkpoint = Checkpoint::open(&path).unwrap();
            assert_eq!(names(&checkpoint), ["b", "a"]);
            assert_eq!(
                (checkpoint.folder(), checkpoint.revision()),
                (folder.path(), None)
            );
            let a = checkpoint.tensor("a").unwrap();
            assert_eq!(
                checkpoint.bytes(a),
                [0f32, 1.0, 2.0].map(f32::to_le_bytes).concat()
            );
            let mut part = [0; 8];
            checkpoint.read_at(a, 4, &mut part).unwrap();
            assert_eq!(part, checkpoint.bytes(a)[4..]);
            for beyond in [5, usize::MAX] {
                assert!(checkpoint.read_at(a, beyond, &mut part).is_err());
            }
            assert_eq!(checkpoint.tensor("c"), None);
        }
    }

    #[test]
    fn shards_are_read_with_and_without_an_index() {
        let (first, second) = (shard(&[("z", 1), ("y", 2)]), shard(&[("a", 3)]));
        let shards = [
            ("m-2.safetensors", &second[..]),
            ("m-1.safetensors", &first[..]),
        ];
        for extra in [None, Some(("model.safetensors.index.json", INDEX))] {
            let files: Vec<_> = shards.into_iter().chain(extra).collect();
            let folder = folder(&files);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(names(&checkpoint), ["z", "y", "a"]);
            assert_eq!(checkpoint.shards().len(), 2);
            assert_eq!(
                checkpoint.bytes(checkpoint.tensor("y").unwrap()),
                [0f32, 1.0].map(f32::to_le_bytes).concat()
            );
        }
    }

    #[test]
    fn a_cache_entry_gives_its_revision() {
        let cache = folder(&[
            ("models--org--name/refs/main", b"c0ffee"),
            (
                "models--org--name/snapshots/c0ffee/model.safetensors",
                &shard(&[("a", 1)]),
            ),
            ("models--org--name/snapshots/older/model.safetensors", b""),
        ]);
        let entry = cache.path().join("models--org--name");
        let snapshot = entry.join("snapshots/c0ffee");
        for path in [entry, snapshot.clone(), snapshot.join("model.safetensors")] {
            let checkpoint = Checkpoint::open(&path).unwrap();
            assert_eq!(
                (checkpoint.folder(), checkpoint.revision()),
                (&*snapshot, Some("c0ffee"))
            );
        }
    }

    #[test]
    fn the_files_beside_are_read() {
        let folder = folder(&[
            ("model.safetensors", &shard(&[])),
            ("config.json", br#"{"time_step_limit": [0.0, Infinity]}"#),
            ("broken.json", b"{\n]"),
            ("binary.txt", b"ab\xff"),
        ]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let config = checkpoint.read_json("config.json").unwrap().unwrap();
        assert_eq!(config["time_step_limit"][1], "Infinity");
        assert_eq!(checkpoint.read_json("absent.json").unwrap(), None);
        assert_eq!(
            checkpoint.read_text("broken.json").unwrap().as_deref(),
            Some("{\n]")
        );
        let at = |error: Error| {
            (
                error.place.path.clone().unwrap(),
                error.place.offset.unwrap(),
            )
        };
        let broken = checkpoint.read_json("broken.json").unwrap_err();
        assert_eq!(at(broken), (folder.path().join("broken.json"), 2));
        let binary = checkpoint.read_text("binary.txt").unwrap_err();
        assert_eq!(at(binary), (folder.path().join("binary.txt"), 2));
    }

    #[test]
    fn what_is_no_checkpoint_is_refused() {
        check_refused(&[], "no safetensors file in this folder (DIR)");
        let folder = folder(&[("model.gguf", b"GGUF"), ("pytorch_model.bin", b"")]);
        let refused = |path: &Path| Checkpoint::open(path).unwrap_err();
        assert!(refused(folder.path()).hint.is_some());
        assert_eq!(
            refused(&folder.path().join("absent")).place.path,
            Some(folder.path().join("absent"))
        );
        let message = refused(&folder.path().join("model.gguf")).to_string();
        assert!(
            message.starts_with("expected a model folder or a `.safetensors` file ("),
            "{message}"
        );
    }

    #[test]
    fn lies_of_shards() {
        let (z, a) = (shard(&[("z", 1)]), shard(&[("a", 3)]));
        let index = ("model.safetensors.index.json", INDEX);
        check_refused(
            &[("m-1.safetensors", &z), index],
            "the index names this shard, but it is not there (DIR/m-2.safetensors)",
        );
        check_refused(
            &[
                ("m-1.safetensors", &z),
                ("m-2.safetensors", &a[..a.len() - 1]),
                index,
            ],
            "`a`: file is truncated: expected 75 bytes, found 74 (DIR/m-2.safetensors at 0xd)",
        );
        check_refused(
            &[
                ("m-1.safetensors", &shard(&[])),
                ("m-2.safetensors", &a),
                index,
            ],
            "`z`: the index places it in `m-1.safetensors`, which does not hold it (DIR/model.safetensors.index.json)",
        );
        check_refused(
            &[("m-1.safetensors", &a), ("m-2.safetensors", &z), index],
            "`z`: the index places it in `m-1.safetensors`, found in `m-2.safetensors` (DIR/model.safetensors.index.json)",
        );
        check_refused(
            &[("m-1.safetensors", &a), ("m-2.safetensors", &a)],
            "`a`: tensor is in `DIR/m-1.safetensors` too (DIR/m-2.safetensors at 0x3f)",
        );
        check_refused(
            &[(
                "model.safetensors.index.json",
                br#"{"weight_map":{"a":"../a"}}"#,
            )],
            "`a`: index places it in `../a`, which is not a plain file name (DIR/model.safetensors.index.json)",
        );
    }
}
