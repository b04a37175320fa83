//! Panels of sixteen interleaved rows times a tile of tokens.
//!
//! Sums stay in registers: a tile of 8 tokens has 16 vectors of float sums, or 8 of float and 16 of integer sums.

#![allow(
    clippy::needless_range_loop,
    reason = "sums that an iterator borrows are kept in memory, not in registers"
)]

use std::arch::x86_64::*;

use super::super::{
    BlockInput, Blocks, CodeTile, FloatTile, Halves, LANES, SuperBlocks, SuperInput,
};
use super::lanes::{dot_bf16, load_floats, load_integers, load_words, store_floats};

/// Inputs that are asked for before they are multiplied: strips of a large matrix come from far away.
const PREFETCHED: usize = 32;

#[target_feature(enable = "avx512f")]
pub fn float<const TOKENS: usize>(weights: Halves<'_, f32>, input: &[f32], tile: &mut FloatTile) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TOKENS];
    let (input, _) = input.as_chunks::<TOKENS>();
    for ((w0, w1), input) in weights[0].iter().zip(weights[1]).zip(input) {
        let ahead = input.as_ptr().wrapping_add(PREFETCHED * TOKENS);
        // Nothing is read, and an address that is nobody's is ignored.
        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        let (w0, w1) = (load_floats(w0), load_floats(w1));
        for token in 0..TOKENS {
            let x = _mm512_set1_ps(input[token]);
            sums[token][0] = _mm512_fmadd_ps(w0, x, sums[token][0]);
            sums[token][1] = _mm512_fmadd_ps(w1, x, sums[token][1]);
        }
    }
    for token in 0..TOKENS {
        let (halves, _) = tile[token].as_chunks_mut::<LANES>();
        store_floats(&mut halves[0], sums[token][0]);
        store_floats(&mut halves[1], sums[token][1]);
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
pub fn bf16<const TOKENS: usize>(weights: Halves<'_, u32>, input: &[u32], tile: &mut FloatTile) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TOKENS];
    let (input, _) = input.as_chunks::<TOKENS>();
    for ((w0, w1), input) in weights[0].iter().zip(weights[1]).zip(input) {
        let (w0, w1) = (load_words(w0), load_words(w1));
        for token in 0..TOKENS {
            let x = _mm512_set1_epi32(input[token] as i32);
            sums[token][0] = dot_bf16(sums[token][0], w0, x);
            sums[token][1] = dot_bf16(sums[token][1], w1, x);
        }
    }
    for token in 0..TOKENS {
        let (halves, _) = tile[token].as_chunks_mut::<LANES>();
        store_floats(&mut halves[0], sums[token][0]);
        store_floats(&mut halves[1], sums[token][1]);
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
pub fn blocks<const TOKENS: usize>(weights: Blocks, input: BlockInput, tile: &mut CodeTile) {
    let mut sums = [_mm512_setzero_ps(); TOKENS];
    let (codes, _) = weights.codes.as_chunks::<8>();
    let (inputs, _) = input.codes.as_chunks::<TOKENS>();
    let (inputs, _) = inputs.as_chunks::<8>();
    let (scales, _) = input.d.as_chunks::<TOKENS>();
    let (starts, _) = input.start.as_chunks::<TOKENS>();
    let (block_sums, _) = input.s.as_chunks::<TOKENS>();
    let blocks = weights
        .d
        .iter()
        .zip(codes)
        .zip(inputs)
        .zip(scales)
        .zip(starts);
    for (block, ((((d, codes), inputs), scales), starts)) in blocks.enumerate() {
        let mut products = [_mm512_setzero_si512(); TOKENS];
        for token in 0..TOKENS {
            products[token] = _mm512_set1_epi32(starts[token]);
        }
        for (codes, input) in codes.iter().zip(inputs) {
            let w = load_words(codes);
            for token in 0..TOKENS {
                let x = _mm512_set1_epi32(input[token] as i32);
                products[token] = _mm512_dpbusd_epi32(products[token], w, x);
            }
        }
        let d = load_floats(d);
        for token in 0..TOKENS {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(scales[token]));
            let product = _mm512_cvtepi32_ps(products[token]);
            sums[token] = _mm512_fmadd_ps(product, scale, sums[token]);
        }
        if let (Some(m), Some(block_sums)) = (weights.m.get(block), block_sums.get(block)) {
            let m = load_floats(m);
            for token in 0..TOKENS {
                sums[token] = _mm512_fmadd_ps(m, _mm512_set1_ps(block_sums[token]), sums[token]);
            }
        }
    }
    for token in 0..TOKENS {
        store_floats(&mut tile[token], sums[token]);
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
pub fn super_blocks<const TOKENS: usize>(
    weights: SuperBlocks,
    input: SuperInput,
    tile: &mut CodeTile,
) {
    match (weights.sub_words, weights.has_dmin) {
        (8, false) => super_blocks_of::<TOKENS, 8, false>(weights, input, tile),
        (8, true) => super_blocks_of::<TOKENS, 8, true>(weights, input, tile),
        (_, false) => super_blocks_of::<TOKENS, 4, false>(weights, input, tile),
        (_, true) => super_blocks_of::<TOKENS, 4, true>(weights, input, tile),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn super_blocks_of<const TOKENS: usize, const WORDS: usize, const DMIN: bool>(
    weights: SuperBlocks,
    input: SuperInput,
    tile: &mut CodeTile,
) {
    let subs = 64 / WORDS;
    let mut sums = [_mm512_setzero_ps(); TOKENS];
    let (codes, _) = weights.codes.as_chunks::<WORDS>();
    let (inputs, _) = input.codes.as_chunks::<TOKENS>();
    let (inputs, _) = inputs.as_chunks::<WORDS>();
    let (pair_sums, _) = input.sums.as_chunks::<TOKENS>();
    let (scales, _) = input.d.as_chunks::<TOKENS>();
    for (block, (lanes, scales)) in weights.scales.iter().zip(scales).enumerate() {
        let mut mins = [_mm512_setzero_si512(); TOKENS];
        let pairs = block * subs / 2..(block + 1) * subs / 2;
        for (w, sums) in lanes.mins.iter().zip(&pair_sums[pairs]) {
            let w = load_words(w);
            for token in 0..TOKENS {
                let x = _mm512_set1_epi32(sums[token] as i32);
                mins[token] = _mm512_dpwssd_epi32(mins[token], w, x);
            }
        }
        let mut totals = [_mm512_setzero_si512(); TOKENS];
        if DMIN {
            let dmin = load_floats(&lanes.dmin);
            for token in 0..TOKENS {
                let scale = _mm512_mul_ps(dmin, _mm512_set1_ps(scales[token]));
                sums[token] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins[token]), scale, sums[token]);
            }
        } else {
            for token in 0..TOKENS {
                totals[token] = _mm512_sub_epi32(totals[token], mins[token]);
            }
        }
        let range = block * subs..(block + 1) * subs;
        let rows = codes[range.clone()].iter().zip(&inputs[range]);
        for ((codes, inputs), scale) in rows.zip(&lanes.scales) {
            let mut products = [_mm512_setzero_si512(); TOKENS];
            for (codes, input) in codes.iter().zip(inputs) {
                let w = load_words(codes);
                for token in 0..TOKENS {
                    let x = _mm512_set1_epi32(input[token] as i32);
                    products[token] = _mm512_dpbusd_epi32(products[token], w, x);
                }
            }
            let scale = load_integers(scale);
            for token in 0..TOKENS {
                let scaled = _mm512_mullo_epi32(products[token], scale);
                totals[token] = _mm512_add_epi32(totals[token], scaled);
            }
        }
        let d = load_floats(&lanes.d);
        for token in 0..TOKENS {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(scales[token]));
            sums[token] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(totals[token]), scale, sums[token]);
        }
    }
    for token in 0..TOKENS {
        store_floats(&mut tile[token], sums[token]);
    }
}
