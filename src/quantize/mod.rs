//! Choosing scales and codes: f32 rows in, ggml blocks out.
//!
//! Enters: rows, a target type, column importance. Leaves: packed blocks and what did not fit.

mod affine_block;
mod float;
mod iq4_nl;
pub mod lanes;
mod mxfp4;
mod q4_0;
mod q4_1;
mod q5_0;
mod q5_1;
mod q8_0;
mod searched_block;
mod small_block;
mod symmetric;
mod tq1_0;
mod tq2_0;

use std::ops::AddAssign;

use crate::formats::GgmlType;
use searched_block::SearchedType;
use small_block::PlainType;

/// How many scales, or for F16 and BF16 elements, are too large for their type and became infinite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "infinite scales make a file useless"]
pub struct ScaleOverflow(pub u64);

impl AddAssign for ScaleOverflow {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

/// Whether [`quantize_rows`] knows the type.
pub fn can_quantize(ty: GgmlType) -> bool {
    use GgmlType::*;
    matches!(
        ty,
        F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL | MXFP4 | TQ1_0 | TQ2_0
    )
}

/// Quantizes whole rows; every row gives the same bytes alone and together with others.
///
/// `rows`: [n, `row_len`], row-major; `importance`: [`row_len`], how much an error in each column counts
/// (used by the types whose scales are searched); `out`: exactly the bytes of n rows. NaN and infinities
/// give unspecified codes in their block.
///
/// # Panics
/// If the lengths do not belong together or the type cannot be quantized to (see [`can_quantize`]).
pub fn quantize_rows(
    ty: GgmlType,
    row_len: usize,
    rows: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    assert!(
        row_len > 0 && rows.len().is_multiple_of(row_len),
        "rows of {row_len} elements"
    );
    assert!(
        row_len.is_multiple_of(ty.block_elements()),
        "rows of whole {ty} blocks"
    );
    assert_eq!(
        ty.bytes_for(rows.len() as u64),
        Some(out.len() as u64),
        "bytes of the {ty} rows"
    );
    assert!(
        importance.is_none_or(|values| values.len() == row_len),
        "an importance per column"
    );
    match ty {
        GgmlType::F32 => float::f32(rows, out),
        GgmlType::F16 => float::f16(rows, out),
        GgmlType::BF16 => float::bf16(rows, out),
        GgmlType::Q4_0 => plain_or_searched::<q4_0::Q4_0>(row_len, rows, importance, out),
        GgmlType::Q4_1 => plain_or_searched::<q4_1::Q4_1>(row_len, rows, importance, out),
        GgmlType::Q5_0 => plain_or_searched::<q5_0::Q5_0>(row_len, rows, importance, out),
        GgmlType::Q5_1 => plain_or_searched::<q5_1::Q5_1>(row_len, rows, importance, out),
        GgmlType::Q8_0 => small_block::quantize::<q8_0::Q8_0, _>(rows, out),
        GgmlType::IQ4_NL => {
            searched_block::quantize::<iq4_nl::IQ4NL>(row_len, rows, importance, out)
        }
        GgmlType::MXFP4 => small_block::quantize::<mxfp4::MXFP4, _>(rows, out),
        GgmlType::TQ1_0 => small_block::quantize::<tq1_0::TQ1_0, _>(rows, out),
        GgmlType::TQ2_0 => small_block::quantize::<tq2_0::TQ2_0, _>(rows, out),
        _ => panic!("{ty} cannot be quantized to"),
    }
}

/// Without importance the scale follows from the extremes, as in ggml; with it, it is searched.
fn plain_or_searched<T: PlainType<32> + SearchedType>(
    row_len: usize,
    rows: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> ScaleOverflow {
    match importance {
        None => small_block::quantize::<T, 32>(rows, out),
        Some(_) => searched_block::quantize::<T>(row_len, rows, importance, out),
    }
}
