//! The kernels without intrinsics: the definition that the others are tested against, and what other CPUs run.
//!
//! The same code compiled with AVX2 and FMA is the twin for machines without AVX-512.

use super::{BlockInput, Blocks, CodeTile, FLOAT_ROWS, FloatTile, LANES, SuperBlocks, SuperInput};

/// `a * b + c`, fused where the machine has the instruction: without it a fused product is a function call.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
pub fn float<const TOKENS: usize, const FUSED: bool>(
    weights: &[[f32; FLOAT_ROWS]],
    input: &[f32],
    sums: &mut FloatTile,
) {
    for (token, sums) in sums.iter_mut().enumerate().take(TOKENS) {
        *sums = [0.0; FLOAT_ROWS];
        for (weights, input) in weights.iter().zip(input.chunks_exact(TOKENS)) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = multiply_add::<FUSED>(*weight, input[token], *sum);
            }
        }
    }
}

#[inline(always)]
pub fn bf16<const TOKENS: usize, const FUSED: bool>(
    weights: &[[u32; FLOAT_ROWS]],
    input: &[u32],
    sums: &mut FloatTile,
) {
    let low = |word: u32| f32::from_bits(word << 16);
    let high = |word: u32| f32::from_bits(word & 0xffff_0000);
    for (token, sums) in sums.iter_mut().enumerate().take(TOKENS) {
        *sums = [0.0; FLOAT_ROWS];
        for (weights, input) in weights.iter().zip(input.chunks_exact(TOKENS)) {
            let (x0, x1) = (low(input[token]), high(input[token]));
            for (sum, weight) in sums.iter_mut().zip(weights) {
                let first = multiply_add::<FUSED>(low(*weight), x0, *sum);
                *sum = multiply_add::<FUSED>(high(*weight), x1, first);
            }
        }
    }
}

/// Adds the products of four unsigned weights and four signed activations per lane.
#[inline(always)]
fn add_products(sums: &mut [i32; LANES], weights: &[u32; LANES], input: u32) {
    let x = input.to_le_bytes().map(|x| i32::from(x as i8));
    for (sum, weight) in sums.iter_mut().zip(weights) {
        let w = |byte: u32| (weight >> (8 * byte) & 0xff) as i32;
        *sum += w(0) * x[0] + w(1) * x[1] + w(2) * x[2] + w(3) * x[3];
    }
}

#[inline(always)]
pub fn blocks<const TOKENS: usize, const FUSED: bool>(
    weights: Blocks,
    input: BlockInput,
    sums: &mut CodeTile,
) {
    for (token, sums) in sums.iter_mut().enumerate().take(TOKENS) {
        *sums = [0.0; LANES];
        for (block, d) in weights.d.iter().enumerate() {
            let at = block * TOKENS + token;
            let mut products = [input.start[at]; LANES];
            for word in 8 * block..8 * block + 8 {
                add_products(
                    &mut products,
                    &weights.codes[word],
                    input.codes[word * TOKENS + token],
                );
            }
            for lane in 0..LANES {
                let scale = d[lane] * input.d[at];
                sums[lane] = multiply_add::<FUSED>(products[lane] as f32, scale, sums[lane]);
            }
            if let Some(m) = weights.m.get(block) {
                for lane in 0..LANES {
                    sums[lane] = multiply_add::<FUSED>(m[lane], input.s[at], sums[lane]);
                }
            }
        }
    }
}

#[inline(always)]
pub fn super_blocks<const TOKENS: usize, const FUSED: bool>(
    weights: SuperBlocks,
    input: SuperInput,
    sums: &mut CodeTile,
) {
    let subs = 64 / weights.sub_words;
    for (token, sums) in sums.iter_mut().enumerate().take(TOKENS) {
        *sums = [0.0; LANES];
        for (block, d) in weights.d.iter().enumerate() {
            let at = block * TOKENS + token;
            let mut mins = [0_i32; LANES];
            for pair in block * subs / 2..(block + 1) * subs / 2 {
                let sum = input.sums[pair * TOKENS + token];
                for (min, weight) in mins.iter_mut().zip(&weights.mins[pair]) {
                    let product = |shift: u32| {
                        i32::from((weight >> shift) as i16) * i32::from((sum >> shift) as i16)
                    };
                    *min += product(0) + product(16);
                }
            }
            let mut total = [0_i32; LANES];
            for sub in block * subs..(block + 1) * subs {
                let mut products = [0_i32; LANES];
                for word in sub * weights.sub_words..(sub + 1) * weights.sub_words {
                    add_products(
                        &mut products,
                        &weights.codes[word],
                        input.codes[word * TOKENS + token],
                    );
                }
                for lane in 0..LANES {
                    total[lane] += products[lane] * weights.scales[sub][lane];
                }
            }
            let dmin = weights.dmin.get(block);
            for lane in 0..LANES {
                let scale = d[lane] * input.d[at];
                let shared = if dmin.is_some() { 0 } else { mins[lane] };
                sums[lane] =
                    multiply_add::<FUSED>((total[lane] - shared) as f32, scale, sums[lane]);
                if let Some(dmin) = dmin {
                    let scale = -dmin[lane] * input.d[at];
                    sums[lane] = multiply_add::<FUSED>(mins[lane] as f32, scale, sums[lane]);
                }
            }
        }
    }
}

pub fn interleave(rows: [&[u32]; LANES], panel: &mut [[u32; LANES]]) {
    for (word, lanes) in panel.iter_mut().enumerate() {
        *lanes = rows.map(|row| row[word]);
    }
}

/// The same loops, compiled for AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
pub mod avx2 {
    use super::*;

    #[target_feature(enable = "avx2,fma")]
    pub fn float<const TOKENS: usize>(
        weights: &[[f32; FLOAT_ROWS]],
        input: &[f32],
        sums: &mut FloatTile,
    ) {
        super::float::<TOKENS, true>(weights, input, sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn bf16<const TOKENS: usize>(
        weights: &[[u32; FLOAT_ROWS]],
        input: &[u32],
        sums: &mut FloatTile,
    ) {
        super::bf16::<TOKENS, true>(weights, input, sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn blocks<const TOKENS: usize>(weights: Blocks, input: BlockInput, sums: &mut CodeTile) {
        super::blocks::<TOKENS, true>(weights, input, sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn super_blocks<const TOKENS: usize>(
        weights: SuperBlocks,
        input: SuperInput,
        sums: &mut CodeTile,
    ) {
        super::super_blocks::<TOKENS, true>(weights, input, sums);
    }
}
