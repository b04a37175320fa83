//! The kernels in AVX-512 with VNNI and BF16 dot products.
//!
//! Sums stay in registers: a tile of 8 tokens has 16 vectors of float sums, or 8 of float and 16 of integer sums.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::{BlockInput, Blocks, CodeTile, FloatTile, Halves, LANES, SuperBlocks, SuperInput};

#[inline]
#[target_feature(enable = "avx512f")]
fn load_floats(lanes: &[f32; LANES]) -> __m512 {
    // SAFETY: the array has the 64 bytes that are read; no alignment is needed.
    unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_words(lanes: &[u32; LANES]) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_integers(lanes: &[i32; LANES]) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_floats(lanes: &mut [f32; LANES], values: __m512) {
    // SAFETY: the array has the 64 bytes that are written; no alignment is needed.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), values) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_words(lanes: &mut [u32; LANES], values: __m512i) {
    // SAFETY: as above.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), values) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_tile<const TOKENS: usize>(sums: [[__m512; 2]; TOKENS], tile: &mut FloatTile) {
    for (sums, row) in sums.iter().zip(tile) {
        let (halves, _) = row.as_chunks_mut::<LANES>();
        store_floats(&mut halves[0], sums[0]);
        store_floats(&mut halves[1], sums[1]);
    }
}

#[target_feature(enable = "avx512f")]
pub fn float<const TOKENS: usize>(weights: Halves<'_, f32>, input: &[f32], tile: &mut FloatTile) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TOKENS];
    let (input, _) = input.as_chunks::<TOKENS>();
    for ((w0, w1), input) in weights[0].iter().zip(weights[1]).zip(input) {
        let (w0, w1) = (load_floats(w0), load_floats(w1));
        for token in 0..TOKENS {
            let x = _mm512_set1_ps(input[token]);
            sums[token][0] = _mm512_fmadd_ps(w0, x, sums[token][0]);
            sums[token][1] = _mm512_fmadd_ps(w1, x, sums[token][1]);
        }
    }
    store_tile(sums, tile);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_bf16(sum: __m512, weights: __m512i, input: __m512i) -> __m512 {
    // SAFETY: the vectors have the same 512 bits, seen as 32 BF16 values.
    let (w, x) = unsafe {
        (
            transmute::<__m512i, __m512bh>(weights),
            transmute::<__m512i, __m512bh>(input),
        )
    };
    _mm512_dpbf16_ps(sum, w, x)
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
    store_tile(sums, tile);
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
    for (sum, row) in sums.iter().zip(tile) {
        store_floats(row, *sum);
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
pub fn super_blocks<const TOKENS: usize>(
    weights: SuperBlocks,
    input: SuperInput,
    tile: &mut CodeTile,
) {
    match (weights.sub_words, weights.dmin.is_empty()) {
        (8, true) => super_blocks_of::<TOKENS, 8, false>(weights, input, tile),
        (8, false) => super_blocks_of::<TOKENS, 8, true>(weights, input, tile),
        (_, true) => super_blocks_of::<TOKENS, 4, false>(weights, input, tile),
        (_, false) => super_blocks_of::<TOKENS, 4, true>(weights, input, tile),
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
    for (block, (d, scales)) in weights.d.iter().zip(scales).enumerate() {
        let mut mins = [_mm512_setzero_si512(); TOKENS];
        let pairs = block * subs / 2..(block + 1) * subs / 2;
        for (w, sums) in weights.mins[pairs.clone()].iter().zip(&pair_sums[pairs]) {
            let w = load_words(w);
            for token in 0..TOKENS {
                let x = _mm512_set1_epi32(sums[token] as i32);
                mins[token] = _mm512_dpwssd_epi32(mins[token], w, x);
            }
        }
        let mut totals = [_mm512_setzero_si512(); TOKENS];
        if DMIN {
            let dmin = load_floats(&weights.dmin[block]);
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
        let rows = codes[range.clone()].iter().zip(&inputs[range.clone()]);
        for ((codes, inputs), scale) in rows.zip(&weights.scales[range]) {
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
        let d = load_floats(d);
        for token in 0..TOKENS {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(scales[token]));
            sums[token] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(totals[token]), scale, sums[token]);
        }
    }
    for (sum, row) in sums.iter().zip(tile) {
        store_floats(row, *sum);
    }
}

/// Sixteen rows of sixteen words at a time, in registers; the rest word by word.
#[target_feature(enable = "avx512f")]
pub fn interleave(rows: [&[u32]; LANES], panel: &mut [[u32; LANES]]) {
    let (tiles, rest) = panel.as_chunks_mut::<LANES>();
    let whole = tiles.len() * LANES;
    for (index, tile) in tiles.iter_mut().enumerate() {
        let mut row = [_mm512_setzero_si512(); LANES];
        for lane in 0..LANES {
            let (words, _) = rows[lane][index * LANES..].as_chunks::<LANES>();
            row[lane] = load_words(&words[0]);
        }
        let columns = transpose(row);
        for lane in 0..LANES {
            store_words(&mut tile[lane], columns[lane]);
        }
    }
    for (word, lanes) in rest.iter_mut().enumerate() {
        for lane in 0..LANES {
            lanes[lane] = rows[lane][whole + word];
        }
    }
}

/// A 16 x 16 transpose in four rounds: words, pairs of words, quarters within halves, halves.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512i; LANES]) -> [__m512i; LANES] {
    let zero = _mm512_setzero_si512();
    let (mut words, mut pairs, mut quarters, mut columns) =
        ([zero; LANES], [zero; LANES], [zero; LANES], [zero; LANES]);
    for i in (0..LANES).step_by(2) {
        words[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        words[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for i in (0..LANES).step_by(4) {
        for half in 0..2 {
            let (a, b) = (words[i + half], words[i + half + 2]);
            pairs[i + 2 * half] = _mm512_unpacklo_epi64(a, b);
            pairs[i + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    // `pairs[4 g + c]` holds, per 128-bit quarter q, column 4 q + c of rows 4 g .. 4 g + 4.
    for half in 0..2 {
        for c in 0..4 {
            let (a, b) = (pairs[8 * half + c], pairs[8 * half + 4 + c]);
            quarters[8 * half + c] = _mm512_shuffle_i32x4::<0x88>(a, b);
            quarters[8 * half + 4 + c] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        }
    }
    // Quarters 0 and 2 (or 1 and 3) of both row groups of a half.
    for odd in 0..2 {
        for c in 0..4 {
            let (a, b) = (quarters[4 * odd + c], quarters[8 + 4 * odd + c]);
            columns[4 * odd + c] = _mm512_shuffle_i32x4::<0x88>(a, b);
            columns[8 + 4 * odd + c] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        }
    }
    columns
}
