//! Vectors of sixteen words: loads and stores, transposes, sums over lanes.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::super::LANES;

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_floats(lanes: &[f32; LANES]) -> __m512 {
    // SAFETY: the array has the 64 bytes that are read; no alignment is needed.
    unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_words(lanes: &[u32; LANES]) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_integers(lanes: &[i32; LANES]) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_floats(lanes: &mut [f32; LANES], values: __m512) {
    // SAFETY: the array has the 64 bytes that are written; no alignment is needed.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), values) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_words(lanes: &mut [u32; LANES], values: __m512i) {
    // SAFETY: as above.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), values) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn dot_bf16(sum: __m512, weights: __m512i, input: __m512i) -> __m512 {
    // SAFETY: the vectors have the same 512 bits, seen as 32 BF16 values.
    let (w, x) = unsafe {
        (
            transmute::<__m512i, __m512bh>(weights),
            transmute::<__m512i, __m512bh>(input),
        )
    };
    _mm512_dpbf16_ps(sum, w, x)
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

#[target_feature(enable = "avx512f")]
pub fn widen(pairs: &[[u32; LANES]], words: &mut [[u32; LANES]]) {
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let (words, _) = words.as_chunks_mut::<2>();
    for (pair, [first, second]) in pairs.iter().zip(words) {
        let pair = load_words(pair);
        store_words(first, _mm512_slli_epi32::<16>(pair));
        store_words(second, _mm512_and_si512(pair, high));
    }
}

/// A 16 x 16 transpose in four rounds: words, pairs of words, quarters within halves, halves.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(r: [__m512i; LANES]) -> [__m512i; LANES] {
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

/// Sums of four lanes: quarter `q` of vector `i` has those of quarter `q` of rows `4 i` to `4 i + 3`.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_fours(r: [__m512i; LANES]) -> [__m512i; 4] {
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut fours) = ([zero; 8], [zero; 4]);
    for i in 0..8 {
        let (a, b) = (r[2 * i], r[2 * i + 1]);
        pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    for i in 0..4 {
        let (a, b) = (pairs[2 * i], pairs[2 * i + 1]);
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    fours
}

/// Sums over each four lanes of every row, one row per lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn sum_quarters(rows: [__m512i; LANES]) -> [__m512i; 4] {
    let f = sum_fours(rows);
    let (even0, odd0) = even_and_odd_quarters(f[0], f[1]);
    let (even1, odd1) = even_and_odd_quarters(f[2], f[3]);
    let (first, third) = even_and_odd_quarters(even0, even1);
    let (second, fourth) = even_and_odd_quarters(odd0, odd1);
    [first, second, third, fourth]
}

/// Sums over the lower and over the upper eight lanes of every row, each with one row per lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn sum_halves(rows: [__m512i; LANES]) -> [__m512i; 2] {
    let f = sum_fours(rows);
    let (even0, odd0) = even_and_odd_quarters(f[0], f[1]);
    let (even1, odd1) = even_and_odd_quarters(f[2], f[3]);
    let sums = (_mm512_add_epi32(even0, odd0), _mm512_add_epi32(even1, odd1));
    let (low, high) = even_and_odd_quarters(sums.0, sums.1);
    [low, high]
}

/// Quarters 0 and 2 of both vectors, and quarters 1 and 3.
#[inline]
#[target_feature(enable = "avx512f")]
fn even_and_odd_quarters(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
    (
        _mm512_shuffle_i32x4::<0x88>(a, b),
        _mm512_shuffle_i32x4::<0xdd>(a, b),
    )
}

/// Four words of every row become four vectors with one row per lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_fours(rows: [&[u8; 16]; LANES]) -> [__m512i; 4] {
    let load = |lane: usize| {
        // SAFETY: the array has the 16 bytes that are read; no alignment is needed.
        unsafe { _mm_loadu_si128(rows[lane].as_ptr().cast()) }
    };
    let mut r = [_mm512_setzero_si512(); 4];
    // Rows `i`, `i + 4`, `i + 8` and `i + 12` in the quarters of a vector: words are transposed within quarters.
    for (i, r) in r.iter_mut().enumerate() {
        let one = _mm512_castsi128_si512(load(i));
        let two = _mm512_inserti32x4::<1>(one, load(i + 4));
        let three = _mm512_inserti32x4::<2>(two, load(i + 8));
        *r = _mm512_inserti32x4::<3>(three, load(i + 12));
    }
    let low = (
        _mm512_unpacklo_epi32(r[0], r[1]),
        _mm512_unpacklo_epi32(r[2], r[3]),
    );
    let high = (
        _mm512_unpackhi_epi32(r[0], r[1]),
        _mm512_unpackhi_epi32(r[2], r[3]),
    );
    [
        _mm512_unpacklo_epi64(low.0, low.1),
        _mm512_unpackhi_epi64(low.0, low.1),
        _mm512_unpacklo_epi64(high.0, high.1),
        _mm512_unpackhi_epi64(high.0, high.1),
    ]
}

/// Sums over all lanes of every row, one row per lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn sum_lanes(rows: [__m512i; LANES]) -> __m512i {
    let [low, high] = sum_halves(rows);
    _mm512_add_epi32(low, high)
}
