//! Activations, quantized as asked and packed in tiles of tokens for the kernels.
//!
//! Enters: f32 rows. Leaves: words of every token of a tile side by side. Knows no weights beyond their form.

use half::bf16;

use super::kernels::{BlockInput, Isa, MAX_TOKENS, SuperInput};
use super::multiversion::multiversion;
use super::panel::Form;
use crate::backend::activation::{Activation, block_q8_1_sum, quantize_q8_0, quantize_q8_k};
use crate::parallel;

/// Tiles that a thread packs at a time.
const TILES_TOGETHER: usize = 8;

/// Consecutive rows that a kernel takes together: 8, 4, 2 or 1.
#[derive(Debug, Clone, Copy)]
pub struct TokenTile {
    /// First row.
    pub first: usize,
    /// Rows.
    pub tokens: usize,
}

/// Cuts rows into tiles: eights, then what is left.
pub fn token_tiles(rows: usize) -> Vec<TokenTile> {
    let mut tiles = Vec::new();
    let mut first = 0;
    while first < rows {
        let mut tokens = MAX_TOKENS;
        while first + tokens > rows {
            tokens /= 2;
        }
        tiles.push(TokenTile { first, tokens });
        first += tokens;
    }
    tiles
}

/// Packed activations of all rows. Tile by tile, each `[word][token]`.
#[derive(Debug)]
pub struct Input {
    tiles: Vec<TokenTile>,
    columns: usize,
    form: Form,
    words: Vec<u32>,
    d: Vec<f32>,
    /// Starts of integer sums (blocks), or pairs of sub-block sums (super-blocks).
    sums: Vec<u32>,
    s: Vec<f32>,
}

/// Scales and sums that a form keeps per row.
struct Sizes {
    words: usize,
    d: usize,
    sums: usize,
    s: usize,
}

impl Sizes {
    fn of(form: Form, columns: usize) -> Self {
        let (words, d, sums, s) = match form {
            Form::Float => (columns, 0, 0, 0),
            Form::Bf16 => (columns / 2, 0, 0, 0),
            Form::Blocks { affine, .. } => {
                let blocks = columns / 32;
                (columns / 4, blocks, blocks, if affine { blocks } else { 0 })
            }
            Form::SuperBlocks { sub_block } => {
                (columns / 4, columns / 256, columns / sub_block / 2, 0)
            }
        };
        Self { words, d, sums, s }
    }
}

/// One row before it is packed.
#[derive(Default)]
struct Row {
    values: Vec<f32>,
    codes: Vec<i8>,
    d: Vec<f32>,
    sums: Vec<u32>,
    s: Vec<f32>,
}

impl Input {
    /// Packs `rows` of `columns` values.
    pub fn pack(
        isa: Isa,
        values: &[f32],
        columns: usize,
        form: Form,
        activation: Activation,
    ) -> Self {
        let tiles = token_tiles(values.len() / columns);
        let sizes = Sizes::of(form, columns);
        let rows = values.len() / columns;
        let mut input = Self {
            words: vec![0; rows * sizes.words],
            d: vec![0.0; rows * sizes.d],
            sums: vec![0; rows * sizes.sums],
            s: vec![0.0; rows * sizes.s],
            tiles,
            columns,
            form,
        };
        // Parts of every array, tile by tile, so that tiles can be packed in parallel.
        let mut words = input.words.as_mut_slice();
        let mut d = input.d.as_mut_slice();
        let mut sums = input.sums.as_mut_slice();
        let mut s = input.s.as_mut_slice();
        let mut parts: Vec<_> = input
            .tiles
            .iter()
            .map(|tile| {
                let n = tile.tokens;
                (
                    *tile,
                    cut(&mut words, n * sizes.words),
                    cut(&mut d, n * sizes.d),
                    cut(&mut sums, n * sizes.sums),
                    cut(&mut s, n * sizes.s),
                )
            })
            .collect();
        parallel::for_each(parts.chunks_mut(TILES_TOGETHER), |parts| {
            let mut row = Row::default();
            for (tile, words, d, sums, s) in parts {
                for token in 0..tile.tokens {
                    let from = &values[(tile.first + token) * columns..][..columns];
                    fill_row(isa, &mut row, from, form, activation);
                    row.pack_words(form, words, tile.tokens, token);
                    spread(&row.d, d, tile.tokens, token);
                    spread(&row.sums, sums, tile.tokens, token);
                    spread(&row.s, s, tile.tokens, token);
                }
            }
        });
        input
    }

    /// All tiles.
    pub fn tiles(&self) -> &[TokenTile] {
        &self.tiles
    }

