//! Matrix products with weights as they are stored: tiles of rows are packed into panels and multiplied with every token.
//!
//! Enters: a weight (mapped or streamed), f32 activations. Leaves: f32 rows. A result depends on its own row of weights
//! and its own token alone: columns are summed in chunks of fixed size, in order.

use std::cell::RefCell;

use super::CpuWeight;
use super::input::{Input, TokenTile};
use super::kernels::{self, FLOAT_ROWS, Isa, LANES, MAX_TOKENS};
use super::matvec::OneToken;
use super::multiversion::multiversion;
use super::panel::{CHUNK, Form, Panels, Part, Rows};
use super::shared_rows::SharedRows;
use crate::backend::activation::Activation;
use crate::error::Result;
use crate::parallel;

/// Weight rows that a worker packs together.
const TILE_ROWS: usize = 64;
/// Tokens per work item where there are few tiles of rows.
const TILE_TOKENS: usize = 128;
/// Tiles of rows that are enough work for all threads.
const ENOUGH_TILES: usize = 16;

/// Tiles of tokens up to which reading the weights takes longer than multiplying them.
const FEW_TILES: usize = 2;

/// What a worker keeps between tiles.
#[derive(Debug, Default)]
struct Scratch {
    bytes: Vec<u8>,
    panels: Panels,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `input [rows, columns]` times matrix `matrix` of `weight`, transposed.
///
/// # Errors
/// The weight cannot be read.
pub fn matmul(
    isa: Isa,
    weight: &CpuWeight,
    matrix: usize,
    input: &[f32],
    activation: Activation,
) -> Result<Vec<f32>> {
    let (out_features, columns) = (weight.tensor.rows, weight.tensor.columns);
    let tokens = input.len() / columns;
    let form = Form::of(weight.tensor.ty, activation, columns);
    let packed = Input::pack(isa, input, columns, form, activation);
    let mut out = vec![0.0; tokens * out_features];
    let shared = SharedRows::new(&mut out, out_features);
    let row_tiles = out_features.div_ceil(TILE_ROWS);
    let tiles = packed.tiles();
    let per_item = match row_tiles >= ENOUGH_TILES {
        true => tiles.len().max(1),
        false => TILE_TOKENS / MAX_TOKENS,
    };
    let token_items = tiles.len().div_ceil(per_item);
    let done: Result<Vec<()>> = parallel::try_map(0..row_tiles * token_items, |item| {
        let (row_tile, token_item) = (item % row_tiles, item / row_tiles);
        let begin = token_item * per_item;
        let tiles = &tiles[begin..(begin + per_item).min(tiles.len())];
        let product = Product {
            isa,
            form,
            input: &packed,
            tiles,
            first_row: row_tile * TILE_ROWS,
            out: &shared,
        };
        SCRATCH.with_borrow_mut(|scratch| product.run(weight, matrix, scratch))
    });
    done.map(|_| out)
}

/// One work item: up to 64 weight rows times some tiles of tokens.
struct Product<'a> {
    isa: Isa,
    form: Form,
    input: &'a Input,
    tiles: &'a [TokenTile],
    first_row: usize,
    out: &'a SharedRows<'a>,
}

