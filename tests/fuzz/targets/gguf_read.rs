//! A GGUF header that is accepted can be laid out again, and reads back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nemoconv_formats::gguf::{Header, Layout, NewTensor};
use nemoconv_fuzz::bounded;

/// Alignment may pad a few bytes of header to megabytes; such inputs are not laid out.
const MAX_ALIGNMENT: u32 = 4096;

fn layout(header: &Header) -> Layout {
    let tensors = header.tensors.iter().map(|tensor| NewTensor {
        name: tensor.name.clone(),
        dims: tensor.dims.clone(),
        ty: tensor.ty,
    });
    Layout::new(header.metadata.clone(), tensors.collect()).expect("what was read can be written")
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = bounded(bytes, || Header::parse(bytes)) else {
        return;
    };
    for tensor in &header.tensors {
        let end = header.data_offset + tensor.offset + tensor.bytes();
        assert!(end <= bytes.len() as u64);
        assert_eq!(
            tensor.elements(),
            tensor.rows() * tensor.dims.first().copied().unwrap_or(1)
        );
    }
    if header.alignment > MAX_ALIGNMENT {
        return;
    }
    let first = layout(&header);
    let mut file = first.header_bytes().to_vec();
    file.resize(first.file_bytes() as usize, 0);
    let again = Header::parse(&file).expect("what was written can be read");
    assert_eq!(again.tensors, header.tensors);
    // Compared as bytes: a NaN among the metadata is not equal to itself.
    assert_eq!(layout(&again).header_bytes(), first.header_bytes());
});