    fn part<'a, T>(
        &self,
        all: &'a [T],
        tile: TokenTile,
        row_len: usize,
        part: (usize, usize),
    ) -> &'a [T] {
        let begin = tile.first * row_len + part.0 * tile.tokens;
        &all[begin..begin + part.1 * tile.tokens]
    }

    /// Words of columns `first..first + count` as f32.
    pub fn floats(&self, tile: TokenTile, first: usize, count: usize) -> &[f32] {
        bytemuck::cast_slice(self.part(&self.words, tile, self.columns, (first, count)))
    }

    /// The same as BF16 pairs.
    pub fn bf16(&self, tile: TokenTile, first: usize, count: usize) -> &[u32] {
        self.part(&self.words, tile, self.columns / 2, (first / 2, count / 2))
    }

    /// The same as blocks of 32.
    pub fn blocks(&self, tile: TokenTile, first: usize, count: usize) -> BlockInput<'_> {
        let blocks = self.columns / 32;
        let part = (first / 32, count / 32);
        BlockInput {
            codes: self.part(&self.words, tile, self.columns / 4, (first / 4, count / 4)),
            d: self.part(&self.d, tile, blocks, part),
            start: bytemuck::cast_slice(self.part(&self.sums, tile, blocks, part)),
            s: if self.s.is_empty() {
                &[]
            } else {
                self.part(&self.s, tile, blocks, part)
            },
        }
    }

    /// The same as super-blocks of 256.
    pub fn super_blocks(&self, tile: TokenTile, first: usize, count: usize) -> SuperInput<'_> {
        let Form::SuperBlocks { sub_block } = self.form else {
            unreachable!("packed in another form")
        };
        let pair = 2 * sub_block;
        SuperInput {
            codes: self.part(&self.words, tile, self.columns / 4, (first / 4, count / 4)),
            d: self.part(
                &self.d,
                tile,
                self.columns / 256,
                (first / 256, count / 256),
            ),
            sums: self.part(
                &self.sums,
                tile,
                self.columns / pair,
                (first / pair, count / pair),
            ),
        }
    }
}

fn cut<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (part, after) = std::mem::take(rest).split_at_mut(len);
    *rest = after;
    part
}

/// Writes one token's values into their column.
fn spread<T: Copy>(values: &[T], out: &mut [T], tokens: usize, token: usize) {
    for (value, out) in values.iter().zip(out.chunks_exact_mut(tokens)) {
        out[token] = *value;
    }
}

multiversion! {
    fn fill_row(row: &mut Row, values: &[f32], form: Form, activation: Activation) = Row::fill;
}

impl Row {
    #[inline(always)]
    fn fill(&mut self, values: &[f32], form: Form, activation: Activation) {
        self.d.clear();
        self.sums.clear();
        self.s.clear();
        match form {
            Form::Float => {
                self.values.clear();
                self.values.extend_from_slice(values);
                activation.round_trip(&mut self.values);
            }
            Form::Bf16 => {
                self.values.clear();
                self.values.extend_from_slice(values);
            }
            Form::Blocks { zero, affine } => {
                self.codes.resize(values.len(), 0);
                let blocks = values.as_chunks::<32>().0.iter();
                for (block, codes) in blocks.zip(self.codes.as_chunks_mut::<32>().0) {
                    self.d.push(quantize_q8_0(block, codes).to_f32());
                    let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
                    self.sums.push((-zero * sum) as u32);
                    if affine {
                        self.s.push(block_q8_1_sum(block, codes).to_f32());
                    }
                }
            }
            Form::SuperBlocks { sub_block } => {
                self.codes.resize(values.len(), 0);
                let blocks = values.as_chunks::<256>().0.iter();
                for (block, codes) in blocks.zip(self.codes.as_chunks_mut::<256>().0) {
                    self.d.push(quantize_q8_k(block, codes));
                    let sum = |codes: &[i8]| codes.iter().map(|c| i16::from(*c)).sum::<i16>();
                    for pair in codes.chunks_exact(2 * sub_block) {
                        let (low, high) = (sum(&pair[..sub_block]), sum(&pair[sub_block..]));
                        self.sums
                            .push(u32::from(low as u16) | u32::from(high as u16) << 16);
                    }
                }
            }
        }
    }

    fn pack_words(&self, form: Form, words: &mut [u32], tokens: usize, token: usize) {
        let places = words
            .chunks_exact_mut(tokens)
            .map(|words| &mut words[token]);
        match form {
            Form::Float => places
                .zip(&self.values)
                .for_each(|(word, value)| *word = value.to_bits()),
            Form::Bf16 => places
                .zip(self.values.as_chunks::<2>().0)
                .for_each(|(word, pair)| {
                    let low = u32::from(bf16::from_f32(pair[0]).to_bits());
                    let high = u32::from(bf16::from_f32(pair[1]).to_bits());
                    *word = low | high << 16;
                }),
            Form::Blocks { .. } | Form::SuperBlocks { .. } => {
                places
                    .zip(self.codes.as_chunks::<4>().0)
                    .for_each(|(word, codes)| {
                        *word = bytemuck::cast(*codes);
                    });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once() {
        for rows in [0, 1, 7, 8, 13, 64] {
            let mut next = 0;
            for tile in token_tiles(rows) {
                assert_eq!(tile.first, next);
                assert!([1, 2, 4, 8].contains(&tile.tokens));
                next += tile.tokens;
            }
            assert_eq!(next, rows);
        }
    }
}
