//! Stored blocks of a row to unsigned codes and scales, as the integer kernels want them.
//!
//! Enters: the bytes of one row's blocks. Leaves: codes in element order, one scale per block. Knows no panels.

#![allow(
    clippy::needless_range_loop,
    reason = "zipped iterators are left as calls where a loop is compiled for wider vectors"
)]

use bytemuck::cast_slice;
use half::f16;
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, IQ4_NL_VALUES, MXFP4_VALUES, mxfp4_scale,
};

use super::kernels::{BlockScales, Isa, LANES, MAX_SUPER_BLOCKS, SuperScales};
use super::multiversion::multiversion;

/// Most blocks of 32 in a chunk of a row.
const MAX_BLOCKS: usize = LANES;

/// The table of IQ4_NL and IQ4_XS as unsigned codes around 128.
const IQ4_NL_CODES: [u8; 16] = unsigned(IQ4_NL_VALUES);
/// The table of MXFP4 as unsigned codes around 128.
const MXFP4_CODES: [u8; 16] = unsigned(MXFP4_VALUES);

/// Whole numbers from -128 to 127, moved by 128.
const fn unsigned(values: [f32; 16]) -> [u8; 16] {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < codes.len() {
        codes[i] = (values[i] as i32 + 128) as u8;
        i += 1;
    }
    codes
}

/// Whether super-blocks of this type have a `dmin`.
pub fn has_dmin(ty: GgmlType) -> bool {
    matches!(ty, GgmlType::Q2_K | GgmlType::Q4_K | GgmlType::Q5_K)
}

/// Unpacks the blocks of a chunk of a row: their bytes, codes, scales.
pub type UnpackBlocks = fn(Isa, &[u8], &mut [[u8; 32]], &mut BlockScales);
/// The same for super-blocks.
pub type UnpackSuperBlocks = fn(Isa, &[u8], &mut [[u8; 256]], &mut [SuperScales; MAX_SUPER_BLOCKS]);

/// How blocks of 32 are unpacked.
pub fn blocks(ty: GgmlType) -> UnpackBlocks {
    match ty {
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::IQ4_NL => iq4_nl,
        GgmlType::MXFP4 => mxfp4,
        _ => unreachable!("`Form::of` names the types of this form"),
    }
}

/// How super-blocks of 256 are unpacked.
pub fn super_blocks(ty: GgmlType) -> UnpackSuperBlocks {
    match ty {
        GgmlType::Q2_K => q2_k,
        GgmlType::Q3_K => q3_k,
        GgmlType::Q4_K => q4_k,
        GgmlType::Q5_K => q5_k,
        GgmlType::Q6_K => q6_k,
        GgmlType::IQ4_XS => iq4_xs,
        _ => unreachable!("`Form::of` names the types of this form"),
    }
}

/// F16 to f32 without the look at the processor that a library call takes each time.
#[inline(always)]
fn wide(half: f16) -> f32 {
    let bits = u32::from(half.to_bits());
    let magnitude = if bits & 0x7c00 == 0x7c00 {
        f32::from_bits((bits & 0x7fff) << 13 | 0x7f80_0000)
    } else {
        // The exponent is rebiased by a product, which makes subnormals right too: 2^112.
        f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000)
    };
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

macro_rules! block_types {
    ($($name:ident, $body:ident: $block:ident, |$b:ident, $out:ident| $scales:expr;)*) => {$(
        multiversion! {
            fn $name(bytes: &[u8], codes: &mut [[u8; 32]], scales: &mut BlockScales) = $body;
        }

        #[inline(always)]
        fn $body(bytes: &[u8], codes: &mut [[u8; 32]], scales: &mut BlockScales) {
            let blocks: &[$block] = cast_slice(bytes);
            for i in 0..blocks.len().min(codes.len()).min(MAX_BLOCKS) {
                let ($b, $out) = (&blocks[i], &mut codes[i]);
                (scales.d[i], scales.m[i]) = $scales;
            }
        }
    )*};
}

