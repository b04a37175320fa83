//! Importance that is accepted is a finite number, never negative, for at least one column.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nemoconv_formats::Imatrix;
use nemoconv_fuzz::bounded;

fuzz_target!(|bytes: &[u8]| {
    let Ok(imatrix) = bounded(bytes, || Imatrix::parse(bytes)) else {
        return;
    };
    for (name, values) in imatrix.entries() {
        assert!(!values.is_empty());
        assert!(
            values
                .iter()
                .all(|value| value.is_finite() && *value >= 0.0)
        );
        assert_eq!(imatrix.importance(name), Some(values));
    }
});
