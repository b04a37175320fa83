//! Which tensor lies in which file of a split set, and every offset, from headers alone.

use std::path::{Path, PathBuf};

use nemoconv_formats::gguf::{Layout, Metadata, NewTensor};

use crate::error::{Error, Fault, Result};

/// When a new file begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SplitLimits {
    /// Most bytes of tensors in one file.
    pub max_bytes: Option<u64>,
    /// Most tensors in one file.
    pub max_tensors: Option<usize>,
}

/// One file: its final path and its layout.
#[derive(Debug)]
pub struct Part {
    /// Final path.
    pub path: PathBuf,
    /// Header and offsets.
    pub layout: Layout,
}

/// Where a tensor lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Which file.
    pub part: usize,
    /// Offset from the start of that file, bytes.
    pub offset: u64,
}

/// All files of an artifact.
#[derive(Debug)]
pub struct Parts {
    /// In order; one unless split.
    pub parts: Vec<Part>,
    /// Parallel to the tensors.
    pub slots: Vec<Slot>,
}

impl Parts {
    /// Lays out `tensors` under `outfile`, split by `limits`.
    ///
    /// A split set is named `STEM-00001-of-0000N.gguf`; only the first file carries the model's metadata.
    ///
    /// # Errors
    /// More than 65,535 files, or a layout the format cannot express.
    pub fn new(
        outfile: &Path,
        metadata: &Metadata,
        tensors: Vec<NewTensor>,
        limits: SplitLimits,
    ) -> Result<Self> {
        let total = tensors.len();
        let groups = group(tensors, limits);
        let count = u16::try_from(groups.len()).map_err(|_| {
            let fault = Fault::new(format!(
                "{} files are more than a split set can have",
                groups.len()
            ));
            Error::Plan(fault.hint("choose a larger `--split-max-size` or `--split-max-tensors`"))
        })?;
        let mut parts = Vec::new();
        let mut slots = Vec::with_capacity(total);
        for (number, group) in groups.into_iter().enumerate() {
            let split = limits != SplitLimits::default();
            let own = part_metadata(metadata, number, split.then_some(count), total);
            let path = if split {
                part_path(outfile, number, count)
            } else {
                outfile.to_path_buf()
            };
            let layout = Layout::new(own, group).map_err(|error| error.in_file(&path))?;
            slots.extend((0..layout.tensor_count()).map(|index| Slot {
                part: number,
                offset: layout.tensor_offset(index),
            }));
            parts.push(Part { path, layout });
        }
        Ok(Self { parts, slots })
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.layout.file_bytes()).sum()
    }
}

/// Cuts the list where a limit would be passed; no group is empty.
fn group(tensors: Vec<NewTensor>, limits: SplitLimits) -> Vec<Vec<NewTensor>> {
    let mut groups: Vec<Vec<NewTensor>> = vec![Vec::new()];
    let mut bytes = 0u64;
    for tensor in tensors {
        let size = tensor
            .ty
            .bytes_for(tensor.dims.iter().product())
            .unwrap_or(0);
        let group = groups.last_mut().expect("there is always a group");
        let full = limits
            .max_bytes
            .is_some_and(|max| bytes.saturating_add(size) > max)
            || limits.max_tensors.is_some_and(|max| group.len() >= max);
        if full && !group.is_empty() {
            groups.push(vec![tensor]);
            bytes = size;
        } else {
            group.push(tensor);
            bytes += size;
        }
    }
    groups
}

fn part_metadata(
    metadata: &Metadata,
    number: usize,
    count: Option<u16>,
    tensors: usize,
) -> Metadata {
    let mut own = if number == 0 {
        metadata.clone()
    } else {
        Metadata::new()
    };
    if let Some(count) = count {
        own.set("split.no", number as u16);
        own.set("split.count", count);
        own.set("split.tensors.count", tensors as i32);
    }
    own
}

fn part_path(outfile: &Path, number: usize, count: u16) -> PathBuf {
    let stem = outfile.file_stem().unwrap_or_default().to_string_lossy();
    outfile.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nemoconv_formats::GgmlType;

    fn tensors(count: usize) -> Vec<NewTensor> {
        (0..count)
            .map(|i| NewTensor {
                name: format!("t{i}"),
                dims: vec![32],
                ty: GgmlType::F32,
            })
            .collect()
    }

    fn sizes(count: usize, max_bytes: Option<u64>, max_tensors: Option<usize>) -> Vec<usize> {
        let groups = group(
            tensors(count),
            SplitLimits {
                max_bytes,
                max_tensors,
            },
        );
        groups.iter().map(Vec::len).collect()
    }

    #[test]
    fn a_tensor_that_would_pass_a_limit_begins_a_file() {
        assert_eq!(sizes(5, None, None), [5]);
        assert_eq!(sizes(5, None, Some(2)), [2, 2, 1]);
        assert_eq!(sizes(5, Some(256), None), [2, 2, 1]);
        assert_eq!(sizes(3, Some(1), None), [1, 1, 1]);
    }

    #[test]
    fn only_the_first_file_carries_the_models_metadata() {
        let mut metadata = Metadata::new();
        metadata.set("general.name", "x");
        let limits = SplitLimits {
            max_bytes: None,
            max_tensors: Some(2),
        };
        let parts = Parts::new(Path::new("dir/m.gguf"), &metadata, tensors(3), limits).unwrap();
        let paths: Vec<_> = parts.parts.iter().map(|part| part.path.clone()).collect();
        assert_eq!(
            paths,
            ["dir/m-00001-of-00002.gguf", "dir/m-00002-of-00002.gguf"].map(PathBuf::from)
        );
        assert_eq!(
            parts.slots.iter().map(|slot| slot.part).collect::<Vec<_>>(),
            [0, 0, 1]
        );
    }
}
