//! Statistics that are accepted are written and read back the same.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nemoconv::calibrate::statistics::Statistics;
use nemoconv_fuzz::bounded;

/// The reader maps a file; this one is written anew for every input.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let name = format!("statistics_read.{}.safetensors", std::process::id());
    std::env::temp_dir().join(name)
});

fuzz_target!(|bytes: &[u8]| {
    std::fs::write(&*FILE, bytes).expect("the temporary folder can be written");
    let Ok((statistics, origin)) = bounded(bytes, || Statistics::open(&FILE)) else {
        return;
    };
    let mut written = Vec::new();
    statistics
        .write(&origin, &mut written)
        .expect("memory takes everything");
    std::fs::write(&*FILE, &written).expect("the temporary folder can be written");
    let again = Statistics::open(&FILE).expect("what was written can be read");
    assert!(again == (statistics, origin));
});
