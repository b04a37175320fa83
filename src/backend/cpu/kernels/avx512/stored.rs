//! Sixteen rows in their stored blocks times one token: codes go from the file into the product, the types that most
//! weights have. The sums are those of [`super::rows`] bit for bit.

use std::arch::x86_64::*;

use nemoconv_formats::block::{BlockQ4K, BlockQ6K, BlockQ8_0};

use super::super::{Ahead, BlockInput, LANES, SuperInput};
use super::lanes::{load_words, store_floats, sum_halves, sum_quarters, transpose_fours};

/// Sixteen halves as floats.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn widen(halves: [u16; LANES]) -> __m512 {
    // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; no alignment is needed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512vnni,avx512vl,avx512bw")]
pub fn q8_0_rows(rows: [&[BlockQ8_0]; LANES], input: BlockInput, ahead: Ahead) -> [f32; LANES] {
    /// Cache lines of two blocks of every row.
    const LINES: usize = LANES * 2 * size_of::<BlockQ8_0>() / 64;
    let unsigned = _mm512_set1_epi8(-128);
    let mut sum = _mm512_setzero_ps();
    let (inputs, _) = input.codes.as_chunks::<LANES>();
    for (pair, input_codes) in inputs.iter().enumerate() {
        let x = load_words(input_codes);
        let mut products = [_mm512_setzero_si512(); LANES];
        let mut d = [[0; LANES]; 2];
        let blocks = rows.map(|row| &row.as_chunks::<2>().0[pair]);
        for lane in 0..LANES {
            let [first, second] = blocks[lane];
            let [low, high] =
                [first, second].map(|block| load_bytes(bytemuck::cast_ref(&block.qs)));
            let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            let codes = _mm512_xor_si512(codes, unsigned);
            products[lane] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x);
            d[0][lane] = u16::from_le_bytes(first.d);
            d[1][lane] = u16::from_le_bytes(second.d);
            ahead.fetch_line(LINES * pair + lane);
        }
        (LANES..LINES).for_each(|line| ahead.fetch_line(LINES * pair + line));
        let products = sum_halves(products);
        for half in 0..2 {
            let block = 2 * pair + half;
            let start = _mm512_set1_epi32(input.start[block]);
            let product = _mm512_cvtepi32_ps(_mm512_add_epi32(products[half], start));
            let scale = _mm512_mul_ps(widen(d[half]), _mm512_set1_ps(input.d[block]));
            sum = _mm512_fmadd_ps(product, scale, sum);
        }
    }
    let mut out = [0.0; LANES];
    store_floats(&mut out, sum);
    out
}

/// Scales of a super-block of sixteen rows, one row per lane.
struct Q4KScales {
    d: __m512,
    dmin: __m512,
    /// Sub-blocks 0 to 3 and 4 to 7, a byte each.
    scales: [__m512i; 2],
    /// The same.
    mins: [__m512i; 2],
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn q4_k_scales(blocks: [&BlockQ4K; LANES]) -> Q4KScales {
    // The first four words of a block: both scales, six bits of scale and minimum per sub-block.
    let heads = blocks.map(|block| {
        let (head, _) = bytemuck::bytes_of(block).as_chunks::<16>();
        &head[0]
    });
    let [halves, words @ ..] = transpose_fours(heads);
    let low6 = |word| _mm512_and_si512(word, _mm512_set1_epi8(63));
    let low4 = |word| _mm512_and_si512(word, _mm512_set1_epi8(15));
    let top2 = |word| _mm512_and_si512(_mm512_srli_epi32::<2>(word), _mm512_set1_epi8(48));
    let float = |word| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word));
    Q4KScales {
        d: float(halves),
        dmin: float(_mm512_srli_epi32::<16>(halves)),
        scales: [
            low6(words[0]),
            _mm512_or_si512(low4(words[2]), top2(words[0])),
        ],
        mins: [
            low6(words[1]),
            _mm512_or_si512(low4(_mm512_srli_epi32::<4>(words[2])), top2(words[1])),
        ],
    }
}

/// Of four 16-bit sums in two words: the first and third, the second and fourth.
fn even_and_odd(sums: [u32; 2]) -> [u32; 2] {
    [
        sums[0] & 0xffff | sums[1] << 16,
        sums[0] >> 16 | sums[1] & 0xffff_0000,
    ]
}

