//! The innermost loops of a matrix product: a panel of weight rows times a tile of tokens.
//!
//! Enters: packed panels (`panel`) and packed activations (`input`). Leaves: sums. Everything is packed in 32-bit words,
//! word index first, so that one layout serves f32 (one value a word), BF16 (two) and 8-bit codes (four). Each sum runs
//! over the columns in order in a lane of its own: a result does not depend on how many tokens are in the tile.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Weight rows of a panel of codes, and lanes of a vector.
pub const LANES: usize = 16;
/// Weight rows of a panel of floats: two vectors.
pub const FLOAT_ROWS: usize = 2 * LANES;
/// Most tokens of a tile.
pub const MAX_TOKENS: usize = 8;

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

/// Packed 8-bit weights of a panel, super-blocks of 256: `w = d * scale * code - dmin * min`, or
/// `d * (scale * code - min)` where the types have one scale only.
#[derive(Debug, Clone, Copy)]
pub struct SuperBlocks<'a> {
    /// `[super-block][64 words][lane]`.
    pub codes: &'a [[u32; LANES]],
    /// `[super-block][sub-block][lane]`.
    pub scales: &'a [[i32; LANES]],
    /// Pairs of 16-bit minima, `[super-block][sub-block / 2][lane]`.
    pub mins: &'a [[u32; LANES]],
    /// `[super-block][lane]`.
    pub d: &'a [[f32; LANES]],
    /// `[super-block][lane]`; empty where minima share `d`.
    pub dmin: &'a [[f32; LANES]],
    /// Words of a sub-block: 4 (16 weights) or 8 (32).
    pub sub_words: usize,
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
    weights: &[[f32; FLOAT_ROWS]],
    input: &[f32],
    sums: &mut FloatTile,
) {
    assert_eq!(input.len(), weights.len() * tokens);
    dispatch!(isa, tokens, float(weights, input, sums));
}

/// The same with two BF16 values a word, products and sums in f32.
pub fn bf16(
    isa: Isa,
    tokens: usize,
    weights: &[[u32; FLOAT_ROWS]],
    input: &[u32],
    sums: &mut FloatTile,
) {
    assert_eq!(input.len(), weights.len() * tokens);
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
    let count = weights.d.len();
    let subs = 64 / weights.sub_words;
    assert_eq!(weights.codes.len(), count * 64);
    assert_eq!(
        (weights.scales.len(), weights.mins.len()),
        (count * subs, count * subs / 2)
    );
    assert!(weights.dmin.is_empty() || weights.dmin.len() == count);
    assert_eq!(
        (input.codes.len(), input.d.len()),
        (count * 64 * tokens, count * tokens)
    );
    assert_eq!(input.sums.len(), count * subs / 2 * tokens);
    dispatch!(isa, tokens, super_blocks(weights, input, sums));
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

    #[test]
    fn every_twin_sums_floats() {
        for isa in Isa::all() {
            for tokens in [1, 2, 4, 8] {
                let words = 37;
                let weights: Vec<[f32; FLOAT_ROWS]> =
                    floats(1, words * FLOAT_ROWS).as_chunks().0.to_vec();
                let input = floats(2, words * tokens);
                let mut sums = [[f32::NAN; FLOAT_ROWS]; MAX_TOKENS];
                float(isa, tokens, &weights, &input, &mut sums);
                for token in 0..tokens {
                    for row in 0..FLOAT_ROWS {
                        let exact: f64 = (0..words)
                            .map(|k| {
                                f64::from(weights[k][row]) * f64::from(input[k * tokens + token])
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
                let weights: Vec<[u32; FLOAT_ROWS]> = pack(&w).as_chunks().0.to_vec();
                let input = pack(&x);
                let mut sums = [[f32::NAN; FLOAT_ROWS]; MAX_TOKENS];
                bf16(isa, tokens, &weights, &input, &mut sums);
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
                let scales: Vec<[i32; LANES]> = words(10, count * subs * LANES)
                    .iter()
                    .map(|w| (w & 127) as i32 - 64)
                    .collect::<Vec<_>>()
                    .as_chunks()
                    .0
                    .to_vec();
                let mins: Vec<[u32; LANES]> = words(11, count * subs / 2 * LANES)
                    .iter()
                    .map(|w| w & 0x03ff_03ff)
                    .collect::<Vec<_>>()
                    .as_chunks()
                    .0
                    .to_vec();
                let d: Vec<[f32; LANES]> = floats(12, count * LANES).as_chunks().0.to_vec();
                let dmin = if affine { d.clone() } else { Vec::new() };
                let x = words(13, count * 64 * tokens);
                let xd = floats(14, count * tokens);
                let xs: Vec<u32> = words(15, count * subs / 2 * tokens)
                    .iter()
                    .map(|w| w & 0x0fff_0fff)
                    .collect();
                let weights = SuperBlocks {
                    codes: &codes,
                    scales: &scales,
                    mins: &mins,
                    d: &d,
                    dmin: &dmin,
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
                                let scale = i64::from(scales[b * subs + word / sub_words][lane]);
                                sum +=
                                    scale * i64::from(dot(codes[at][lane], x[at * tokens + token]));
                            }
                            for pair in 0..subs / 2 {
                                let at = b * subs / 2 + pair;
                                let (w, s) = (mins[at][lane], xs[at * tokens + token]);
                                min += i64::from(w & 0xffff) * i64::from(s & 0xffff)
                                    + i64::from(w >> 16) * i64::from(s >> 16);
                            }
                            exact += (sum - min) as f64
                                * f64::from(d[b][lane])
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
