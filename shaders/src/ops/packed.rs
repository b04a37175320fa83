//! What weights of packed checkpoints have in common: parts of their bytes, types of scales, the order of rows.

use std::ops::Range;

use nemoconv_formats::Dtype;

use crate::array::Bytes;
use crate::driver::View;

/// Some bytes: the view, and where they begin in it.
pub(super) fn stored(bytes: &Bytes, part: Range<usize>) -> (View, usize) {
    let part = part.start as u64..part.end as u64;
    assert!(part.end <= bytes.len(), "bytes {part:?} of {}", bytes.len());
    let (view, first) = bytes.part(part);
    (view, first as usize)
}

/// Some of the items of so many bytes each that lie one after the other, as [`stored`].
pub(super) fn stored_items(bytes: &Bytes, items: Range<usize>, size: usize) -> (View, usize) {
    stored(bytes, items.start * size..items.end * size)
}

/// A type of scales as kernels know it.
pub(super) fn scale_type(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bf16 => 0,
        Dtype::F16 => 1,
        Dtype::F32 => 2,
        Dtype::F8E4M3 => 3,
        other => panic!("scales cannot be {other}"),
    }
}

/// The rows of a checkpoint that these are made of: whole heads where their halves are to be interleaved.
pub(super) fn whole_heads(rows: &Range<usize>, head_rows: usize) -> Range<usize> {
    match head_rows {
        0 => rows.clone(),
        _ => rows.start / head_rows * head_rows..rows.end.next_multiple_of(head_rows),
    }
}