/// Minima times sums of the input: pairs of even and of odd bytes meet pairs of the same sums.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_mins(mins: __m512i, sums: [u32; 2], total: __m512i) -> __m512i {
    let low = _mm512_set1_epi32(0x00ff_00ff);
    let even = _mm512_and_si512(mins, low);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<8>(mins), low);
    let [even_sums, odd_sums] = even_and_odd(sums);
    let total = _mm512_dpwssd_epi32(total, even, _mm512_set1_epi32(even_sums as i32));
    _mm512_dpwssd_epi32(total, odd, _mm512_set1_epi32(odd_sums as i32))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_nibbles(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read; no alignment is needed.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512vnni,avx512vl,avx512bw")]
pub fn q4_k_rows(rows: [&[BlockQ4K]; LANES], input: SuperInput, ahead: Ahead) -> [f32; LANES] {
    /// Cache lines of half a block of every row.
    const LINES: usize = LANES * size_of::<BlockQ4K>() / 2 / 64;
    let nibble = _mm512_set1_epi8(15);
    let mut sum = _mm512_setzero_ps();
    let (inputs, _) = input.codes.as_chunks::<64>();
    let (sums, _) = input.sums.as_chunks::<2>();
    for (block, (x, input_d)) in inputs.iter().zip(input.d).enumerate() {
        let (x, _) = x.as_chunks::<LANES>();
        let blocks = rows.map(|row| &row[block]);
        let scales = q4_k_scales(blocks);
        let mut total = _mm512_setzero_si512();
        // 64 bytes have sub-blocks 0 and 2 in their low nibbles, 1 and 3 in their high ones.
        for half in 0..2 {
            let (first, second) = (load_words(&x[2 * half]), load_words(&x[2 * half + 1]));
            let even = _mm512_shuffle_i64x2::<0x44>(first, second);
            let odd = _mm512_shuffle_i64x2::<0xee>(first, second);
            let (mut evens, mut odds) = (
                [_mm512_setzero_si512(); LANES],
                [_mm512_setzero_si512(); LANES],
            );
            for lane in 0..LANES {
                let (bytes, _) = blocks[lane].qs.as_chunks::<64>();
                let codes = load_nibbles(&bytes[half]);
                let zero = _mm512_setzero_si512();
                let low = _mm512_and_si512(codes, nibble);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibble);
                evens[lane] = _mm512_dpbusd_epi32(zero, low, even);
                odds[lane] = _mm512_dpbusd_epi32(zero, high, odd);
                ahead.fetch_line(LINES * (2 * block + half) + lane);
            }
            (LANES..LINES).for_each(|line| ahead.fetch_line(LINES * (2 * block + half) + line));
            let ([s0, s2], [s1, s3]) = (sum_halves(evens), sum_halves(odds));
            let bytes = scales.scales[half];
            let byte = _mm512_set1_epi32(0xff);
            let s0 = _mm512_mullo_epi32(s0, _mm512_and_si512(bytes, byte));
            let scale1 = _mm512_and_si512(_mm512_srli_epi32::<8>(bytes), byte);
            let s1 = _mm512_mullo_epi32(s1, scale1);
            let scale2 = _mm512_and_si512(_mm512_srli_epi32::<16>(bytes), byte);
            let s2 = _mm512_mullo_epi32(s2, scale2);
            let s3 = _mm512_mullo_epi32(s3, _mm512_srli_epi32::<24>(bytes));
            let pairs = (_mm512_add_epi32(s0, s1), _mm512_add_epi32(s2, s3));
            total = _mm512_add_epi32(total, _mm512_add_epi32(pairs.0, pairs.1));
        }
        let mins = add_mins(scales.mins[0], sums[2 * block], _mm512_setzero_si512());
        let mins = add_mins(scales.mins[1], sums[2 * block + 1], mins);
        let scale = _mm512_mul_ps(scales.dmin, _mm512_set1_ps(*input_d));
        sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins), scale, sum);
        let scale = _mm512_mul_ps(scales.d, _mm512_set1_ps(*input_d));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum);
    }
    let mut out = [0.0; LANES];
    store_floats(&mut out, sum);
    out
}

