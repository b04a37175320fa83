//! Choosing scales and codes: f32 rows in, ggml blocks out.
//!
//! Enters: rows, a target type, column importance. Leaves: packed blocks and what did not fit.

mod affine;
mod float;
mod iq4_xs;
pub mod lanes;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod small_block;
mod super_block;
mod symmetric;
mod tq1_0;
mod tq2_0;

use std::ops::AddAssign;

use crate::formats::GgmlType;

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
        F32 | F16
            | BF16
            | Q4_0
            | Q4_1
            | Q5_0
            | Q5_1
            | Q8_0
            | MXFP4
            | TQ1_0
            | TQ2_0
            | Q2_K
            | Q3_K
            | Q4_K
            | Q5_K
            | Q6_K
            | IQ4_XS
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
        GgmlType::Q4_0 => small_block::quantize::<q4_0::Q4_0, _>(rows, out),
        GgmlType::Q4_1 => small_block::quantize::<q4_1::Q4_1, _>(rows, out),
        GgmlType::Q5_0 => small_block::quantize::<q5_0::Q5_0, _>(rows, out),
        GgmlType::Q5_1 => small_block::quantize::<q5_1::Q5_1, _>(rows, out),
        GgmlType::Q8_0 => small_block::quantize::<q8_0::Q8_0, _>(rows, out),
        GgmlType::MXFP4 => small_block::quantize::<mxfp4::MXFP4, _>(rows, out),
        GgmlType::TQ1_0 => small_block::quantize::<tq1_0::TQ1_0, _>(rows, out),
        GgmlType::TQ2_0 => small_block::quantize::<tq2_0::TQ2_0, _>(rows, out),
        GgmlType::Q2_K => super_block::quantize::<q2_k::Q2_K>(rows, row_len, importance, out),
        GgmlType::Q3_K => super_block::quantize::<q3_k::Q3_K>(rows, row_len, importance, out),
        GgmlType::Q4_K => super_block::quantize::<q4_k::Q4_K>(rows, row_len, importance, out),
        GgmlType::Q5_K => super_block::quantize::<q5_k::Q5_K>(rows, row_len, importance, out),
        GgmlType::Q6_K => super_block::quantize::<q6_k::Q6_K>(rows, row_len, importance, out),
        GgmlType::IQ4_XS => super_block::quantize::<iq4_xs::IQ4_XS>(rows, row_len, importance, out),
        _ => panic!("{ty} cannot be quantized to"),
    }
}
