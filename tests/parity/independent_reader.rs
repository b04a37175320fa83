//! `gguf-rs`, a reader nobody here wrote, parses every file type and finds the same tensors.

use nemoconv::formats::gguf::Gguf;
use nemoconv::plan::file_type::FileType;
use nemoconv_fixtures::nano;
use tempfile::tempdir;

use crate::support::to_gguf;

/// Ids that gguf-rs 0.1.8 does not name, and therefore refuses: TQ1_0, TQ2_0, MXFP4.
const UNKNOWN_TO_IT: [u32; 3] = [34, 35, 39];

#[test]
fn it_finds_the_same_tensors() {
    let folder = tempdir().unwrap();
    for file_type in FileType::all() {
        let path = folder.path().join(format!("{file_type}.gguf"));
        to_gguf(&nano(), &path, &["-t", file_type.name()]);
        let ours = Gguf::open(&path).unwrap();
        let uses_unknown = ours
            .header()
            .tensors
            .iter()
            .any(|tensor| UNKNOWN_TO_IT.contains(&tensor.ty.id()));
        let mut container = gguf_rs::get_gguf_container(path.to_str().unwrap()).unwrap();
        let decoded = match container.decode() {
            Ok(decoded) => decoded,
            Err(error) if uses_unknown => {
                println!("{file_type}: gguf-rs does not know one of its types: {error}");
                continue;
            }
            Err(error) => panic!("{file_type}: {error}"),
        };
        let theirs: Vec<_> = decoded
            .tensors()
            .iter()
            .map(|tensor| (tensor.name.clone(), tensor.offset))
            .collect();
        let same: Vec<_> = ours
            .header()
            .tensors
            .iter()
            .map(|tensor| (tensor.name.clone(), tensor.offset))
            .collect();
        assert_eq!(theirs, same, "{file_type}");
        assert_eq!(
            decoded.metadata().len(),
            ours.header().metadata.iter().len(),
            "{file_type}"
        );
    }
}
