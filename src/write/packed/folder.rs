//! A model folder that appears whole or not at all: written under another name beside, then renamed.
//!
//! Enters: the layout of its shards, bytes at offsets from any thread, files of the checkpoint. Leaves: the folder. What a
//! killed run left is removed by the next.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::positioned::{read_exact_at, write_all_at};
use serde_json::{Value, json};

use super::config_text::with_quantization_config;
use crate::error::{Error, Fault, Result};
use crate::plan::packed::{PackedPlan, ShardLayout};

/// Names in a folder that hold weights or what is written anew.
const NOT_CARRIED: [&str; 5] = [
    "config.json",
    "model.safetensors.index.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "receipt.json",
];
/// Ends of names that are carried over: tokenizer, generation settings, templates, code, licences.
const CARRIED: [&str; 6] = [".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"];
/// Largest file that is carried over; weights are larger.
const MAX_CARRIED_BYTES: u64 = 256 << 20;

/// A folder being written. Dropping it removes it.
#[derive(Debug)]
pub struct PackedFolder {
    target: PathBuf,
    partial: PathBuf,
    shards: Vec<File>,
    /// Held as long as the folder is written.
    _lock: File,
}

impl PackedFolder {
    /// Opens the folder under its other name, writes headers and reserves lengths.
    ///
    /// # Errors
    /// The target exists and is not empty, its parent cannot be written to or has too little space, another run is writing
    /// the same.
    pub fn create(target: &Path, shards: &[ShardLayout]) -> Result<Self> {
        check_target(target)?;
        let parent = parent_of(target);
        let bytes = shards.iter().map(ShardLayout::file_bytes).sum::<u64>();
        check_space(parent, bytes)?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = parent.join(format!(".{name}.partial"));
        let failed = |source| write_error("cannot create a folder", &partial, source);
        fs::create_dir_all(&partial).map_err(failed)?;
        let lock = File::create(partial.join(".lock")).map_err(failed)?;
        if fs4::FileExt::try_lock(&lock).is_err() {
            let fault = Fault::new("another run is writing this folder").in_file(target);
            return Err(Error::Plan(
                fault.hint("wait for it, or choose another `--outdir`"),
            ));
        }
        let mut folder = Self {
            target: target.to_owned(),
            partial,
            shards: Vec::new(),
            _lock: lock,
        };
        folder.clear()?;
        for shard in shards {
            let file = folder.create_shard(shard)?;
            folder.shards.push(file);
        }
        Ok(folder)
    }