/// One byte of every word, with its sign.
#[inline]
#[target_feature(enable = "avx512f")]
fn signed_byte(words: __m512i, byte: u32) -> __m512i {
    let top = _mm512_sllv_epi32(words, _mm512_set1_epi32(24 - 8 * byte as i32));
    _mm512_srai_epi32::<24>(top)
}

/// Scales times sums of the input: pairs of even and of odd bytes meet pairs of the same sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_signed(scales: __m512i, sums: [u32; 2], total: __m512i) -> __m512i {
    let even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(scales));
    let odd = _mm512_srai_epi16::<8>(scales);
    let [even_sums, odd_sums] = even_and_odd(sums);
    let total = _mm512_dpwssd_epi32(total, even, _mm512_set1_epi32(even_sums as i32));
    _mm512_dpwssd_epi32(total, odd, _mm512_set1_epi32(odd_sums as i32))
}

#[target_feature(enable = "avx512f,avx512vnni,avx512vl,avx512bw")]
pub fn q6_k_rows(rows: [&[BlockQ6K]; LANES], input: SuperInput, ahead: Ahead) -> [f32; LANES] {
    /// Cache lines of two blocks of every row.
    const LINES: usize = LANES * 2 * size_of::<BlockQ6K>() / 64;
    let (nibble, top) = (_mm512_set1_epi8(15), _mm512_set1_epi8(48));
    // 32 bytes have two bits of four elements each: the first 64 elements take the lower two, moved up.
    let up = _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4);
    let down = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
    let mut sum = _mm512_setzero_ps();
    let (inputs, _) = input.codes.as_chunks::<64>();
    let (sums, _) = input.sums.as_chunks::<2>();
    for (block, (x, input_d)) in inputs.iter().zip(input.d).enumerate() {
        let (x, _) = x.as_chunks::<LANES>();
        let blocks = rows.map(|row| &row[block]);
        let bytes = blocks.map(|block| bytemuck::cast_ref::<[i8; 16], [u8; 16]>(&block.scales));
        let scales = transpose_fours(bytes);
        let mut total = _mm512_setzero_si512();
        for half in 0..2 {
            let (low, high) = (load_words(&x[2 * half]), load_words(&x[2 * half + 1]));
            let zero = _mm512_setzero_si512();
            let (mut lows, mut highs) = ([zero; LANES], [zero; LANES]);
            let first_line = LINES * (2 * block + half) / 4;
            for lane in 0..LANES {
                let (ql, _) = blocks[lane].ql.as_chunks::<64>();
                let (qh, _) = blocks[lane].qh.as_chunks::<32>();
                let nibbles = load_nibbles(&ql[half]);
                let bits = _mm512_broadcast_i64x4(load_bytes(&qh[half]));
                let low_bits = _mm512_and_si512(_mm512_sllv_epi64(bits, up), top);
                let high_bits = _mm512_and_si512(_mm512_srlv_epi64(bits, down), top);
                let low_codes = _mm512_or_si512(_mm512_and_si512(nibbles, nibble), low_bits);
                let nibbles = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), nibble);
                let high_codes = _mm512_or_si512(nibbles, high_bits);
                lows[lane] = _mm512_dpbusd_epi32(zero, low_codes, low);
                highs[lane] = _mm512_dpbusd_epi32(zero, high_codes, high);
                ahead.fetch_line(first_line + lane);
            }
            (LANES..LINES / 4 + 1).for_each(|line| ahead.fetch_line(first_line + line));
            for (word, products) in [sum_quarters(lows), sum_quarters(highs)]
                .into_iter()
                .enumerate()
            {
                let words = scales[2 * half + word];
                for (byte, products) in (0..).zip(products) {
                    let scaled = _mm512_mullo_epi32(products, signed_byte(words, byte));
                    total = _mm512_add_epi32(total, scaled);
                }
            }
        }
        let mut zeros = _mm512_setzero_si512();
        for (scales, sums) in scales.into_iter().zip(&sums[4 * block..]) {
            zeros = add_signed(scales, *sums, zeros);
        }
        // The code of zero is 32.
        let total = _mm512_sub_epi32(total, _mm512_slli_epi32::<5>(zeros));
        let d = widen(blocks.map(|block| u16::from_le_bytes(block.d)));
        let scale = _mm512_mul_ps(d, _mm512_set1_ps(*input_d));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum);
    }
    let mut out = [0.0; LANES];
    store_floats(&mut out, sum);
    out
}
