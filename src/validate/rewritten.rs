//! The rewrites that an artifact records, and the reference under them.
//!
//! Enters: an artifact's keys and its folder. Leaves: the rewrites, or why they cannot be had. Compares no weight.

use std::path::{Path, PathBuf};

use nemoconv_formats::checkpoint::Checkpoint;
use nemoconv_formats::gguf::Value;

use crate::artifact::{Container, StoredModel};
use crate::error::Result;
use crate::rewrite::{Rewrites, SHA256_KEY, SIDECAR_IN_FOLDER, SIDECAR_SUFFIX, sidecar_of};
use crate::write::whole_file::sha256_of;

/// What a packed folder says of how it was made.
const RECEIPT: &str = "receipt.json";

/// What an artifact says of rewrites.
#[derive(Debug)]
pub enum Recorded {
    /// There were none.
    None,
    /// These.
    Rewrites(Box<Rewrites>),
    /// Some, but which cannot be told.
    Unknown(String),
}

/// Finds the sidecar whose SHA-256 the artifact records: under the artifact's name, else anywhere beside it. A packed folder
/// holds its own.
pub fn recorded(artifact: &StoredModel) -> Recorded {
    if let Some(checkpoint) = artifact.checkpoint() {
        return recorded_in_folder(checkpoint);
    }
    let expected = match artifact.metadata().and_then(|keys| keys.get(SHA256_KEY)) {
        None => return Recorded::None,
        Some(Value::String(expected)) => expected,
        Some(_) => return Recorded::Unknown(format!("key `{SHA256_KEY}` is not text")),
    };
    let candidates = candidates(artifact.path());
    let found = candidates
        .iter()
        .find(|path| sha256_of(path).is_ok_and(|found| found == *expected));
    match found.map(|path| Rewrites::open(path)) {
        Some(Ok(rewrites)) => Recorded::Rewrites(Box::new(rewrites)),
        Some(Err(error)) => Recorded::Unknown(error.to_string()),
        None => Recorded::Unknown(absence(&candidates, artifact.path(), expected)),
    }
}

/// The rewrites that a folder's `receipt.json` records. Folders of other programs have none, and no sidecar either.
fn recorded_in_folder(checkpoint: &Checkpoint) -> Recorded {
    let path = checkpoint.folder().join(SIDECAR_IN_FOLDER);
    let receipt = match checkpoint.read_json(RECEIPT) {
        Ok(Some(receipt)) => receipt,
        Ok(None) if path.exists() => {
            return Recorded::Unknown(format!(
                "`{RECEIPT}` is missing, so that nothing says whether the weights underwent what `{SIDECAR_IN_FOLDER}` holds"
            ));
        }
        Ok(None) => return Recorded::None,
        Err(error) => {
            return Recorded::Unknown(format!(
                "`{RECEIPT}` cannot be read, so that rewrites of the weights are unknown: {error}"
            ));
        }
    };
    match receipt["calibration"]["rewrites_sha256"].as_str() {
        Some(expected) => recorded_as(&path, expected),
        None => Recorded::None,
    }
}

/// The rewrites of a folder's sidecar, if it is the expected one.
fn recorded_as(path: &Path, expected: &str) -> Recorded {
    let found = match sha256_of(path) {
        Ok(found) => found,
        Err(_) if !path.exists() => {
            let what = format!("`{SIDECAR_IN_FOLDER}`, which `{RECEIPT}` names, is missing");
            return Recorded::Unknown(what);
        }
        Err(error) => return Recorded::Unknown(error.to_string()),
    };
    if found != expected {
        return Recorded::Unknown(format!(
            "`{SIDECAR_IN_FOLDER}` is not the one that was written with the folder: its sha256 is not {expected}"
        ));
    }
    match Rewrites::open(path) {
        Ok(rewrites) => Recorded::Rewrites(Box::new(rewrites)),
        Err(error) => Recorded::Unknown(error.to_string()),
    }
}

