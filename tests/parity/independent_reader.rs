//! `gguf-rs`, a reader nobody here wrote, parses every file type and finds the same tensors.

use nemoconv::formats::gguf::Gguf;
use nemoconv::plan::file_type::FileType;
use nemoconv_fixtures::nano;
use tempfile::tempdir;

use crate::support::to_gguf;

#[test]
fn it_finds_the_same_tensors() {
    let folder = tempdir().unwrap();
    for file_type in FileType::all() {
        let path = folder.path().join(format!("{file_type}.gguf"));
        to_gguf(&nano(), &path, &["-t", file_type.name()]);
        let ours = Gguf::open(&path).unwrap();
        let mut container = gguf_rs::get_gguf_container(path.to_str().unwrap()).unwrap();
        let decoded = container
            .decode()
            .unwrap_or_else(|error| panic!("{file_type}: {error}"));
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
