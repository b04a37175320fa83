//! Our safetensors reader and the `safetensors` crate accept the same files and see the same tensors, but for the
//! differences named below.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nemoconv_formats::{Error, ErrorKind, checkpoint::parse_header};
use nemoconv_fuzz::bounded;
use safetensors::SafeTensors;

/// What only we refuse: types we have no use for, names that are there twice, whitespace before the brace.
fn only_ours(error: &Error) -> bool {
    let stricter = ["header names it twice", "header must begin with `{`"];
    matches!(error.kind, ErrorKind::Unsupported(_))
        || stricter.contains(&error.kind.to_string().as_str())
}

fuzz_target!(|bytes: &[u8]| {
    let ours = bounded(bytes, || parse_header(bytes));
    let theirs = SafeTensors::deserialize(bytes);
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => {
            assert_eq!(ours.len(), theirs.len());
            for entry in ours {
                let view = theirs.tensor(&entry.name).expect("both know the name");
                assert_eq!(view.shape(), entry.shape);
                let start = entry.offset as usize;
                assert_eq!(
                    view.data().as_ptr_range(),
                    bytes[start..start + entry.bytes as usize].as_ptr_range()
                );
            }
        }
        (Err(error), Ok(_)) => assert!(only_ours(&error), "only we refuse: {error}"),
        (Ok(_), Err(error)) => panic!("only we accept: {error}"),
        (Err(_), Err(_)) => {}
    }
});