fn absence(candidates: &[PathBuf], artifact: &Path, expected: &str) -> String {
    let named = sidecar_of(artifact);
    let name = named.file_name().unwrap_or_default().display();
    match candidates.contains(&named) {
        true => format!(
            "`{name}` is not the one that was written with the artifact: its sha256 is not {expected}"
        ),
        false => format!("`{name}` is not beside the artifact"),
    }
}

/// The sidecar of the artifact's name first, then all others of its folder.
fn candidates(artifact: &Path) -> Vec<PathBuf> {
    let named = sidecar_of(artifact);
    let folder = artifact
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let entries = std::fs::read_dir(folder.unwrap_or(Path::new(".")))
        .into_iter()
        .flatten();
    let paths = entries
        .flatten()
        .map(|entry| artifact.with_file_name(entry.file_name()));
    let is_sidecar = |path: &PathBuf| path.to_string_lossy().ends_with(SIDECAR_SUFFIX);
    let mut paths: Vec<PathBuf> = paths.filter(is_sidecar).collect();
    paths.sort();
    paths.sort_by_key(|path| *path != named);
    paths
}

/// The reference as large as a widened artifact, where that is another one.
///
/// # Errors
/// The checkpoint cannot be read again.
pub fn of_same_widths(
    artifact: &StoredModel,
    reference: &StoredModel,
) -> Result<Option<StoredModel>> {
    let widths = |model: &StoredModel| crate::model::nemotron_h::Widths::of(model.config());
    let same = widths(artifact) == widths(reference);
    if same || reference.container() != Container::Checkpoint {
        return Ok(None);
    }
    let path = reference.path().to_string_lossy();
    StoredModel::open_widened(&path).map(Some)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nemoconv_formats::GgmlType;
    use nemoconv_formats::checkpoint::Checkpoint;
    use nemoconv_formats::gguf::{Layout, Metadata, NewTensor};

    use super::*;
    use crate::model::config::NemotronHConfig;
    use crate::plan::types::TypeSettings;
    use crate::plan::{Plan, Settings};
    use crate::report::{Finding, Severity};
    use crate::rewrite::{RewriteSettings, RewrittenModel, Rotation};
    use crate::validate::weights;
    use crate::write::gguf::architecture_keys::architecture_keys;

    /// A rewritten model written as F32, or as Q8_0 where that fits, with the keys that say so.
    struct Written {
        folder: tempfile::TempDir,
        reference: Arc<StoredModel>,
    }

    impl Written {
        fn new(source: &Path, widen: bool, ty: GgmlType) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let text = source.to_str().unwrap();
            let model = match widen {
                true => StoredModel::open_widened(text),
                false => StoredModel::open(text),
            };
            let model = Arc::new(model.unwrap());
            let settings = RewriteSettings {
                rotation: Rotation::Hadamard,
                ..RewriteSettings::default()
            };
            let rewrites = Rewrites::choose(&model, &settings, &Default::default()).unwrap();
            let sha256 = rewrites
                .save(&folder.path().join("m.rewrites.safetensors"))
                .unwrap();
            let mut metadata = keys(source, widen);
            metadata.set(SHA256_KEY, sha256);
            let rewritten = RewrittenModel::new(Arc::clone(&model), Arc::new(rewrites));
            write(&folder.path().join("m.gguf"), metadata, &rewritten, ty);
            let reference = Arc::new(StoredModel::open(text).unwrap());
            Self { folder, reference }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        /// Findings above notes.
        fn faults(&self) -> Vec<Finding> {
            let artifact = StoredModel::open(self.path("m.gguf").to_str().unwrap()).unwrap();
            let weights = weights::inspect(&artifact, Some(&self.reference), None).unwrap();
            let mut findings = weights.found.into_findings();
            findings.retain(|finding| finding.severity > Severity::Note);
            findings
        }

        fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
            let mut bytes = std::fs::read(self.path(name)).unwrap();
            change(&mut bytes);
            std::fs::write(self.path(name), bytes).unwrap();
        }
    }

    fn keys(source: &Path, widen: bool) -> Metadata {
        let checkpoint = Checkpoint::open(source).unwrap();
        let (_, config) = NemotronHConfig::open(&checkpoint).unwrap();
        let settings = Settings {
            types: TypeSettings::of(crate::plan::file_type::FileType::F32),
            widen,
            calibrated: false,
            with_mtp: false,
        };
        let plan = Plan::new(&checkpoint, config, &settings, None).unwrap();
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", "nemotron_h");
        architecture_keys(&plan, &mut metadata);
        metadata
    }

    fn write(path: &Path, metadata: Metadata, model: &RewrittenModel, ty: GgmlType) {
        let tensors = model.stored().tensors().iter();
        let (mut new, mut bytes) = (Vec::new(), Vec::new());
        for tensor in tensors {
            let memory = model.in_memory(&tensor.name).unwrap();
            let fits = tensor.rows > 8 && tensor.columns.is_multiple_of(32);
            let ty = if fits { ty } else { GgmlType::F32 };
            let mut dims = vec![tensor.columns as u64];
            if tensor.rows > 1 {
                dims.push(tensor.rows as u64);
            }
            let values: Vec<f32> = memory
                .bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect();
            let mut out = vec![0; ty.bytes_for(values.len() as u64).unwrap() as usize];
            let _ = crate::quantize::quantize_rows(ty, tensor.columns, &values, None, &mut out);
            new.push(NewTensor {
                name: tensor.name.clone(),
                dims,
                ty,
            });
            bytes.push(out);
        }
        let layout = Layout::new(metadata, new).unwrap();
        let mut file = layout.header_bytes().to_vec();
        file.resize(layout.file_bytes() as usize, 0);
        for (index, bytes) in bytes.iter().enumerate() {
            file[layout.tensor_offset(index) as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        std::fs::write(path, file).unwrap();
    }

    #[test]
    fn rewrites_are_undone() {
        for ty in [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0] {
            let written = Written::new(&nemoconv_fixtures::nano(), false, ty);
            assert_eq!(written.faults(), [], "{ty}");
            // The artifact may have been renamed.
            std::fs::rename(
                written.path("m.rewrites.safetensors"),
                written.path("other.rewrites.safetensors"),
            )
            .unwrap();
            assert_eq!(written.faults(), [], "{ty}");
        }
    }

    #[test]
    fn what_is_wrong_under_rewrites_is_found() {
        let written = Written::new(&nemoconv_fixtures::nano(), false, GgmlType::F32);
        written.change("m.gguf", |bytes| {
            let last = bytes.len() - 1000;
            bytes[last..].fill(0x3f);
        });
        let faults = written.faults();
        let ids: Vec<_> = faults.iter().map(|finding| finding.rule.id()).collect();
        assert_eq!(ids, ["weights/bytes-differ"], "{faults:#?}");
    }

    #[test]
    fn rewrites_of_a_widened_model_are_undone() {
        let folder = tempfile::tempdir().unwrap();
        let mut cases = nemoconv_fixtures::checkpoint::cases().into_iter();
        let odd = cases.find(|case| case.name == "odd-widths").unwrap();
        let odd = odd.checkpoint.write_as(folder.path(), "odd").unwrap();
        for ty in [GgmlType::F32, GgmlType::Q8_0] {
            assert_eq!(Written::new(&odd, true, ty).faults(), [], "{ty}");
        }
    }

    #[test]
    fn missing_or_other_rewrites_are_one_finding() {
        let written = Written::new(&nemoconv_fixtures::nano(), false, GgmlType::Q8_0);
        let sidecar = written.path("m.rewrites.safetensors");
        let expect = |words: &str| {
            let faults = written.faults();
            assert_eq!(faults.len(), 1, "{faults:#?}");
            assert_eq!(faults[0].rule.id(), "weights/rewrites-missing");
            assert!(faults[0].message.contains(words), "{}", faults[0].message);
        };
        written.change("m.rewrites.safetensors", |bytes| {
            *bytes.last_mut().unwrap() ^= 1
        });
        expect("is not the one that was written with the artifact");
        std::fs::remove_file(sidecar).unwrap();
        expect("is not beside the artifact");
    }
}
