//! The kernels without intrinsics: the definition that the others are tested against, and what other CPUs run.
//!
//! The same code compiled with AVX2 and FMA is the twin for machines without AVX-512.

use super::{
    Ahead, BlockInput, BlockRows, Blocks, CodeTile, FLOAT_ROWS, FloatTile, Halves, LANES,
    SuperBlocks, SuperInput, SuperRows,
};

/// `a * b + c`, fused where the machine has the instruction: without it a fused product is a function call.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
pub fn float<const TOKENS: usize, const FUSED: bool>(
    weights: Halves<'_, f32>,
    input: &[f32],
    sums: &mut FloatTile,
) {
    for (token, sums) in sums.iter_mut().enumerate().take(TOKENS) {
        for (weights, sums) in weights.iter().zip(sums.as_chunks_mut::<LANES>().0) {
            *sums = [0.0; LANES];
            for (weights, input) in weights.iter().zip(input.chunks_exact(TOKENS)) {
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = multiply_add::<FUSED>(*weight, input[token], *sum);
                }
            }
        }
    }
}

#[inline(always)]
fn low_bf16(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

#[inline(always)]
fn high_bf16(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}

#[inline(always)]
pub fn bf16<const TOKENS: usize, const FUSED: bool>(
    weights: Halves<'_, u32>,
    input: &[u32],
    sums: &mut FloatTile,
) {
    for (token, sums) in sums.iter_mut().enumerate().take(TOKENS) {
        for (weights, sums) in weights.iter().zip(sums.as_chunks_mut::<LANES>().0) {
            *sums = [0.0; LANES];
            for (weights, input) in weights.iter().zip(input.chunks_exact(TOKENS)) {
                let (x0, x1) = (low_bf16(input[token]), high_bf16(input[token]));
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    let first = multiply_add::<FUSED>(low_bf16(*weight), x0, *sum);
                    *sum = multiply_add::<FUSED>(high_bf16(*weight), x1, first);
                }
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
        for (block, lanes) in weights.scales.iter().enumerate() {
            let at = block * TOKENS + token;
            let mut mins = [0_i32; LANES];
            for pair in 0..subs / 2 {
                let sum = input.sums[(block * subs / 2 + pair) * TOKENS + token];
                for (min, weight) in mins.iter_mut().zip(&lanes.mins[pair]) {
                    let product = |shift: u32| {
                        i32::from((weight >> shift) as i16) * i32::from((sum >> shift) as i16)
                    };
                    *min += product(0) + product(16);
                }
            }
            let mut total = [0_i32; LANES];
            for sub in 0..subs {
                let mut products = [0_i32; LANES];
                let first = 64 * block + sub * weights.sub_words;
                for word in first..first + weights.sub_words {
                    add_products(
                        &mut products,
                        &weights.codes[word],
                        input.codes[word * TOKENS + token],
                    );
                }
                for lane in 0..LANES {
                    total[lane] += products[lane] * lanes.scales[sub][lane];
                }
            }
            for lane in 0..LANES {
                let (mut total, scale) = (total[lane], lanes.d[lane] * input.d[at]);
                if weights.has_dmin {
                    let scale = -lanes.dmin[lane] * input.d[at];
                    sums[lane] = multiply_add::<FUSED>(mins[lane] as f32, scale, sums[lane]);
                } else {
                    total -= mins[lane];
                }
                sums[lane] = multiply_add::<FUSED>(total as f32, scale, sums[lane]);
            }
        }
    }
}

#[inline(always)]
pub fn float_rows<const FUSED: bool>(
    rows: [&[u32]; FLOAT_ROWS],
    input: &[u32],
    _ahead: Ahead,
) -> [f32; FLOAT_ROWS] {
    let mut sums = [0.0; FLOAT_ROWS];
    for (word, x) in input.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = multiply_add::<FUSED>(f32::from_bits(row[word]), f32::from_bits(*x), *sum);
        }
    }
    sums
}

#[inline(always)]
pub fn bf16_rows<const FUSED: bool>(
    rows: [&[u32]; FLOAT_ROWS],
    input: &[u32],
    _ahead: Ahead,
) -> [f32; FLOAT_ROWS] {
    let mut sums = [0.0; FLOAT_ROWS];
    for (word, x) in input.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            let first = multiply_add::<FUSED>(low_bf16(row[word]), low_bf16(*x), *sum);
            *sum = multiply_add::<FUSED>(high_bf16(row[word]), high_bf16(*x), first);
        }
    }
    sums
}

