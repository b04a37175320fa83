//! Files that come back, files that are damaged, files that lie.

use super::super::compact_reference::{Keep, tests::pair};
use super::*;
use tempfile::tempdir;

const VOCAB: usize = 300;

fn header() -> ReferenceHeader {
    ReferenceHeader {
        model: "nano".into(),
        file_type: "BF16".into(),
        vocab_size: VOCAB,
        context_tokens: 8,
        bos: Some(1),
        written_by: "test".into(),
    }
}

fn text() -> ChunkedText {
    ChunkedText::new((0..16).collect(), 8, Some(1), None).unwrap()
}

fn rows() -> Vec<CompactRow> {
    let row = |seed| CompactRow::new(&pair(seed, VOCAB, 1.0, 0.0).0, 9, Keep::default());
    (1..=6).map(|seed| row(seed).unwrap()).collect()
}

fn written(path: &Path, rows: &[CompactRow]) -> StatedBound {
    let mut writer = CompactFileWriter::create(path, &header(), &text()).unwrap();
    for row in rows {
        writer.write_row(row).unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn a_reference_comes_back() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("nano.ref");
    let bound = written(&path, &rows());
    let mut reader = CompactFileReader::open(&path).unwrap();
    assert_eq!((reader.header(), reader.text()), (&header(), &text()));
    assert_eq!(reader.bound(), bound);
    assert!(bound.max_tail_mass <= 1e-3 && bound.mean_tail_mass <= bound.max_tail_mass);
    assert!((bound.kl_error(10.0) - 10.0 * bound.mean_tail_mass).abs() < 1e-12);
    for row in rows() {
        assert_eq!(reader.read_row().unwrap(), Some(row));
    }
    assert_eq!(reader.read_row().unwrap(), None);
}

#[test]
fn every_damaged_byte_is_noticed() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("nano.ref");
    written(&path, &rows());
    let good = std::fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(97) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&path, bytes).unwrap();
        assert!(CompactFileReader::open(&path).is_err(), "byte {at}");
    }
    for length in [0, 7, 40, 64, good.len() - 1] {
        std::fs::write(&path, &good[..length]).unwrap();
        assert!(CompactFileReader::open(&path).is_err(), "length {length}");
    }
}

/// Rewrites bytes and mends the checksum, as an attacker would.
fn forged(path: &Path, edit: impl FnOnce(&mut Vec<u8>)) -> String {
    written(path, &rows());
    let mut bytes = std::fs::read(path).unwrap();
    bytes.truncate(bytes.len() - CHECKSUM_BYTES as usize);
    edit(&mut bytes);
    let checksum = Sha256::digest(&bytes);
    bytes.extend(checksum);
    std::fs::write(path, bytes).unwrap();
    let read = || -> Result<()> {
        let mut reader = CompactFileReader::open(path)?;
        while reader.read_row()?.is_some() {}
        Ok(())
    };
    read().unwrap_err().to_string()
}

#[test]
fn forged_files_are_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("nano.ref");
    let json = serde_json::to_vec(&header()).unwrap().len();
    let (chunks, row) = (16 + json, 16 + json + 4 + 16 * 4);
    let check = |at: usize, new: &[u8], expected: &str| {
        let error = forged(&path, |bytes| {
            bytes[at..at + new.len()].copy_from_slice(new)
        });
        assert!(
            error.contains(expected) && error.contains("nano.ref"),
            "{at}: {error}"
        );
    };
    check(8, &[2, 0, 0, 0], "version 2");
    check(12, &[255; 4], "a header of 4294967295 bytes");
    check(16, b"x", "header:");
    check(chunks, &[255; 4], "do not fit the file");
    check(chunks + 4, &[255; 4], "outside the vocabulary");
    check(row, &[255; 4], "keeps 4294967295 of 300");
    check(row, &[0; 4], "keeps 0 of 300");
    check(row + 4, &[255; 4], "most likely token");
    check(row + 8, &f64::NAN.to_le_bytes(), "out of range");
    check(row + 16, &2.0f64.to_le_bytes(), "out of range");
    check(row + 32, &(-9.5f64).to_le_bytes(), "do not add up");
    check(row + 48, &[255; 5], "too long");
    check(row + 49, &[0], "out of order");
}

#[test]
fn unfinished_files_have_no_name() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("nano.ref");
    let mut writer = CompactFileWriter::create(&path, &header(), &text()).unwrap();
    writer.write_row(&rows()[0]).unwrap();
    assert!(writer.finish().is_err());
    assert!(!path.exists());
    let other = ReferenceHeader {
        context_tokens: 512,
        ..header()
    };
    assert!(CompactFileWriter::create(&path, &other, &text()).is_err());
}