    /// Removes what a killed run left.
    fn clear(&self) -> Result<()> {
        let failed = |source| write_error("cannot clear", &self.partial, source);
        for entry in fs::read_dir(&self.partial).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.file_name().is_some_and(|name| name != ".lock") {
                fs::remove_file(&path).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn create_shard(&self, shard: &ShardLayout) -> Result<File> {
        let path = self.partial.join(&shard.name);
        let create = || {
            let mut options = File::options();
            let file = options
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            file.set_len(shard.file_bytes())?;
            write_all_at(&file, &shard.header, 0)?;
            Ok(file)
        };
        create().map_err(|source| write_error("cannot write", &path, source))
    }

    /// Writes `bytes` at `offset` of a shard.
    ///
    /// # Errors
    /// The system refuses, most often for want of space.
    pub fn write_at(&self, shard: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(&self.shards[shard], bytes, offset)
            .map_err(|source| write_error("cannot write", &self.target, source))
    }

    /// Reads back what was written.
    ///
    /// # Errors
    /// The system refuses.
    pub fn read_at(&self, shard: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        read_exact_at(&self.shards[shard], bytes, offset)
            .map_err(|source| write_error("cannot read back", &self.target, source))
    }

    /// Writes a file of its own.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        fs::write(&path, bytes).map_err(|source| write_error("cannot write", &path, source))
    }

    /// Writes everything that is no shard: the index, `config.json` with its new key, files of the checkpoint as they are.
    ///
    /// # Errors
    /// A file cannot be read or written, `config.json` is no object.
    pub fn write_companions(&self, checkpoint: &Checkpoint, plan: &PackedPlan) -> Result<()> {
        if let [_, _, ..] = plan.shards.as_slice() {
            let index = serde_json::to_string_pretty(&index_json(plan)).unwrap_or_default();
            self.write_file("model.safetensors.index.json", index.as_bytes())?;
        }
        let no_object = || {
            let fault = Fault::new("is no JSON object");
            Error::Model(fault.in_file(checkpoint.folder().join("config.json")))
        };
        let config = checkpoint.read_text("config.json")?.ok_or_else(no_object)?;
        let config = with_quantization_config(&config, &plan.quantization_config);
        self.write_file("config.json", config.ok_or_else(no_object)?.as_bytes())?;
        if plan.quantization_config["quant_method"] == "gptq" {
            let text = serde_json::to_string_pretty(&plan.quantization_config).unwrap_or_default();
            self.write_file("quantize_config.json", text.as_bytes())?;
        }
        self.carry_over(checkpoint.folder())
    }

    fn carry_over(&self, source: &Path) -> Result<()> {
        let failed = |source| write_error("cannot copy", &self.partial, source);
        let Ok(entries) = fs::read_dir(source) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Follows the links of a hub cache.
            let is_file = fs::metadata(entry.path())
                .is_ok_and(|found| found.is_file() && found.len() <= MAX_CARRIED_BYTES);
            let is_licence = ["LICENSE", "NOTICE"]
                .iter()
                .any(|start| name.starts_with(start));
            let wanted = CARRIED.iter().any(|end| name.ends_with(end)) || is_licence;
            if is_file && wanted && !NOT_CARRIED.contains(&name.as_str()) {
                fs::copy(entry.path(), self.partial.join(&name)).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Forces the shards to the disk and reads every header again.
    ///
    /// # Errors
    /// The system refuses, or a header does not read back.
    pub fn sync(&self, plan: &PackedPlan) -> Result<()> {
        for (file, shard) in self.shards.iter().zip(&plan.shards) {
            let path = self.partial.join(&shard.name);
            file.sync_all()
                .map_err(|source| write_error("cannot write", &path, source))?;
        }
        let written = Checkpoint::open(&self.partial)?;
        if written.tensors().len() == plan.tensors.len() {
            return Ok(());
        }
        let fault = Fault::new("the headers do not read back as they were written");
        Err(Error::Verify(fault.in_file(&self.partial)))
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// The system refuses.
    pub fn publish(self) -> Result<PathBuf> {
        let failed = |source| write_error("cannot rename to", &self.target, source);
        fs::remove_file(self.partial.join(".lock")).map_err(failed)?;
        if self.target.exists() {
            fs::remove_dir(&self.target).map_err(failed)?;
        }
        fs::rename(&self.partial, &self.target).map_err(failed)?;
        if let Ok(parent) = File::open(parent_of(&self.target)) {
            // A system that cannot sync folders loses nothing but durability of the name.
            let _ = parent.sync_all();
        }
        Ok(self.target.clone())
    }
}

impl Drop for PackedFolder {
    fn drop(&mut self) {
        // After a rename there is nothing under this name.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

fn index_json(plan: &PackedPlan) -> Value {
    let mut names: Vec<(&str, &str)> = plan
        .shards
        .iter()
        .flat_map(|shard| shard.slots.iter().map(move |(index, _)| (*index, shard)))
        .map(|(index, shard)| (plan.tensors[index].name.as_str(), shard.name.as_str()))
        .collect();
    names.sort_unstable();
    let weight_map: serde_json::Map<String, Value> = names
        .into_iter()
        .map(|(tensor, shard)| (tensor.to_string(), shard.into()))
        .collect();
    json!({ "metadata": { "total_size": plan.tensor_bytes() }, "weight_map": weight_map })
}

/// The target must not hold anything yet.
pub fn check_target(target: &Path) -> Result<()> {
    let is_empty = match fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    if is_empty {
        return Ok(());
    }
    let fault = Fault::new("exists and is not an empty folder").in_file(target);
    Err(Error::Plan(
        fault.hint("choose another `--outdir`, or remove it"),
    ))
}

fn check_space(parent: &Path, needed: u64) -> Result<()> {
    let free = match fs4::available_space(parent) {
        Ok(free) => free,
        Err(_) if parent.exists() => return Ok(()),
        Err(source) => return Err(write_error("no such folder", parent, source)),
    };
    if free >= needed {
        return Ok(());
    }
    let what = format!("{needed} bytes are needed, {free} are free");
    let source = io::ErrorKind::StorageFull.into();
    Err(write_error(&what, parent, source))
}

fn parent_of(target: &Path) -> &Path {
    target
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn write_error(what: &str, path: &Path, source: io::Error) -> Error {
    let mut fault = Fault::new(what).in_file(path);
    if source.kind() == io::ErrorKind::StorageFull {
        fault = fault.hint("free some space or choose another `--outdir`");
    }
    Error::Write { fault, source }
}