/// The sum of products of unsigned weights and signed activations.
#[inline(always)]
fn dot(weights: &[u32], input: &[u32]) -> i32 {
    let weights: &[u8] = bytemuck::cast_slice(weights);
    let input: &[i8] = bytemuck::cast_slice(input);
    let products = weights.iter().zip(input);
    products.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum()
}

#[inline(always)]
pub fn block_rows<const FUSED: bool>(rows: BlockRows, input: BlockInput) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for ((sum, codes), scales) in sums.iter_mut().zip(rows.codes).zip(rows.scales) {
        for (block, d) in input.d.iter().enumerate() {
            let words = 8 * block..8 * block + 8;
            let product = input.start[block] + dot(&codes[words.clone()], &input.codes[words]);
            *sum = multiply_add::<FUSED>(product as f32, scales.d[block] * d, *sum);
            if rows.affine {
                *sum = multiply_add::<FUSED>(scales.m[block], input.s[block], *sum);
            }
        }
    }
    sums
}

#[inline(always)]
pub fn super_rows<const FUSED: bool>(rows: SuperRows, input: SuperInput) -> [f32; LANES] {
    let subs = 64 / rows.sub_words;
    let mut sums = [0.0; LANES];
    for ((sum, codes), scales) in sums.iter_mut().zip(rows.codes).zip(rows.scales) {
        for (block, (scales, d)) in scales.iter().zip(input.d).enumerate() {
            let (mut total, mut min) = (0, 0);
            for sub in 0..subs {
                let first = 64 * block + sub * rows.sub_words;
                let words = first..first + rows.sub_words;
                total += scales.scales[sub] * dot(&codes[words.clone()], &input.codes[words]);
                let pair = input.sums[(block * subs + sub) / 2];
                let x_sum = (pair >> (16 * (sub % 2))) as i16;
                min += i32::from(scales.mins[sub]) * i32::from(x_sum);
            }
            match rows.has_dmin {
                true => *sum = multiply_add::<FUSED>(min as f32, -scales.dmin * d, *sum),
                false => total -= min,
            }
            *sum = multiply_add::<FUSED>(total as f32, scales.d * d, *sum);
        }
    }
    sums
}

pub fn interleave(rows: [&[u32]; LANES], panel: &mut [[u32; LANES]]) {
    for (word, lanes) in panel.iter_mut().enumerate() {
        *lanes = rows.map(|row| row[word]);
    }
}

pub fn widen(pairs: &[[u32; LANES]], words: &mut [[u32; LANES]]) {
    let (words, _) = words.as_chunks_mut::<2>();
    for (pair, words) in pairs.iter().zip(words) {
        *words = [
            pair.map(|word| word << 16),
            pair.map(|word| word & 0xffff_0000),
        ];
    }
}

/// The same loops, compiled for AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
pub mod avx2 {
    use super::*;

    #[target_feature(enable = "avx2,fma")]
    pub fn float<const TOKENS: usize>(
        weights: Halves<'_, f32>,
        input: &[f32],
        sums: &mut FloatTile,
    ) {
        super::float::<TOKENS, true>(weights, input, sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn bf16<const TOKENS: usize>(
        weights: Halves<'_, u32>,
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

    #[target_feature(enable = "avx2,fma")]
    pub fn float_rows(
        rows: [&[u32]; FLOAT_ROWS],
        input: &[u32],
        ahead: Ahead,
    ) -> [f32; FLOAT_ROWS] {
        super::float_rows::<true>(rows, input, ahead)
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn bf16_rows(rows: [&[u32]; FLOAT_ROWS], input: &[u32], ahead: Ahead) -> [f32; FLOAT_ROWS] {
        super::bf16_rows::<true>(rows, input, ahead)
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn block_rows(rows: BlockRows, input: BlockInput) -> [f32; LANES] {
        super::block_rows::<true>(rows, input)
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn super_rows(rows: SuperRows, input: SuperInput) -> [f32; LANES] {
        super::super_rows::<true>(rows, input)
    }
}