impl Product<'_> {
    fn run(&self, weight: &CpuWeight, matrix: usize, scratch: &mut Scratch) -> Result<()> {
        let count = TILE_ROWS.min(weight.tensor.rows - self.first_row);
        let Scratch { bytes, panels } = scratch;
        let rows = Rows {
            bytes: weight.rows(matrix, self.first_row, count, bytes)?,
            ty: weight.tensor.ty,
            columns: weight.tensor.columns,
            row_bytes: weight.tensor.row_bytes(),
        };
        let step = match self.form {
            Form::Float | Form::Bf16 => FLOAT_ROWS,
            Form::Blocks { .. } | Form::SuperBlocks { .. } => LANES,
        };
        let panels_of_rows = (0..count).step_by(step);
        let chunks = (0..rows.columns).step_by(CHUNK);
        // With many tokens their packed columns stay in the cache for all rows; with few the weights are all there is to
        // read, and rows are read to their end.
        let few = self.tiles.len() <= FEW_TILES;
        let parts: Vec<(usize, usize)> = match !few {
            true => chunks
                .flat_map(|first| panels_of_rows.clone().map(move |row| (row, first)))
                .collect(),
            false => panels_of_rows
                .flat_map(|row| chunks.clone().map(move |first| (row, first)))
                .collect(),
        };
        for (row, first) in parts {
            let part = Part {
                row,
                first,
                count: CHUNK.min(rows.columns - first),
            };
            match self.form {
                Form::Float => self.floats(panels, rows, part),
                Form::Bf16 => self.bf16(panels, rows, part),
                Form::Blocks { .. } => self.blocks(panels, rows, part),
                Form::SuperBlocks { .. } => self.super_blocks(panels, rows, part),
            }
        }
        Ok(())
    }

    /// The only tile, if it is a single token.
    fn single<'a>(&'a self, rows: Rows<'a>, part: Part) -> Option<OneToken<'a>> {
        let [token] = self.tiles else { return None };
        (token.tokens == 1).then_some(OneToken {
            isa: self.isa,
            rows,
            part,
            input: self.input,
            token: *token,
        })
    }

    fn floats(&self, panels: &mut Panels, rows: Rows, part: Part) {
        if let Some(one) = self.single(rows, part) {
            let sums = one.floats(panels.rows());
            return add_floats(self.isa, self.place(one.token, rows, part), &[sums]);
        }
        let panel = panels.floats(self.isa, rows, part);
        let mut sums = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
        for &tile in self.tiles {
            let input = self.input.floats(tile, part.first, part.count);
            kernels::float(self.isa, tile.tokens, panel, input, &mut sums);
            add_floats(self.isa, self.place(tile, rows, part), &sums);
        }
    }

    fn bf16(&self, panels: &mut Panels, rows: Rows, part: Part) {
        if let Some(one) = self.single(rows, part) {
            let sums = one.bf16(panels.rows());
            return add_floats(self.isa, self.place(one.token, rows, part), &[sums]);
        }
        let panel = panels.bf16(self.isa, rows, part);
        let mut sums = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
        for &tile in self.tiles {
            let input = self.input.bf16(tile, part.first, part.count);
            kernels::bf16(self.isa, tile.tokens, panel, input, &mut sums);
            add_floats(self.isa, self.place(tile, rows, part), &sums);
        }
    }

    fn blocks(&self, panels: &mut Panels, rows: Rows, part: Part) {
        if let Some(one) = self.single(rows, part) {
            let sums = one.blocks(panels.rows());
            return add_codes(self.isa, self.place(one.token, rows, part), &[sums]);
        }
        let panel = panels.blocks(self.isa, rows, part);
        let mut sums = [[0.0; LANES]; MAX_TOKENS];
        for &tile in self.tiles {
            let input = self.input.blocks(tile, part.first, part.count);
            kernels::blocks(self.isa, tile.tokens, panel, input, &mut sums);
            add_codes(self.isa, self.place(tile, rows, part), &sums);
        }
    }

    fn super_blocks(&self, panels: &mut Panels, rows: Rows, part: Part) {
        if let Some(one) = self.single(rows, part) {
            let sums = one.super_blocks(panels.rows());
            return add_codes(self.isa, self.place(one.token, rows, part), &[sums]);
        }
        let panel = panels.super_blocks(self.isa, rows, part);
        let mut sums = [[0.0; LANES]; MAX_TOKENS];
        for &tile in self.tiles {
            let input = self.input.super_blocks(tile, part.first, part.count);
            kernels::super_blocks(self.isa, tile.tokens, panel, input, &mut sums);
            add_codes(self.isa, self.place(tile, rows, part), &sums);
        }
    }

    fn place(&self, tile: TokenTile, rows: Rows, part: Part) -> Place<'_> {
        Place {
            out: self.out,
            tile,
            first: self.first_row + part.row,
            rows: rows.count() - part.row,
            is_begun: part.first > 0,
        }
    }
}

/// Where the sums of a panel and a tile of tokens belong.
struct Place<'a> {
    out: &'a SharedRows<'a>,
    tile: TokenTile,
    /// Row of weights of the panel's first lane.
    first: usize,
    /// Rows of weights from there on; lanes beyond have no place.
    rows: usize,
    /// Whether the sums of earlier columns are there. If not, nothing is read: pages of a new buffer would be mapped
    /// twice, for reading and for writing.
    is_begun: bool,
}

multiversion! {
    fn add_floats(place: Place<'_>, sums: &[[f32; FLOAT_ROWS]]) = Place::add;
}

multiversion! {
    fn add_codes(place: Place<'_>, sums: &[[f32; LANES]]) = Place::add;
}

impl Place<'_> {
    #[inline(always)]
    fn add<const N: usize>(self, sums: &[[f32; N]]) {
        let filled = N.min(self.rows);
        for (token, sums) in sums.iter().enumerate().take(self.tile.tokens) {
            let token = self.tile.first + token;
            // SAFETY: the rows of this panel and these tokens belong to one work item alone.
            let out = unsafe { self.out.part(token, self.first, filled) };
            match (out.first_chunk_mut::<N>(), self.is_begun) {
                (Some(out), false) => *out = *sums,
                (Some(out), true) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
                (None, false) => out.copy_from_slice(&sums[..filled]),
                (None, true) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
            }
        }
    }
}