block_types! {
    q8_0, q8_0_body: BlockQ8_0, |b, out| {
        let (d, signed) = b.parts();
        for j in 0..32 {
            out[j] = signed[j] as u8 ^ 0x80;
        }
        (wide(d), 0.0)
    };
    q4_0, q4_0_body: BlockQ4_0, |b, out| {
        let (d, codes) = b.parts();
        *out = codes;
        (wide(d), 0.0)
    };
    q4_1, q4_1_body: BlockQ4_1, |b, out| {
        let (d, m, codes) = b.parts();
        *out = codes;
        (wide(d), wide(m))
    };
    q5_0, q5_0_body: BlockQ5_0, |b, out| {
        let (d, codes) = b.parts();
        *out = codes;
        (wide(d), 0.0)
    };
    q5_1, q5_1_body: BlockQ5_1, |b, out| {
        let (d, m, codes) = b.parts();
        *out = codes;
        (wide(d), wide(m))
    };
    iq4_nl, iq4_nl_body: BlockIQ4NL, |b, out| {
        let (d, codes) = b.parts();
        look_up(&codes, &IQ4_NL_CODES, out);
        (wide(d), 0.0)
    };
    mxfp4, mxfp4_body: BlockMXFP4, |b, out| {
        let (e, codes) = b.parts();
        look_up(&codes, &MXFP4_CODES, out);
        (mxfp4_scale(e), 0.0)
    };
}

#[inline(always)]
fn look_up<const N: usize>(indices: &[u8; N], table: &[u8; 16], out: &mut [u8; N]) {
    for j in 0..N {
        out[j] = table[usize::from(indices[j] & 15)];
    }
}

macro_rules! super_block_types {
    ($($name:ident, $body:ident: $block:ident, |$b:ident, $out:ident| $scales:expr;)*) => {$(
        multiversion! {
            fn $name(bytes: &[u8], codes: &mut [[u8; 256]], scales: &mut [SuperScales; MAX_SUPER_BLOCKS]) = $body;
        }

        #[inline(always)]
        fn $body(bytes: &[u8], codes: &mut [[u8; 256]], scales: &mut [SuperScales; MAX_SUPER_BLOCKS]) {
            let blocks: &[$block] = cast_slice(bytes);
            for i in 0..blocks.len().min(codes.len()).min(MAX_SUPER_BLOCKS) {
                let ($b, $out) = (&blocks[i], &mut codes[i]);
                scales[i] = $scales;
            }
        }
    )*};
}

super_block_types! {
    q2_k, q2_k_body: BlockQ2K, |b, out| {
        let (d, dmin, scales, mins, codes) = b.parts();
        *out = codes;
        affine(wide(d), wide(dmin), &scales, &mins)
    };
    q3_k, q3_k_body: BlockQ3K, |b, out| {
        let (d, scales, codes) = b.parts();
        *out = codes;
        symmetric(wide(d), &scales, 4)
    };
    q4_k, q4_k_body: BlockQ4K, |b, out| {
        let (d, dmin, scales, mins, codes) = b.parts();
        *out = codes;
        affine(wide(d), wide(dmin), &scales, &mins)
    };
    q5_k, q5_k_body: BlockQ5K, |b, out| {
        let (d, dmin, scales, mins, codes) = b.parts();
        *out = codes;
        affine(wide(d), wide(dmin), &scales, &mins)
    };
    q6_k, q6_k_body: BlockQ6K, |b, out| {
        let (d, scales, codes) = b.parts();
        *out = codes;
        symmetric(wide(d), &scales, 32)
    };
    iq4_xs, iq4_xs_body: BlockIQ4XS, |b, out| {
        let (d, scales, codes) = b.parts();
        look_up(&codes, &IQ4_NL_CODES, out);
        symmetric(wide(d), &scales, 128)
    };
}

/// `d * scale * (code - zero)`.
#[inline(always)]
fn symmetric<const N: usize>(d: f32, scales: &[i8; N], zero: i16) -> SuperScales {
    let mut all = SuperScales {
        d,
        ..SuperScales::default()
    };
    for j in 0..N {
        all.scales[j] = i32::from(scales[j]);
        all.mins[j] = i16::from(scales[j]) * zero;
    }
    all
}

/// `d * scale * code - dmin * min`.
#[inline(always)]
fn affine<const N: usize>(d: f32, dmin: f32, scales: &[u8; N], mins: &[u8; N]) -> SuperScales {
    let mut all = SuperScales {
        d,
        dmin,
        ..SuperScales::default()
    };
    for j in 0..N {
        all.scales[j] = i32::from(scales[j]);
        all.mins[j] = i16::from(mins[j]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_widened_exactly() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            let (found, expected) = (wide(half), half.to_f32());
            assert!(
                found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
        }
    }
}
