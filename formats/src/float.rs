//! Checkpoint floats as f32.
//!
//! Enters: little-endian bytes of a float type, at any alignment. Leaves: f32 values, exact but for F64, which is
//! rounded. Knows no scales: FP8 values come out as stored.

use crate::{Dtype, Error, Result};
use half::{f16, slice::HalfFloatSliceExt};

/// Values converted at once where a type needs an aligned copy.
const CHUNK: usize = 1024;

/// Every F8_E4M3 byte, in the variant without infinities (`float8_e4m3fn`, arXiv:2209.05433, Table 1): bias 7, `0x7f`
/// and `0xff` are NaN.
static F8_E4M3: [f32; 256] = e4m3_table();

/// Every F8_E5M2 byte (arXiv:2209.05433, Table 1): bias 15, infinities and NaN as in IEEE.
static F8_E5M2: [f32; 256] = e5m2_table();

/// Converts `bytes` to as many values as `out` holds. F64 is rounded to nearest even.
///
/// # Errors
/// `bytes` has another length than `out.len()` elements of `dtype`, or `dtype` is no float type.
pub fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let expected = out.len().checked_mul(dtype.bytes());
    if expected != Some(bytes.len()) {
        let (count, found) = (out.len(), bytes.len());
        return Err(Error::malformed(format!(
            "{count} values of {dtype} do not take {found} bytes"
        )));
    }
    match dtype {
        Dtype::Bf16 => each(bytes, out, |b| {
            f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
        }),
        Dtype::F16 => halves(bytes, out),
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::F8E4M3 => each(bytes, out, |[b]| F8_E4M3[usize::from(b)]),
        Dtype::F8E5M2 => each(bytes, out, |[b]| F8_E5M2[usize::from(b)]),
        _ => return Err(Error::unsupported(format!("{dtype} is not a float type"))),
    }
    Ok(())
}

/// One loop for every type of a fixed width, simple enough to vectorize.
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *value = convert(*bytes);
    }
}

/// F16 in chunks that fit the cache, through the processor's own conversion where it has one.
fn halves(bytes: &[u8], out: &mut [f32]) {
    let mut aligned = [f16::ZERO; CHUNK];
    for (values, bytes) in out.chunks_mut(CHUNK).zip(bytes.as_chunks().0.chunks(CHUNK)) {
        let (aligned, _) = aligned.split_at_mut(values.len());
        for (half, bytes) in aligned.iter_mut().zip(bytes) {
            *half = f16::from_le_bytes(*bytes);
        }
        aligned.convert_to_f32_slice(values);
    }
}

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = from_fields(byte as u32, 3, 7, false);
        byte += 1;
    }
    table
}

const fn e5m2_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = from_fields(byte as u32, 2, 15, true);
        byte += 1;
    }
    table
}

/// The value of an 8-bit float with `mantissa_bits` and this exponent bias. With `ieee` the highest exponent means
/// infinity and NaN, without it only the highest code of all is NaN.
const fn from_fields(byte: u32, mantissa_bits: u32, bias: u32, ieee: bool) -> f32 {
    let sign = (byte >> 7) << 31;
    let exponent = (byte & 0x7f) >> mantissa_bits;
    let mantissa = byte & ((1 << mantissa_bits) - 1);
    // Where the mantissa ends up among the 23 bits of an f32.
    let fraction = mantissa << (23 - mantissa_bits);
    let highest = 0x7f >> mantissa_bits;
    if exponent == highest && ieee {
        return f32::from_bits(sign | 0x7f80_0000 | fraction);
    }
    if byte & 0x7f == 0x7f {
        return f32::from_bits(sign | 0x7fc0_0000);
    }
    if exponent == 0 {
        // mantissa * 2^(1 - bias - mantissa_bits), the power written down as an f32's bits.
        let unit = f32::from_bits((127 + 1 - bias - mantissa_bits) << 23);
        return f32::from_bits((mantissa as f32 * unit).to_bits() | sign);
    }
    f32::from_bits(sign | ((exponent + 127 - bias) << 23) | fraction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Converts `bytes` from an odd address and expects these values, NaN equal to NaN.
    #[track_caller]
    fn check(dtype: Dtype, bytes: &[u8], expected: &[f32]) {
        for shift in 0..2 {
            let moved = [&vec![0; shift], bytes].concat();
            let mut found = vec![0.0; expected.len()];
            to_f32(dtype, &moved[shift..], &mut found).unwrap();
            for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
                let same =
                    found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                assert!(
                    same,
                    "{dtype} value {at}: expected {expected}, found {found}"
                );
            }
        }
    }

    #[test]
    fn every_sixteen_bit_float() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        check(
            Dtype::Bf16,
            &bytes,
            &(0..=u16::MAX)
                .map(|b| bf16::from_bits(b).to_f32())
                .collect::<Vec<_>>(),
        );
        check(
            Dtype::F16,
            &bytes,
            &(0..=u16::MAX)
                .map(|b| f16::from_bits(b).to_f32())
                .collect::<Vec<_>>(),
        );
    }

    #[test]
    fn every_e5m2_byte_is_the_upper_half_of_an_f16() {
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        let halves = bytes
            .iter()
            .map(|&b| f16::from_bits(u16::from(b) << 8).to_f32());
        check(Dtype::F8E5M2, &bytes, &halves.collect::<Vec<_>>());
    }

    #[test]
    fn every_e4m3_byte_follows_the_definition() {
        let value = |byte: u8| {
            let sign = if byte < 0x80 { 1.0 } else { -1.0 };
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
            match (exponent, byte & 7) {
                (15, 7) => f32::NAN,
                (0, _) => (sign * mantissa / 8.0 * 2f64.powi(-6)) as f32,
                _ => (sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7)) as f32,
            }
        };
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        check(
            Dtype::F8E4M3,
            &bytes,
            &bytes.iter().map(|&b| value(b)).collect::<Vec<_>>(),
        );
        check(
            Dtype::F8E4M3,
            &[0x7e, 0x01, 0x38],
            &[448.0, 0.001_953_125, 1.0],
        );
    }

    #[test]
    fn wide_floats() {
        let values = [
            0.0,
            -0.0,
            1.5,
            f32::MIN_POSITIVE / 2.0,
            f32::INFINITY,
            f32::NAN,
        ];
        check(Dtype::F32, &values.map(f32::to_le_bytes).concat(), &values);
        check(
            Dtype::F64,
            &values.map(|v| f64::from(v).to_le_bytes()).concat(),
            &values,
        );
        check(
            Dtype::F64,
            &[1e300, 0.1].map(f64::to_le_bytes).concat(),
            &[f32::INFINITY, 0.1],
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |dtype, bytes: &[u8], count| {
            to_f32(dtype, bytes, &mut vec![0.0; count])
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refused(Dtype::Bf16, &[0; 3], 1),
            "1 values of BF16 do not take 3 bytes"
        );
        assert_eq!(
            refused(Dtype::F32, &[0; 4], 2),
            "2 values of F32 do not take 4 bytes"
        );
        assert_eq!(refused(Dtype::I8, &[0; 4], 4), "I8 is not a float type");
    }
}
