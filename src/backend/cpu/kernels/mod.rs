//! The innermost loops of a matrix product: a panel of weight rows times a tile of tokens, or rows times one token.
//!
//! Enters: packed panels or unpacked rows (`panel`), rows as they are stored, packed activations (`input`). Leaves: sums. Everything is packed in 32-bit words,
//! word index first, so that one layout serves f32 (one value a word), BF16 (two) and 8-bit codes (four). Each sum runs
//! over the columns in order in a lane of its own: a result does not depend on how many tokens are in the tile.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(test)]
mod tests;

use bytemuck::{Pod, Zeroable};
use nemoconv_formats::block::{BlockQ4K, BlockQ6K, BlockQ8_0};

/// Weight rows of a panel of codes, and lanes of a vector.
pub const LANES: usize = 16;
/// Weight rows of a panel of floats: two vectors.
pub const FLOAT_ROWS: usize = 2 * LANES;
/// Most tokens of a tile.
pub const MAX_TOKENS: usize = 8;

/// A panel of floats: the words of its first sixteen rows and of its second, `[word][lane]` each.
pub type Halves<'a, T> = [&'a [[T; LANES]]; 2];

/// Sums of a tile: one row per token.
pub type FloatTile = [[f32; FLOAT_ROWS]; MAX_TOKENS];
/// Sums of a tile of codes.
pub type CodeTile = [[f32; LANES]; MAX_TOKENS];

/// Packed 8-bit weights of a panel, blocks of 32: `w = d * (code - zero) + m`.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    /// `[block][8 words][lane]`.
    pub codes: &'a [[u32; LANES]],
    /// `[block][lane]`.
    pub d: &'a [[f32; LANES]],
    /// `[block][lane]`; empty without minima.
    pub m: &'a [[f32; LANES]],
}

/// Activations of a tile for [`Blocks`]; `tokens` values per entry.
#[derive(Debug, Clone, Copy)]
pub struct BlockInput<'a> {
    /// `[block][8 words][token]`.
    pub codes: &'a [u32],
    /// Scale, `[block][token]`.
    pub d: &'a [f32],
    /// What every integer sum starts from: `-zero * sum of the block's codes`.
    pub start: &'a [i32],
    /// Scale times sum, `[block][token]`; empty without minima.
    pub s: &'a [f32],
}

/// Scales of sixteen blocks of 32: `d * (code - zero) + m`; types without minima leave those zero.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub struct BlockScales {
    /// Scales.
    pub d: [f32; LANES],
    /// Minima.
    pub m: [f32; LANES],
}

/// Scales of one super-block: `d * scale * code - dmin * min`, or `d * (scale * code - min)` in types that have no
/// `dmin`, where the minima are scale times the code of zero.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub struct SuperScales {
    /// Scale of the scales.
    pub d: f32,
    /// Scale of the minima; 0 in types without.
    pub dmin: f32,
    /// Per sub-block, of which there are 8 or 16.
    pub scales: [i32; 16],
    /// Per sub-block.
    pub mins: [i16; 16],
}

/// [`SuperScales`] of sixteen rows, interleaved word by word.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub struct SuperLanes {
    /// Scales of the scales.
    pub d: [f32; LANES],
    /// Scales of the minima.
    pub dmin: [f32; LANES],
    /// Per sub-block.
    pub scales: [[i32; LANES]; 16],
    /// Per two sub-blocks, 16 bits each.
    pub mins: [[u32; LANES]; 8],
}

const _: () = assert!(size_of::<SuperLanes>() == LANES * size_of::<SuperScales>());

/// Packed 8-bit weights of a panel, super-blocks of 256.
#[derive(Debug, Clone, Copy)]
pub struct SuperBlocks<'a> {
    /// `[super-block][64 words][lane]`.
    pub codes: &'a [[u32; LANES]],
    /// `[super-block]`.
    pub scales: &'a [SuperLanes],
    /// Whether minima have a scale of their own.
    pub has_dmin: bool,
    /// Words of a sub-block: 4 (16 weights) or 8 (32).
    pub sub_words: usize,
}

/// Sixteen rows of up to sixteen blocks, each with its codes and scales by itself.
#[derive(Debug, Clone, Copy)]
pub struct BlockRows<'a> {
    /// `[row][block][8 words]`.
    pub codes: [&'a [u32]; LANES],
    /// `[row]`.
    pub scales: &'a [BlockScales; LANES],
    /// Whether blocks have minima.
    pub affine: bool,
}

/// Most super-blocks of [`SuperRows`].
pub const MAX_SUPER_BLOCKS: usize = 2;

