//! Packed integers that a GGUF type holds as they are: codes and scales go over bit for bit.
//!
//! Enters: codes, scales and zero points of rows. Leaves: blocks. Chooses nothing: a row whose scales F16 does not hold is
//! left to the caller.

use half::f16;
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::{BlockQ4_0, BlockQ8_0};
use nemoconv_formats::packed::{Group, Layout, PackedLinear};

use crate::plan::PlannedTensor;
use crate::plan::sources::Piece;

/// Elements of the blocks that take codes over.
const BLOCK: usize = 32;

/// Whether the blocks of the tensor's type hold the codes of every piece: Q4_0 those of 4 bits without zero points, Q8_0
/// all others but 8-bit ones with zero points; a group of codes must be whole blocks.
pub fn keeps_codes(tensor: &PlannedTensor) -> bool {
    let same_place = tensor.source == tensor.stored && tensor.factor == 1.0;
    let holds = |piece: &Piece| match piece {
        Piece::Packed(linear) => holds_codes(tensor.ty, linear),
        Piece::Tensor { .. } | Piece::Zeros => false,
    };
    same_place && tensor.pieces.iter().all(holds)
}

fn holds_codes(ty: GgmlType, linear: &PackedLinear) -> bool {
    let layout = linear.scheme().layout;
    let whole_blocks = match layout.group() {
        Some(Group::Columns(size)) => size.is_multiple_of(BLOCK),
        Some(Group::Row | Group::Tensor) => linear.columns().is_multiple_of(BLOCK),
        None => false,
    };
    let is_integer = !matches!(layout, Layout::Float8 { .. } | Layout::Nvfp4(_));
    let fits = match ty {
        GgmlType::Q4_0 => layout.bits() <= 4 && layout.is_symmetric(),
        GgmlType::Q8_0 => layout.bits() <= 4 || layout.is_symmetric(),
        _ => false,
    };
    whole_blocks && is_integer && fits
}

/// Codes of one row with their scales and zero points, the latter empty where there are none.
#[derive(Debug, Clone, Copy)]
pub struct CodedRow<'a> {
    /// `[in_features]`.
    pub codes: &'a [i8],
    /// `[groups]`.
    pub scales: &'a [f32],
    /// `[groups]` or empty.
    pub zeros: &'a [f32],
}

impl CodedRow<'_> {
    /// Fills `bytes`, one row of `ty`; `None` and unspecified bytes where a scale or a code does not fit.
    pub fn pack(&self, ty: GgmlType, bytes: &mut [u8]) -> Option<()> {
        let of_group = self.codes.len() / self.scales.len().max(1);
        let blocks = self.codes.as_chunks::<BLOCK>().0.iter().enumerate();
        let places = bytes.chunks_exact_mut(ty.block_bytes());
        for ((index, codes), place) in blocks.zip(places) {
            let group = index * BLOCK / of_group.max(1);
            let scale = self.scales.get(group)?;
            let d = f16::from_f32(*scale);
            if d.to_f32().to_bits() != scale.to_bits() || !d.is_finite() {
                return None;
            }
            let zero = self.zeros.get(group).map_or(0, |zero| *zero as i32);
            let code = |index: usize| i32::from(codes[index]) - zero;
            match ty {
                GgmlType::Q4_0 => {
                    let mut unsigned = [0; BLOCK];
                    for (index, to) in unsigned.iter_mut().enumerate() {
                        *to = u8::try_from(code(index) + 8)
                            .ok()
                            .filter(|code| *code < 16)?;
                    }
                    place.copy_from_slice(bytemuck::bytes_of(&BlockQ4_0::pack(d, &unsigned)));
                }
                GgmlType::Q8_0 => {
                    let mut signed = [0; BLOCK];
                    for (index, to) in signed.iter_mut().enumerate() {
                        *to = i8::try_from(code(index)).ok()?;
                    }
                    place.copy_from_slice(bytemuck::bytes_of(&BlockQ8_0::pack(d, &signed)));
                }
                _ => return None,
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nemoconv_formats::block::dequantize;

    fn row(ty: GgmlType, codes: &[i8], scales: &[f32], zeros: &[f32]) -> Option<Vec<f32>> {
        let mut bytes = vec![0; codes.len() / BLOCK * ty.block_bytes()];
        let coded = CodedRow {
            codes,
            scales,
            zeros,
        };
        coded.pack(ty, &mut bytes)?;
        let mut values = vec![0.0; codes.len()];
        dequantize(ty, &bytes, &mut values).unwrap();
        Some(values)
    }

    #[test]
    fn blocks_of_a_group_share_its_scale() {
        let codes: Vec<i8> = (0..128).map(|i| (i % 16) as i8 - 8).collect();
        let scales = [0.25, -3.0];
        let expected = |zero: f32| -> Vec<f32> {
            let value = |(i, code): (usize, &i8)| (f32::from(*code) - zero) * scales[i / 64];
            codes.iter().enumerate().map(value).collect()
        };
        assert_eq!(
            row(GgmlType::Q4_0, &codes, &scales, &[]).unwrap(),
            expected(0.0)
        );
        let zeros = [5.0, 5.0];
        assert_eq!(
            row(GgmlType::Q8_0, &codes, &scales, &zeros).unwrap(),
            expected(5.0)
        );
    }

    #[test]
    fn what_does_not_fit_is_left() {
        let codes = [-8; 32];
        // 1 + 2^-12 needs more digits than F16 has, 1e6 more range.
        for scale in [1.0 + 1.0 / 4096.0, 1e6, f32::NAN, f32::INFINITY] {
            assert_eq!(row(GgmlType::Q8_0, &codes, &[scale], &[]), None);
        }
        assert_eq!(row(GgmlType::Q4_0, &codes, &[1.0], &[1.0]), None);
        assert_eq!(row(GgmlType::Q8_0, &[-128; 32], &[1.0], &[1.0]), None);
        assert_eq!(row(GgmlType::Q4_K, &codes, &[1.0], &[]), None);
    }
}
