//! The innermost loops of a matrix product: a panel of weight rows times a tile of tokens.
//!
//! Enters: packed panels (`panel`) and packed activations (`input`). Leaves: sums. Everything is packed in 32-bit words,
//! word index first, so that one layout serves f32 (one value a word), BF16 (two) and 8-bit codes (four). Each sum runs
//! over the columns in order in a lane of its own: a result does not depend on how many tokens are in the tile.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

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
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::detect` has found every feature the kernel names.
        Isa::Avx512 => Some(unsafe { avx512::q8_0_rows(rows, input, ahead) }),
        _ => {
            let _ = ahead;
            None
        }
    }
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
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::detect` has found every feature the kernel names.
        Isa::Avx512 => Some(unsafe { avx512::q4_k_rows(rows, input, ahead) }),
        _ => {
            let _ = ahead;
            None
        }
    }
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
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::detect` has found every feature the kernel names.
        Isa::Avx512 => Some(unsafe { avx512::q6_k_rows(rows, input, ahead) }),
        _ => {
            let _ = ahead;
            None
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16 as Bf16;

    /// A cheap deterministic sequence of bytes.
    fn bytes(seed: u32) -> impl FnMut() -> u8 {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        }
    }

    fn floats(seed: u32, count: usize) -> Vec<f32> {
        let mut next = bytes(seed);
        (0..count)
            .map(|_| (f32::from(next()) - 128.0) / 64.0)
            .collect()
    }

    fn split<T: Copy>(words: &[[[T; LANES]; 2]]) -> [Vec<[T; LANES]>; 2] {
        [0, 1].map(|half| words.iter().map(|word| word[half]).collect())
    }

    #[test]
    fn every_twin_sums_floats() {
        for isa in Isa::all() {
            for tokens in [1, 2, 4, 8] {
                let words = 37;
                let weights: Vec<[[f32; LANES]; 2]> =
                    bytemuck::cast_slice(&floats(1, words * FLOAT_ROWS)).to_vec();
                let [low, high] = split(&weights);
                let input = floats(2, words * tokens);
                let mut sums = [[f32::NAN; FLOAT_ROWS]; MAX_TOKENS];
                float(isa, tokens, [&low, &high], &input, &mut sums);
                for token in 0..tokens {
                    for row in 0..FLOAT_ROWS {
                        let exact: f64 = (0..words)
                            .map(|k| {
                                f64::from(weights[k][row / LANES][row % LANES])
                                    * f64::from(input[k * tokens + token])
                            })
                            .sum();
                        assert!(
                            (f64::from(sums[token][row]) - exact).abs() < 1e-4,
                            "{isa:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_twin_sums_bf16() {
        let word = |low: f32, high: f32| {
            u32::from(Bf16::from_f32(low).to_bits())
                | u32::from(Bf16::from_f32(high).to_bits()) << 16
        };
        for isa in Isa::all() {
            for tokens in [1, 2, 4, 8] {
                let words = 19;
                let w = floats(3, 2 * words * FLOAT_ROWS);
                let x = floats(4, 2 * words * tokens);
                let pack = |values: &[f32]| -> Vec<u32> {
                    values
                        .chunks(2)
                        .map(|pair| word(pair[0], pair[1]))
                        .collect()
                };
                let weights: Vec<[[u32; LANES]; 2]> = bytemuck::cast_slice(&pack(&w)).to_vec();
                let [low, high] = split(&weights);
                let input = pack(&x);
                let mut sums = [[f32::NAN; FLOAT_ROWS]; MAX_TOKENS];
                bf16(isa, tokens, [&low, &high], &input, &mut sums);
                for token in 0..tokens {
                    for row in 0..FLOAT_ROWS {
                        let exact: f32 = (0..2 * words)
                            .map(|i| {
                                let (k, half) = (i / 2, i % 2);
                                w[2 * (k * FLOAT_ROWS + row) + half]
                                    * x[2 * (k * tokens + token) + half]
                            })
                            .sum();
                        assert!((sums[token][row] - exact).abs() < 1e-4, "{isa:?}");
                    }
                }
            }
        }
    }

    fn words(seed: u32, count: usize) -> Vec<u32> {
        let mut next = bytes(seed);
        (0..count)
            .map(|_| u32::from_le_bytes([next(), next(), next(), next()]))
            .collect()
    }

    /// The product of one unsigned and one signed word.
    fn dot(w: u32, x: u32) -> i32 {
        let (w, x) = (w.to_le_bytes(), x.to_le_bytes());
        w.iter()
            .zip(x)
            .map(|(w, x)| i32::from(*w) * i32::from(x as i8))
            .sum()
    }

    #[test]
    fn every_twin_sums_blocks() {
        for isa in Isa::all() {
            for (tokens, affine) in [(1, false), (2, true), (4, false), (8, true), (8, false)] {
                let count = 5;
                let codes: Vec<[u32; LANES]> = words(5, count * 8 * LANES).as_chunks().0.to_vec();
                let d: Vec<[f32; LANES]> = floats(6, count * LANES).as_chunks().0.to_vec();
                let m = if affine { d.clone() } else { Vec::new() };
                let x = words(7, count * 8 * tokens);
                let xd = floats(8, count * tokens);
                let start: Vec<i32> = (0..count * tokens).map(|i| i as i32 * 100 - 300).collect();
                let weights = Blocks {
                    codes: &codes,
                    d: &d,
                    m: &m,
                };
                let input = BlockInput {
                    codes: &x,
                    d: &xd,
                    start: &start,
                    s: &xd,
                };
                let mut sums = [[f32::NAN; LANES]; MAX_TOKENS];
                blocks(isa, tokens, weights, input, &mut sums);
                for token in 0..tokens {
                    for lane in 0..LANES {
                        let mut exact = 0.0;
                        for b in 0..count {
                            let mut sum = start[b * tokens + token];
                            for j in 0..8 {
                                let word = b * 8 + j;
                                sum += dot(codes[word][lane], x[word * tokens + token]);
                            }
                            exact += f64::from(sum)
                                * f64::from(d[b][lane])
                                * f64::from(xd[b * tokens + token]);
                            if affine {
                                exact += f64::from(m[b][lane]) * f64::from(xd[b * tokens + token]);
                            }
                        }
                        let error = (f64::from(sums[token][lane]) - exact).abs();
                        assert!(error < 1.0, "{isa:?} {} {exact}", sums[token][lane]);
                    }
                }
            }
        }
    }

    fn super_lanes(seed: u32, affine: bool) -> SuperLanes {
        let scale = |word: u32| (word & 127) as i32 - 64;
        let rows = |words: Vec<u32>| -> Vec<[u32; LANES]> { words.as_chunks().0.to_vec() };
        let (scales, mins) = (rows(words(seed, 256)), rows(words(seed + 50, 128)));
        let d = floats(seed, LANES).as_chunks().0[0];
        SuperLanes {
            d,
            dmin: if affine { d } else { [0.0; LANES] },
            scales: std::array::from_fn(|sub| scales[sub].map(scale)),
            mins: std::array::from_fn(|pair| mins[pair].map(|w| w & 0x03ff_03ff)),
        }
    }

    /// Sixteen rows as slices.
    fn rows_of(all: &[u32]) -> [&[u32]; LANES] {
        let len = all.len() / LANES;
        std::array::from_fn(|row| &all[row * len..][..len])
    }

    fn interleaved(isa: Isa, rows: [&[u32]; LANES]) -> Vec<[u32; LANES]> {
        let mut panel = vec![[0; LANES]; rows[0].len()];
        interleave(isa, rows, &mut panel);
        panel
    }

    #[test]
    fn rows_of_words_sum_as_panels_do() {
        for (isa, words) in Isa::all()
            .into_iter()
            .flat_map(|isa| [16, 39].map(|words| (isa, words)))
        {
            let values = floats(21, FLOAT_ROWS * words);
            let stored: &[u32] = bytemuck::cast_slice(&values);
            let halves = [&stored[..LANES * words], &stored[LANES * words..]].map(rows_of);
            let panels = halves.map(|rows| interleaved(isa, rows));
            let rows = std::array::from_fn(|row| halves[row / LANES][row % LANES]);
            let input = floats(22, words);
            let x: &[u32] = bytemuck::cast_slice(&input);
            let ahead = Ahead::from(&[], 0);
            let mut sums = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
            let panels: Halves<u32> = [&panels[0], &panels[1]];
            bf16(isa, 1, panels, x, &mut sums);
            assert_eq!(bf16_rows(isa, rows, x, ahead), sums[0], "{isa:?} {words}");
            float(isa, 1, panels.map(bytemuck::cast_slice), &input, &mut sums);
            assert_eq!(float_rows(isa, rows, x, ahead), sums[0], "{isa:?} {words}");
        }
    }

    #[test]
    fn rows_of_blocks_sum_as_panels_do() {
        for (isa, count) in Isa::all()
            .into_iter()
            .flat_map(|isa| [1, 5, 16].map(|n| (isa, n)))
        {
            for affine in [false, true] {
                let stored = words(23, LANES * count * 8);
                let mut scales = [BlockScales::default(); LANES];
                for (row, scales) in scales.iter_mut().enumerate() {
                    scales.d.copy_from_slice(&floats(24 + row as u32, LANES));
                    scales.m.copy_from_slice(&floats(54 + row as u32, LANES));
                }
                let rows = BlockRows {
                    codes: rows_of(&stored),
                    scales: &scales,
                    affine,
                };
                let (codes, x) = (interleaved(isa, rows.codes), words(25, count * 8));
                let column = |of: fn(&BlockScales) -> &[f32; LANES]| -> Vec<[f32; LANES]> {
                    let lanes = |block: usize| scales.each_ref().map(|scales| of(scales)[block]);
                    (0..count).map(lanes).collect()
                };
                let (d, m) = (column(|scales| &scales.d), column(|scales| &scales.m));
                let xd = floats(26, count);
                let start: Vec<i32> = (0..count as i32).map(|i| 70 - 31 * i).collect();
                let input = BlockInput {
                    codes: &x,
                    d: &xd,
                    start: &start,
                    s: &xd,
                };
                let panel = Blocks {
                    codes: &codes,
                    d: &d,
                    m: if affine { &m } else { &[] },
                };
                let mut sums = [[0.0; LANES]; MAX_TOKENS];
                blocks(isa, 1, panel, input, &mut sums);
                assert_eq!(block_rows(isa, rows, input), sums[0], "{isa:?} {count}");
            }
        }
    }

    #[test]
    fn rows_of_super_blocks_sum_as_panels_do() {
        for isa in Isa::all() {
            for (count, has_dmin, sub_words) in
                [(2, true, 8), (1, false, 4), (2, false, 8), (2, true, 4)]
            {
                let stored = words(27, LANES * count * 64);
                let lanes: Vec<SuperLanes> = (0..count as u32)
                    .map(|seed| super_lanes(seed, has_dmin))
                    .collect();
                let mut scales = [[SuperScales::default(); MAX_SUPER_BLOCKS]; LANES];
                for (row, scales) in scales.iter_mut().enumerate() {
                    for (scales, lanes) in scales.iter_mut().zip(&lanes) {
                        let words: &[[u32; LANES]] =
                            bytemuck::cast_slice(std::slice::from_ref(lanes));
                        let words: Vec<u32> = words.iter().map(|lanes| lanes[row]).collect();
                        *scales = bytemuck::cast_slice(&words)[0];
                    }
                }
                let rows = SuperRows {
                    codes: rows_of(&stored),
                    scales: &scales,
                    has_dmin,
                    sub_words,
                };
                let (codes, x) = (interleaved(isa, rows.codes), words(28, count * 64));
                let xd = floats(29, count);
                let sums_of: Vec<u32> = words(30, count * 32 / sub_words)
                    .iter()
                    .map(|w| w & 0x0fff_0fff)
                    .collect();
                let input = SuperInput {
                    codes: &x,
                    d: &xd,
                    sums: &sums_of,
                };
                let panel = SuperBlocks {
                    codes: &codes,
                    scales: &lanes,
                    has_dmin,
                    sub_words,
                };
                let mut sums = [[0.0; LANES]; MAX_TOKENS];
                super_blocks(isa, 1, panel, input, &mut sums);
                assert_eq!(super_rows(isa, rows, input), sums[0], "{isa:?} {count}");
            }
        }
    }

    #[test]
    fn every_twin_sums_super_blocks() {
        for isa in Isa::all() {
            for (tokens, affine, sub_words) in
                [(1, true, 8), (2, false, 4), (4, false, 8), (8, true, 4)]
            {
                let (count, subs) = (3, 64 / sub_words);
                let codes: Vec<[u32; LANES]> = words(9, count * 64 * LANES)
                    .iter()
                    .map(|w| w & 0x3f3f_3f3f)
                    .collect::<Vec<_>>()
                    .as_chunks()
                    .0
                    .to_vec();
                let mut scales = vec![SuperLanes::default(); count];
                for (block, lanes) in scales.iter_mut().enumerate() {
                    *lanes = super_lanes(10 + block as u32, affine);
                }
                let x = words(13, count * 64 * tokens);
                let xd = floats(14, count * tokens);
                let xs: Vec<u32> = words(15, count * subs / 2 * tokens)
                    .iter()
                    .map(|w| w & 0x0fff_0fff)
                    .collect();
                let weights = SuperBlocks {
                    codes: &codes,
                    scales: &scales,
                    has_dmin: affine,
                    sub_words,
                };
                let input = SuperInput {
                    codes: &x,
                    d: &xd,
                    sums: &xs,
                };
                let mut sums = [[f32::NAN; LANES]; MAX_TOKENS];
                super_blocks(isa, tokens, weights, input, &mut sums);
                for token in 0..tokens {
                    for lane in 0..LANES {
                        let mut exact = 0.0;
                        for b in 0..count {
                            let (mut sum, mut min) = (0_i64, 0_i64);
                            for word in 0..64 {
                                let at = b * 64 + word;
                                let scale = i64::from(scales[b].scales[word / sub_words][lane]);
                                sum +=
                                    scale * i64::from(dot(codes[at][lane], x[at * tokens + token]));
                            }
                            for pair in 0..subs / 2 {
                                let at = b * subs / 2 + pair;
                                let (w, s) = (scales[b].mins[pair][lane], xs[at * tokens + token]);
                                min += i64::from(w & 0xffff) * i64::from(s & 0xffff)
                                    + i64::from(w >> 16) * i64::from(s >> 16);
                            }
                            exact += (sum - min) as f64
                                * f64::from(scales[b].d[lane])
                                * f64::from(xd[b * tokens + token]);
                        }
                        let error = (f64::from(sums[token][lane]) - exact).abs();
                        assert!(
                            error <= 1e-5 * exact.abs() + 30.0,
                            "{isa:?} {} {exact}",
                            sums[token][lane]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn interleaving_turns_rows_into_columns() {
        for isa in Isa::all() {
            for count in [1, 16, 37, 64] {
                let rows: Vec<Vec<u32>> = (0..LANES as u32)
                    .map(|lane| (0..count).map(|word| lane * 1000 + word).collect())
                    .collect();
                let views: [&[u32]; LANES] = std::array::from_fn(|lane| rows[lane].as_slice());
                let mut panel = vec![[0; LANES]; count as usize];
                interleave(isa, views, &mut panel);
                for (word, lanes) in panel.iter().enumerate() {
                    for (lane, value) in lanes.iter().enumerate() {
                        assert_eq!(*value, lane as u32 * 1000 + word as u32);
                    }
                }
            }
        }
    }
}
