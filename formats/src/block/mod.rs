//! ggml blocks: one file per type, with the struct, its size, packing and unpacking.
//!
//! Enters: codes and scales somebody chose, or bytes of a file. Leaves: bytes, or f32 values.
//! Codes are the stored unsigned numbers (8-bit ones are signed); scales are signed where the format
//! subtracts an offset from them. Structs have alignment 1, so they can be cast from any bytes.

mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod nvfp4;
mod planes;
mod q1_0;
mod q2_0;
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
mod q8_1;
mod q8_k;
mod tq1_0;
mod tq2_0;

use half::{f16, slice::HalfFloatSliceExt};

pub use iq4_nl::{BlockIQ4NL, VALUES as IQ4_NL_VALUES};
pub use iq4_xs::BlockIQ4XS;
pub use mxfp4::{BlockMXFP4, VALUES as MXFP4_VALUES, scale as mxfp4_scale};
pub use nvfp4::{BlockNVFP4, scale as nvfp4_scale};
pub use q1_0::BlockQ1_0;
pub use q2_0::BlockQ2_0;
pub use q2_k::BlockQ2K;
pub use q3_k::BlockQ3K;
pub use q4_0::BlockQ4_0;
pub use q4_1::BlockQ4_1;
pub use q4_k::BlockQ4K;
pub use q5_0::BlockQ5_0;
pub use q5_1::BlockQ5_1;
pub use q5_k::BlockQ5K;
pub use q6_k::BlockQ6K;
pub use q8_0::BlockQ8_0;
pub use q8_1::BlockQ8_1;
pub use q8_k::BlockQ8K;
pub use tq1_0::BlockTQ1_0;
pub use tq2_0::BlockTQ2_0;

use crate::{Error, GgmlType, Result};

/// Calls `$with!(Type, Block)` for the block struct of `$ty`, or evaluates `$otherwise`.
macro_rules! with_block {
    ($ty:expr, $with:ident, $otherwise:expr) => {
        match $ty {
            GgmlType::Q1_0 => $with!(Q1_0, BlockQ1_0),
            GgmlType::Q2_0 => $with!(Q2_0, BlockQ2_0),
            GgmlType::Q4_0 => $with!(Q4_0, BlockQ4_0),
            GgmlType::Q4_1 => $with!(Q4_1, BlockQ4_1),
            GgmlType::Q5_0 => $with!(Q5_0, BlockQ5_0),
            GgmlType::Q5_1 => $with!(Q5_1, BlockQ5_1),
            GgmlType::Q8_0 => $with!(Q8_0, BlockQ8_0),
            GgmlType::Q8_1 => $with!(Q8_1, BlockQ8_1),
            GgmlType::Q2_K => $with!(Q2_K, BlockQ2K),
            GgmlType::Q3_K => $with!(Q3_K, BlockQ3K),
            GgmlType::Q4_K => $with!(Q4_K, BlockQ4K),
            GgmlType::Q5_K => $with!(Q5_K, BlockQ5K),
            GgmlType::Q6_K => $with!(Q6_K, BlockQ6K),
            GgmlType::Q8_K => $with!(Q8_K, BlockQ8K),
            GgmlType::IQ4_NL => $with!(IQ4_NL, BlockIQ4NL),
            GgmlType::IQ4_XS => $with!(IQ4_XS, BlockIQ4XS),
            GgmlType::MXFP4 => $with!(MXFP4, BlockMXFP4),
            GgmlType::NVFP4 => $with!(NVFP4, BlockNVFP4),
            GgmlType::TQ1_0 => $with!(TQ1_0, BlockTQ1_0),
            GgmlType::TQ2_0 => $with!(TQ2_0, BlockTQ2_0),
            _ => $otherwise,
        }
    };
}

/// Decodes whole rows.
///
/// `bytes`: rows of `ty` without gaps; `out`: as many values as they hold, in element order.
///
/// # Errors
///
/// Malformed if `bytes` and `out` do not belong together, unsupported for integer types, F64 and the
/// types with large tables (IQ1, IQ2, IQ3).
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    if ty.bytes_for(out.len() as u64) != Some(bytes.len() as u64) {
        let (found, elements) = (bytes.len(), out.len());
        return Err(Error::malformed(format!(
            "{elements} elements of {ty} do not take {found} bytes"
        )));
    }
    macro_rules! unpack {
        ($ty:ident, $block:ident) => {
            for (block, out) in bytemuck::cast_slice::<u8, $block>(bytes)
                .iter()
                .zip(out.as_chunks_mut().0)
            {
                block.unpack(out);
            }
        };
    }
    match ty {
        GgmlType::F32 => out
            .iter_mut()
            .zip(words(bytes))
            .for_each(|(x, word)| *x = f32::from_le_bytes(*word)),
        // A shift, as ggml has it: a library call that looks for NaN would not become vectors.
        GgmlType::BF16 => out
            .iter_mut()
            .zip(words(bytes))
            .for_each(|(x, word)| *x = f32::from_bits(u32::from(u16::from_le_bytes(*word)) << 16)),
        GgmlType::F16 => unpack_f16(bytes, out),
        _ => with_block!(
            ty,
            unpack,
            return Err(Error::unsupported(format!("{ty} cannot be decoded")))
        ),
    }
    Ok(())
}