/// The same in super-blocks.
#[derive(Debug, Clone, Copy)]
pub struct SuperRows<'a> {
    /// `[row][super-block][64 words]`.
    pub codes: [&'a [u32]; LANES],
    /// `[row][super-block]`.
    pub scales: &'a [[SuperScales; MAX_SUPER_BLOCKS]; LANES],
    /// Whether minima have a scale of their own.
    pub has_dmin: bool,
    /// Words of a sub-block: 4 (16 weights) or 8 (32).
    pub sub_words: usize,
}

/// Bytes that will be read next, asked for while the present ones are multiplied: rows lie pages apart, further than the
/// processor looks ahead by itself.
#[derive(Debug, Clone, Copy)]
pub struct Ahead(*const u8);

impl Ahead {
    /// Bytes of a cache line.
    const LINE: usize = 64;

    /// Bytes from `offset` on behind the start of `bytes`, which may lie beyond their end.
    pub fn from(bytes: &[u8], offset: usize) -> Self {
        Self(bytes.as_ptr().wrapping_add(offset))
    }

    /// Asks for line `index`.
    #[inline(always)]
    pub fn fetch_line(self, index: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            let address = self.0.wrapping_add(Self::LINE * index);
            // SAFETY: a prefetch changes nothing but caches, and of an address that is not mapped nothing at all.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = index;
    }

    /// Asks for all lines of `bytes` bytes from `offset` on.
    #[inline(always)]
    pub fn fetch(self, offset: usize, bytes: usize) {
        (offset / Self::LINE..(offset + bytes) / Self::LINE).for_each(|line| self.fetch_line(line));
    }
}

/// Channels of a head that are scanned together.
pub const SCAN_CHANNELS: usize = 64;

/// Channels `first..first + 64` of a head's state.
#[derive(Debug)]
pub struct StateRows<'a> {
    /// `[state, channel of the head]`.
    pub values: &'a mut [f32],
    /// Channels of the head.
    pub row_len: usize,
    /// First channel.
    pub first: usize,
}

/// What a token does to a state.
#[derive(Debug, Clone, Copy)]
pub struct ScanStep<'a> {
    /// Factor on the state.
    pub decay: f32,
    /// Time step times x, per channel.
    pub input: &'a [f32; SCAN_CHANNELS],
    /// B, one value per row of the state.
    pub b: &'a [f32],
    /// C, the same.
    pub c: &'a [f32],
}

/// Activations of a tile for [`SuperBlocks`].
#[derive(Debug, Clone, Copy)]
pub struct SuperInput<'a> {
    /// `[super-block][64 words][token]`.
    pub codes: &'a [u32],
    /// `[super-block][token]`.
    pub d: &'a [f32],
    /// Pairs of 16-bit sums of sub-blocks, `[super-block][sub-block / 2][token]`.
    pub sums: &'a [u32],
}

/// Which instructions the kernels may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VNNI and BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best of this machine.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512bf16");
            if avx512 {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// All that this machine can run, the portable twin first.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let best = Self::detect();
            [Self::Portable, Self::Avx2, Self::Avx512]
                .into_iter()
                .filter(|isa| *isa as u8 <= best as u8)
                .collect()
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Self::Portable]
    }
}

/// Calls `$name` in the twin for `$isa`.
macro_rules! twin {
    ($isa:expr, $name:ident($($argument:expr),*)) => {
        match $isa {
            Isa::Portable => portable::$name::<false>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::detect` has found AVX2 and FMA.
            Isa::Avx2 => unsafe { portable::avx2::$name($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::detect` has found every feature the kernel names.
            Isa::Avx512 => unsafe { avx512::$name($($argument),*) },
        }
    };
}

