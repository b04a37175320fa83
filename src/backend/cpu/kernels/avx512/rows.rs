//! Sixteen rows as they are stored times one token, with the sums of the panels bit for bit.
//!
//! Integer sums are exact in any order, so codes are multiplied along their row. Float sums run over the columns in
//! order, so floats are transposed in registers first.

use std::arch::x86_64::*;

use super::super::{Ahead, BlockInput, BlockRows, FLOAT_ROWS, LANES, SuperInput, SuperRows};
use super::lanes::{
    dot_bf16, load_floats, load_integers, load_words, store_floats, sum_halves, sum_lanes,
    transpose,
};

#[target_feature(enable = "avx512f,avx512bf16")]
pub fn float_rows(rows: [&[u32]; FLOAT_ROWS], input: &[u32], ahead: Ahead) -> [f32; FLOAT_ROWS] {
    word_rows::<false>(rows, input, ahead)
}

#[target_feature(enable = "avx512f,avx512bf16")]
pub fn bf16_rows(rows: [&[u32]; FLOAT_ROWS], input: &[u32], ahead: Ahead) -> [f32; FLOAT_ROWS] {
    word_rows::<true>(rows, input, ahead)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_product<const BF16: bool>(sum: __m512, weights: __m512i, input: u32) -> __m512 {
    let input = _mm512_set1_epi32(input as i32);
    match BF16 {
        true => dot_bf16(sum, weights, input),
        false => _mm512_fmadd_ps(
            _mm512_castsi512_ps(weights),
            _mm512_castsi512_ps(input),
            sum,
        ),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn word_rows<const BF16: bool>(
    rows: [&[u32]; FLOAT_ROWS],
    input: &[u32],
    ahead: Ahead,
) -> [f32; FLOAT_ROWS] {
    let mut sums = [_mm512_setzero_ps(); 2];
    let (tiles, rest) = input.as_chunks::<LANES>();
    for (index, input) in tiles.iter().enumerate() {
        for (half, sum) in sums.iter_mut().enumerate() {
            let mut words = [_mm512_setzero_si512(); LANES];
            for (lane, words) in words.iter_mut().enumerate() {
                let (tiles, _) = rows[LANES * half + lane].as_chunks::<LANES>();
                *words = load_words(&tiles[index]);
                ahead.fetch_line(FLOAT_ROWS * index + LANES * half + lane);
            }
            for (column, input) in transpose(words).into_iter().zip(input) {
                *sum = add_product::<BF16>(*sum, column, *input);
            }
        }
    }
    let first = tiles.len() * LANES;
    for (word, input) in rest.iter().enumerate() {
        for (half, sum) in sums.iter_mut().enumerate() {
            let words = std::array::from_fn(|lane| rows[LANES * half + lane][first + word]);
            *sum = add_product::<BF16>(*sum, load_words(&words), *input);
        }
    }
    let mut out = [0.0; FLOAT_ROWS];
    let (halves, _) = out.as_chunks_mut::<LANES>();
    store_floats(&mut halves[0], sums[0]);
    store_floats(&mut halves[1], sums[1]);
    out
}

/// Up to sixteen words.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_some(words: &[u32]) -> __m512i {
    let mask = u16::MAX >> (LANES - words.len().min(LANES));
    // SAFETY: the mask has no more bits than the slice has words; words beyond it are not read.
    unsafe { _mm512_maskz_loadu_epi32(mask, words.as_ptr().cast()) }
}

/// One vector per row with a scale per block becomes one per block with a scale per row.
#[inline]
#[target_feature(enable = "avx512f")]
fn by_block(rows: [&[f32; LANES]; LANES]) -> [__m512; LANES] {
    let mut words = [_mm512_setzero_si512(); LANES];
    for (words, row) in words.iter_mut().zip(rows) {
        *words = _mm512_castps_si512(load_floats(row));
    }
    let mut blocks = [_mm512_setzero_ps(); LANES];
    for (block, words) in blocks.iter_mut().zip(transpose(words)) {
        *block = _mm512_castsi512_ps(words);
    }
    blocks
}

#[target_feature(enable = "avx512f,avx512vnni")]
pub fn block_rows(rows: BlockRows, input: BlockInput) -> [f32; LANES] {
    let d = by_block(rows.scales.each_ref().map(|scales| &scales.d));
    let m = match rows.affine {
        true => by_block(rows.scales.each_ref().map(|scales| &scales.m)),
        false => d,
    };
    let mut sum = _mm512_setzero_ps();
    for (pair, input_d) in input.d.chunks(2).enumerate() {
        let words = 16 * pair..16 * pair + 8 * input_d.len();
        let x = load_some(&input.codes[words.clone()]);
        let mut products = [_mm512_setzero_si512(); LANES];
        for (products, codes) in products.iter_mut().zip(rows.codes) {
            let w = load_some(&codes[words.clone()]);
            *products = _mm512_dpbusd_epi32(*products, w, x);
        }
        let products = sum_halves(products);
        for (half, input_d) in input_d.iter().enumerate() {
            let block = 2 * pair + half;
            let start = _mm512_set1_epi32(input.start[block]);
            let product = _mm512_cvtepi32_ps(_mm512_add_epi32(products[half], start));
            let scale = _mm512_mul_ps(d[block], _mm512_set1_ps(*input_d));
            sum = _mm512_fmadd_ps(product, scale, sum);
            if rows.affine {
                sum = _mm512_fmadd_ps(m[block], _mm512_set1_ps(input.s[block]), sum);
            }
        }
    }
    let mut out = [0.0; LANES];
    store_floats(&mut out, sum);
    out
}

#[target_feature(enable = "avx512f,avx512vnni,avx512vl,avx512bw")]
pub fn super_rows(rows: SuperRows, input: SuperInput) -> [f32; LANES] {
    match (rows.sub_words, rows.has_dmin) {
        (8, false) => super_rows_of::<8, false>(rows, input),
        (8, true) => super_rows_of::<8, true>(rows, input),
        (_, false) => super_rows_of::<4, false>(rows, input),
        (_, true) => super_rows_of::<4, true>(rows, input),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni,avx512vl,avx512bw")]
fn super_rows_of<const WORDS: usize, const DMIN: bool>(
    rows: SuperRows,
    input: SuperInput,
) -> [f32; LANES] {
    // Four words of a vector belong to one sub-block of 16 weights, eight to one of 32.
    let spread: [__m512i; 4] = std::array::from_fn(|part| {
        let index = std::array::from_fn(|word| ((LANES * part + word) / WORDS) as i32);
        load_integers(&index)
    });
    let (inputs, _) = input.codes.as_chunks::<64>();
    let pairs = 32 / WORDS;
    let mut sum = _mm512_setzero_ps();
    for (block, (x, input_d)) in inputs.iter().zip(input.d).enumerate() {
        let (x, _) = x.as_chunks::<LANES>();
        let x: [__m512i; 4] = std::array::from_fn(|part| load_words(&x[part]));
        let x_sums = half_of(&input.sums[pairs * block..pairs * (block + 1)]);
        let (mut totals, mut mins) = (
            [_mm512_setzero_si512(); LANES],
            [_mm512_setzero_si512(); LANES],
        );
        let (mut d, mut dmin) = ([0.0; LANES], [0.0; LANES]);
        for lane in 0..LANES {
            let scales = &rows.scales[lane][block];
            (d[lane], dmin[lane]) = (scales.d, scales.dmin);
            let (codes, _) = rows.codes[lane][64 * block..].as_chunks::<LANES>();
            let all = load_integers(&scales.scales);
            let mut total = _mm512_setzero_si512();
            for part in 0..4 {
                let zero = _mm512_setzero_si512();
                let products = _mm512_dpbusd_epi32(zero, load_words(&codes[part]), x[part]);
                let scale = _mm512_permutexvar_epi32(spread[part], all);
                total = _mm512_add_epi32(total, _mm512_mullo_epi32(products, scale));
            }
            let min = _mm256_madd_epi16(load_shorts(&scales.mins), x_sums);
            let min = _mm512_zextsi256_si512(min);
            match DMIN {
                true => mins[lane] = min,
                false => total = _mm512_sub_epi32(total, min),
            }
            totals[lane] = total;
        }
        if DMIN {
            let scale = _mm512_mul_ps(load_floats(&dmin), _mm512_set1_ps(*input_d));
            sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum_lanes(mins)), scale, sum);
        }
        let scale = _mm512_mul_ps(load_floats(&d), _mm512_set1_ps(*input_d));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum_lanes(totals)), scale, sum);
    }
    let mut out = [0.0; LANES];
    store_floats(&mut out, sum);
    out
}

/// Up to eight words, zeros behind them.
#[inline]
#[target_feature(enable = "avx512f")]
fn half_of(words: &[u32]) -> __m256i {
    _mm512_castsi512_si256(load_some(words))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_shorts(values: &[i16; LANES]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}