fn words<const BYTES: usize>(bytes: &[u8]) -> &[[u8; BYTES]] {
    bytes.as_chunks().0
}

/// Tile by tile, because the bytes may be unaligned and the conversion works on slices.
fn unpack_f16(bytes: &[u8], out: &mut [f32]) {
    const TILE: usize = 256;
    let mut tile = [f16::ZERO; TILE];
    for (bytes, out) in bytes.chunks(2 * TILE).zip(out.chunks_mut(TILE)) {
        let tile = &mut tile[..out.len()];
        tile.iter_mut()
            .zip(words(bytes))
            .for_each(|(x, word)| *x = f16::from_le_bytes(*word));
        tile.convert_to_f32_slice(out);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use safetensors::SafeTensors;

    use super::*;

    const REFERENCE: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../fixtures/reference/blocks/blocks.safetensors"
    );

    /// Calls `check(type, bytes, values)` for every type in the reference file.
    fn for_each_reference(mut check: impl FnMut(GgmlType, &[u8], &[f32])) {
        let file = fs::read(Path::new(REFERENCE)).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let names = tensors
            .names()
            .into_iter()
            .filter_map(|name| name.strip_suffix(".bytes"));
        for name in names {
            let bytes = tensors.tensor(&format!("{name}.bytes")).unwrap();
            let values = tensors.tensor(&format!("{name}.values")).unwrap();
            let floats: Vec<f32> = words(values.data())
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect();
            check(name.parse().unwrap(), bytes.data(), &floats);
        }
    }

    #[test]
    fn decoders_agree_with_the_reference() {
        let mut types = 0;
        for_each_reference(|ty, bytes, values| {
            // Mapped files give no alignment: check at an odd address.
            let shifted = [&[0], bytes].concat();
            let mut out = vec![f32::NAN; values.len()];
            dequantize(ty, &shifted[1..], &mut out).unwrap();
            for (i, (ours, theirs)) in out.iter().zip(values).enumerate() {
                assert_eq!(
                    ours.to_bits(),
                    theirs.to_bits(),
                    "{ty} element {i}: {ours} and {theirs}"
                );
            }
            types += 1;
        });
        assert_eq!(types, 23, "types in the reference file");
    }

    #[test]
    fn blocks_come_back_from_their_parts() {
        for_each_reference(|ty, bytes, _| {
            macro_rules! check {
                (Q2_K, $block:ident) => { check!(@ $block, (d, dmin, scales, mins, codes), (d, dmin, &scales, &mins, &codes)) };
                (Q4_K, $block:ident) => { check!(@ $block, (d, dmin, scales, mins, codes), (d, dmin, &scales, &mins, &codes)) };
                (Q5_K, $block:ident) => { check!(@ $block, (d, dmin, scales, mins, codes), (d, dmin, &scales, &mins, &codes)) };
                (Q3_K, $block:ident) => { check!(@ $block, (d, scales, codes), (d, &scales, &codes)) };
                (Q6_K, $block:ident) => { check!(@ $block, (d, scales, codes), (d, &scales, &codes)) };
                (IQ4_XS, $block:ident) => { check!(@ $block, (d, scales, codes), (d, &scales, &codes)) };
                (Q4_1, $block:ident) => { check!(@ $block, (d, m, codes), (d, m, &codes)) };
                (Q5_1, $block:ident) => { check!(@ $block, (d, m, codes), (d, m, &codes)) };
                (Q8_1, $block:ident) => { check!(@ $block, (d, s, codes), (d, s, &codes)) };
                (NVFP4, $block:ident) => { check!(@ $block, (d, codes), (&d, &codes)) };
                ($ty:ident, $block:ident) => { check!(@ $block, (d, codes), (d, &codes)) };
                (@ $block:ident, ($($part:ident),*), ($($argument:expr),*)) => {
                    for block in bytemuck::cast_slice::<u8, $block>(bytes) {
                        let ($($part),*) = block.parts();
                        assert_eq!($block::pack($($argument),*), *block, "{ty}");
                        assert_eq!((size_of::<$block>(), $block::ELEMENTS), (ty.block_bytes(), ty.block_elements()));
                    }
                };
            }
            with_block!(ty, check, ());
        });
    }

    #[test]
    fn codes_too_large_do_not_spill() {
        let codes = [0xff; 256];
        assert_eq!(
            BlockQ4K::pack(f16::ONE, f16::ONE, &[63; 8], &[63; 8], &codes)
                .parts()
                .4,
            [15; 256]
        );
        assert_eq!(
            BlockQ3K::pack(f16::ONE, &[31; 16], &codes).parts(),
            (f16::ONE, [31; 16], [7; 256])
        );
        assert_eq!(BlockTQ1_0::pack(f16::ONE, &codes).parts().1, [2; 256]);
    }

    #[test]
    fn sizes_that_do_not_match_are_errors() {
        let mut out = [0.0; 64];
        for (ty, bytes) in [
            (GgmlType::Q8_0, 67),
            (GgmlType::Q8_0, 0),
            (GgmlType::Q4_K, 36),
            (GgmlType::IQ2_S, 82),
        ] {
            assert!(
                dequantize(ty, &vec![0; bytes], &mut out).is_err(),
                "{ty} {bytes}"
            );
        }
        assert!(dequantize(GgmlType::IQ2_S, &[0; 82], &mut [0.0; 256]).is_err());
    }
}
