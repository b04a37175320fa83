//! A packed linear that is accepted decodes to the same values whole and row by row, in memory that its bytes can fill.
//!
//! The input: `ROWS COLUMNS CONFIG`, a line break, a safetensors file; the linear is the module `m`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nemoconv_formats::checkpoint::{Checkpoint, config_json};
use nemoconv_formats::packed::{PackedLinear, Quantization, RowBuffers, Scheme};
use nemoconv_fuzz::bounded;
use std::{fs, path::PathBuf, sync::OnceLock};

/// A folder in memory where the system has one.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let folder = parent.join(format!("packed_read-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the folder can be made");
        folder
    })
}

fn parse(line: &str) -> Option<([usize; 2], Scheme)> {
    let (rows, rest) = line.split_once(' ')?;
    let (columns, config) = rest.split_once(' ')?;
    let quantization = Quantization::parse(&config_json::parse(config).ok()?).ok()?;
    let scheme = quantization.scheme_of("m")?.clone();
    Some(([rows.parse().ok()?, columns.parse().ok()?], scheme))
}

fn decode(checkpoint: &Checkpoint, linear: &PackedLinear) {
    let (rows, columns) = (linear.rows(), linear.columns());
    let mut buffers = RowBuffers::default();
    let mut whole = vec![0.0; rows * columns];
    linear
        .dequantize(checkpoint, 0, &mut buffers, &mut whole)
        .expect("what was accepted can be read");
    let mut row = vec![0.0; columns];
    for first in 0..rows.min(16) {
        linear
            .dequantize(checkpoint, first, &mut buffers, &mut row)
            .expect("what was accepted can be read");
        let same = row.iter().zip(&whole[first * columns..]);
        assert!(same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()), "row {first}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return;
    };
    let Some(([rows, columns], scheme)) = std::str::from_utf8(&bytes[..end]).ok().and_then(parse) else {
        return;
    };
    let path = folder().join("model.safetensors");
    fs::write(&path, &bytes[end + 1..]).expect("the file can be written");
    bounded(bytes, || {
        let Ok(checkpoint) = Checkpoint::open(&path) else {
            return;
        };
        if let Ok(linear) = PackedLinear::resolve(&checkpoint, "m", &scheme, rows, columns) {
            decode(&checkpoint, &linear);
        }
    });
});
