//! JSON without bare words means what serde_json says; an index names only plain files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nemoconv_formats::checkpoint::{config_json, index_json};
use nemoconv_fuzz::bounded;
use serde_json::Value;

fuzz_target!(|text: &str| {
    let ours = bounded(text.as_bytes(), || config_json::parse(text));
    match (ours, serde_json::from_str::<Value>(text)) {
        (ours, Ok(theirs)) => assert_eq!(ours.expect("plain JSON is accepted"), theirs),
        (Ok(_), Err(_)) => assert!(text.contains("Infinity") || text.contains("NaN")),
        (Err(error), Err(_)) => {
            assert!(error.place.offset.is_some_and(|at| at <= text.len() as u64))
        }
    }
    if let Ok(index) = bounded(text.as_bytes(), || index_json::parse(text)) {
        assert!(
            index
                .weight_map
                .iter()
                .all(|(_, shard)| !shard.contains(['/', '\\']) && shard != "..")
        );
    }
});