/// Calls `$name` where there is AVX-512; other machines have no such kernel.
macro_rules! avx512_only {
    ($isa:expr, $name:ident($($argument:expr),*)) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::detect` has found every feature the kernel names.
            Isa::Avx512 => Some(unsafe { avx512::$name($($argument),*) }),
            _ => {
                let _ = ($($argument),*);
                None
            }
        }
    };
}

/// Calls `$module::$name::<TOKENS>` in the twin for `$isa`, with the number of tokens as a constant.
macro_rules! dispatch {
    ($isa:expr, $tokens:expr, $name:ident($($argument:expr),*)) => {
        match $tokens {
            8 => dispatch!(@ $isa, 8, $name($($argument),*)),
            4 => dispatch!(@ $isa, 4, $name($($argument),*)),
            2 => dispatch!(@ $isa, 2, $name($($argument),*)),
            _ => dispatch!(@ $isa, 1, $name($($argument),*)),
        }
    };
    (@ $isa:expr, $tokens:literal, $name:ident($($argument:expr),*)) => {
        match $isa {
            Isa::Portable => portable::$name::<$tokens, false>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::detect` has found AVX2 and FMA.
            Isa::Avx2 => unsafe { portable::avx2::$name::<$tokens>($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::detect` has found every feature the kernel names.
            Isa::Avx512 => unsafe { avx512::$name::<$tokens>($($argument),*) },
        }
    };
}

/// `sums[token][row] = sum over k of weights[k][row] * input[k][token]`, f32.
pub fn float(
    isa: Isa,
    tokens: usize,
    weights: Halves<'_, f32>,
    input: &[f32],
    sums: &mut FloatTile,
) {
    assert_eq!(weights[0].len(), weights[1].len());
    assert_eq!(input.len(), weights[0].len() * tokens);
    dispatch!(isa, tokens, float(weights, input, sums));
}

/// The same with two BF16 values a word, products and sums in f32.
pub fn bf16(
    isa: Isa,
    tokens: usize,
    weights: Halves<'_, u32>,
    input: &[u32],
    sums: &mut FloatTile,
) {
    assert_eq!(weights[0].len(), weights[1].len());
    assert_eq!(input.len(), weights[0].len() * tokens);
    dispatch!(isa, tokens, bf16(weights, input, sums));
}

/// Blocks of 32: integer sums per block, scaled and added in f32.
pub fn blocks(isa: Isa, tokens: usize, weights: Blocks, input: BlockInput, sums: &mut CodeTile) {
    let count = weights.d.len();
    assert_eq!(weights.codes.len(), count * 8);
    assert!(weights.m.is_empty() || weights.m.len() == count);
    assert_eq!(input.codes.len(), count * 8 * tokens);
    assert_eq!(
        (input.d.len(), input.start.len()),
        (count * tokens, count * tokens)
    );
    assert!(weights.m.is_empty() || input.s.len() == count * tokens);
    dispatch!(isa, tokens, blocks(weights, input, sums));
}

/// Super-blocks of 256: integer sums over the whole super-block, scaled and added in f32.
pub fn super_blocks(
    isa: Isa,
    tokens: usize,
    weights: SuperBlocks,
    input: SuperInput,
    sums: &mut CodeTile,
) {
    let count = weights.scales.len();
    assert!([4, 8].contains(&weights.sub_words));
    assert_eq!(weights.codes.len(), count * 64);
    check_super_input(input, count, weights.sub_words, tokens);
    dispatch!(isa, tokens, super_blocks(weights, input, sums));
}

fn check_super_input(input: SuperInput, count: usize, sub_words: usize, tokens: usize) {
    assert_eq!(
        (input.codes.len(), input.d.len()),
        (count * 64 * tokens, count * tokens)
    );
    assert_eq!(input.sums.len(), count * 32 / sub_words * tokens);
}

/// [`float`] for one token and rows of words as they are stored.
pub fn float_rows(
    isa: Isa,
    rows: [&[u32]; FLOAT_ROWS],
    input: &[u32],
    ahead: Ahead,
) -> [f32; FLOAT_ROWS] {
    assert!(rows.iter().all(|row| row.len() == input.len()));
    twin!(isa, float_rows(rows, input, ahead))
}

/// [`bf16`] for one token and rows of words as they are stored.
pub fn bf16_rows(
    isa: Isa,
    rows: [&[u32]; FLOAT_ROWS],
    input: &[u32],
    ahead: Ahead,
) -> [f32; FLOAT_ROWS] {
    assert!(rows.iter().all(|row| row.len() == input.len()));
    twin!(isa, bf16_rows(rows, input, ahead))
}

/// [`blocks`] for one token and rows that are not interleaved.
pub fn block_rows(isa: Isa, rows: BlockRows, input: BlockInput) -> [f32; LANES] {
    let count = input.d.len();
    assert!(count <= LANES);
    assert!(rows.codes.iter().all(|codes| codes.len() == count * 8));
    assert_eq!((input.codes.len(), input.start.len()), (count * 8, count));
    assert!(!rows.affine || input.s.len() == count);
    twin!(isa, block_rows(rows, input))
}

/// [`super_blocks`] for one token and rows that are not interleaved.
pub fn super_rows(isa: Isa, rows: SuperRows, input: SuperInput) -> [f32; LANES] {
    let count = input.d.len();
    assert!(count <= MAX_SUPER_BLOCKS && [4, 8].contains(&rows.sub_words));
    assert!(rows.codes.iter().all(|codes| codes.len() == count * 64));
    check_super_input(input, count, rows.sub_words, 1);
    twin!(isa, super_rows(rows, input))
}

/// [`block_rows`] of Q8_0 as it is stored, whole pairs of blocks; `None` where this CPU has no kernel for that.
pub fn q8_0_rows(
    isa: Isa,
    rows: [&[BlockQ8_0]; LANES],
    input: BlockInput,
    ahead: Ahead,
) -> Option<[f32; LANES]> {
    let count = input.d.len();
    if !count.is_multiple_of(2) {
        return None;
    }
    assert!(rows.iter().all(|row| row.len() == count));
    assert_eq!((input.codes.len(), input.start.len()), (count * 8, count));
    avx512_only!(isa, q8_0_rows(rows, input, ahead))
}

/// [`super_rows`] of Q4_K as it is stored; `None` where this CPU has no kernel for that.
pub fn q4_k_rows(
    isa: Isa,
    rows: [&[BlockQ4K]; LANES],
    input: SuperInput,
    ahead: Ahead,
) -> Option<[f32; LANES]> {
    assert!(rows.iter().all(|row| row.len() == input.d.len()));
    check_super_input(input, input.d.len(), 8, 1);
    avx512_only!(isa, q4_k_rows(rows, input, ahead))
}

/// [`super_rows`] of Q6_K as it is stored; `None` where this CPU has no kernel for that.
pub fn q6_k_rows(
    isa: Isa,
    rows: [&[BlockQ6K]; LANES],
    input: SuperInput,
    ahead: Ahead,
) -> Option<[f32; LANES]> {
    assert!(rows.iter().all(|row| row.len() == input.d.len()));
    check_super_input(input, input.d.len(), 4, 1);
    avx512_only!(isa, q6_k_rows(rows, input, ahead))
}

/// Writes rows of words as columns: `panel[word][lane] = rows[lane][word]`.
pub fn interleave(isa: Isa, rows: [&[u32]; LANES], panel: &mut [[u32; LANES]]) {
    assert!(rows.iter().all(|row| row.len() == panel.len()));
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::detect` has found AVX-512F.
        Isa::Avx512 => unsafe { avx512::interleave(rows, panel) },
        _ => portable::interleave(rows, panel),
    }
}

/// Writes BF16 pairs as f32, the value in the low bits first: `words[2 k]` and `words[2 k + 1]` are of `pairs[k]`.
pub fn widen(isa: Isa, pairs: &[[u32; LANES]], words: &mut [[u32; LANES]]) {
    assert_eq!(words.len(), 2 * pairs.len());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::detect` has found AVX-512F.
        Isa::Avx512 => unsafe { avx512::widen(pairs, words) },
        _ => portable::widen(pairs, words),
    }
}

/// Advances some channels of a head by a token: `state = decay * state + input * b`, and gives the sums of `state * c`,
/// rows in order; `None` where this CPU has no kernel for that.
pub fn scan_rows(
    isa: Isa,
    state: StateRows<'_>,
    step: ScanStep<'_>,
) -> Option<[f32; SCAN_CHANNELS]> {
    assert!(state.first + SCAN_CHANNELS <= state.row_len);
    avx512_only!(isa, scan_rows(state, step))
}

/// Products of a vector with sixteen rows that begin `stride` values apart, each the sum that
/// a product one by one gives; `None` where this CPU has no kernel for that, or for vectors of this length.
pub fn dots(isa: Isa, vector: &[f32], rows: &[f32], stride: usize) -> Option<[f32; LANES]> {
    if !vector.len().is_multiple_of(LANES) {
        return None;
    }
    avx512_only!(isa, dots(vector, rows, stride))
}

/// `sum over rows of weights[row][n] * row`, rows in order, for the first sixteen values of rows that begin `stride` values
/// apart; `None` where this CPU has no kernel for that.
pub fn weighted_sums<const N: usize>(
    isa: Isa,
    weights: &[[f32; N]],
    rows: &[f32],
    stride: usize,
) -> Option<[[f32; LANES]; N]> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::detect` has found AVX-512F.
        Isa::Avx512 => Some(unsafe { avx512::weighted_sums(weights, rows, stride) }),
        _ => {
            let _ = (weights, rows, stride);
            None
        }
    }
}

/// Asks for memory that is wanted soon: sums of a large product lie where no earlier access tells the processor of them.
#[inline(always)]
pub fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(64 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: nothing is read; the address is that of a value.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}
