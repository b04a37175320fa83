//! Packed integers that a GGUF type holds as they are: codes and scales go over bit for bit.
//!
//! Enters: codes, scales and zero points of rows. Leaves: blocks. Chooses nothing: a row whose scales F16 does not hold is
//! left to the caller.

use half::f16;
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::{BlockNVFP4, BlockQ4_0, BlockQ8_0, nvfp4_scale};

/// Elements of Q4_0 and Q8_0 blocks.
const BLOCK: usize = 32;

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
        if ty == GgmlType::NVFP4 {
            return self.pack_nvfp4(bytes);
        }
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

    fn pack_nvfp4(&self, bytes: &mut [u8]) -> Option<()> {
        let blocks = self.codes.as_chunks::<{ BlockNVFP4::ELEMENTS }>().0.iter();
        let scales = self.scales.as_chunks::<4>().0;
        let places = bytes.chunks_exact_mut(size_of::<BlockNVFP4>());
        for ((codes, scales), place) in blocks.zip(scales).zip(places) {
            let mut d = [0; 4];
            for (d, scale) in d.iter_mut().zip(scales) {
                *d = ue4m3(*scale)?;
            }
            let block = BlockNVFP4::pack(&d, &codes.map(i8::cast_unsigned));
            place.copy_from_slice(bytemuck::bytes_of(&block));
        }
        Some(())
    }
}

/// The byte of a scale that was read from an F8_E4M3; `None` for what is negative or no number.
fn ue4m3(scale: f32) -> Option<u8> {
    // The block's own function gives half of it. Bytes up to 0x7e ascend.
    let value = |byte: u8| 2.0 * nvfp4_scale(byte);
    let (mut below, mut above) = (0, 0x7f);
    while below < above {
        let middle = (below + above) / 2;
        match value(middle) < scale {
            true => below = middle + 1,
            false => above = middle,
        }
    }
    (below < 0x7f && value(below) == scale).then_some(below)
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
    fn every_scale_of_nvfp4_has_its_byte() {
        for byte in 0..0x7f {
            assert_eq!(ue4m3(2.0 * nvfp4_scale(byte)), Some(byte));
        }
        for scale in [-1.0, f32::NAN, 449.0, 1.01, f32::INFINITY] {
            assert_eq!(ue4m3(scale), None, "{scale}");
        }
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
