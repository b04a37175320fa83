//! Weight rows in their stored type to panels that the kernels multiply with.
//!
//! Enters: stored bytes of up to 32 (floats) or 16 (codes) rows, a chunk of columns. Leaves: words in lanes, codes
//! unsigned, scales beside them. Dequantizes nothing that a code can carry.

use bytemuck::{bytes_of, cast_slice, cast_slice_mut, try_cast_slice};
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;

use super::kernels::{
    self, Ahead, BlockRows, BlockScales, Blocks, FLOAT_ROWS, Halves, Isa, LANES, MAX_SUPER_BLOCKS,
    SuperBlocks, SuperRows, SuperScales,
};
use super::unpack;
use crate::backend::activation::Activation;

/// Columns that are packed at a time: a multiple of every block, small enough that panels stay in the cache.
pub const CHUNK: usize = 512;

/// How a stored type is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As f32 values, whatever the type.
    Float,
    /// As BF16 pairs.
    Bf16,
    /// As codes in blocks of 32: what is subtracted from every code.
    Blocks {
        /// The code of zero.
        zero: i32,
        /// Whether blocks have a minimum.
        affine: bool,
    },
    /// As codes in super-blocks of 256.
    SuperBlocks {
        /// Weights that share a scale: 16 or 32.
        sub_block: usize,
    },
}

impl Form {
    /// The form in which a type meets activations: codes only where those are quantized as the type's partner.
    pub fn of(ty: GgmlType, activation: Activation, columns: usize) -> Self {
        use GgmlType as T;
        if activation != Activation::of_runtime(ty) || !activation.fits(columns) {
            return Self::Float;
        }
        match ty {
            T::BF16 if columns.is_multiple_of(2) => Self::Bf16,
            T::Q4_0 => Self::symmetric(8),
            T::Q5_0 => Self::symmetric(16),
            T::Q8_0 | T::IQ4_NL | T::MXFP4 => Self::symmetric(128),
            T::Q4_1 | T::Q5_1 => Self::Blocks {
                zero: 0,
                affine: true,
            },
            T::Q2_K | T::Q3_K | T::Q6_K => Self::SuperBlocks { sub_block: 16 },
            T::Q4_K | T::Q5_K | T::IQ4_XS => Self::SuperBlocks { sub_block: 32 },
            _ => Self::Float,
        }
    }

    const fn symmetric(zero: i32) -> Self {
        Self::Blocks {
            zero,
            affine: false,
        }
    }
}

/// Buffers of one worker: the packed panels of a tile of rows.
#[derive(Debug, Default)]
pub struct Panels {
    words: Vec<[u32; LANES]>,
    /// The second half of a panel of floats, or the scales of a panel of codes.
    beside: Vec<[u32; LANES]>,
    /// Both halves of a panel of floats that was one of pairs.
    widened: [Vec<[u32; LANES]>; 2],
    rows: UnpackedRows,
}

/// Rows before they are interleaved.
#[derive(Debug, Default)]
pub struct UnpackedRows {
    words: Vec<u32>,
    blocks: [BlockScales; LANES],
    super_blocks: [[SuperScales; MAX_SUPER_BLOCKS]; LANES],
}

/// What is packed: columns `first..first + count` of a panel of rows from `row` on.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// First row of the panel.
    pub row: usize,
    /// First column.
    pub first: usize,
    /// Columns.
    pub count: usize,
}

/// Stored rows of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Whole rows without gaps.
    pub bytes: &'a [u8],
    /// Their type.
    pub ty: GgmlType,
    /// Row length.
    pub columns: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
}

impl<'a> Rows<'a> {
    fn bytes_of(&self, columns: usize) -> usize {
        columns / self.ty.block_elements() * self.ty.block_bytes()
    }

    /// Rows.
    pub fn count(&self) -> usize {
        self.bytes.len() / self.row_bytes
    }

    /// What is read after `part`, a panel of `height` rows: as many bytes of the next panel, which follows this one.
    pub fn ahead(&self, part: Part, height: usize) -> Ahead {
        let next = (part.row + height) * self.row_bytes;
        Ahead::from(self.bytes, next + height * self.bytes_of(part.first))
    }

    /// The bytes of one part of every row from that of `part` on; the part is whole blocks.
    pub fn parts(self, part: Part) -> impl Iterator<Item = &'a [u8]> {
        let (first, count) = (self.bytes_of(part.first), self.bytes_of(part.count));
        let rows = self.bytes[part.row * self.row_bytes..].chunks_exact(self.row_bytes);
        rows.map(move |row| &row[first..first + count])
    }
}

/// Whole groups of lanes, for slices that are written lane by lane.
fn resize<T: Clone + bytemuck::Zeroable>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    buffer.resize(len.max(buffer.len()), T::zeroed());
    &mut buffer[..len]
}

impl UnpackedRows {
    /// 32 rows as f32; rows that are not there are zeros.
    pub fn floats<'a>(&'a mut self, rows: Rows<'a>, part: Part) -> [&'a [u32]; FLOAT_ROWS] {
        if rows.ty == GgmlType::F32
            && let Some(stored) = stored_words(rows, part)
        {
            return stored;
        }
        let words = self.filled(rows, part, part.count);
        for (out, bytes) in words.chunks_exact_mut(part.count).zip(rows.parts(part)) {
            dequantize(rows.ty, bytes, cast_slice_mut(out))
                .expect("the type was checked when the weight was opened");
        }
        words_of(&self.words, part.count)
    }

    /// The same for BF16 rows, as pairs.
    pub fn bf16<'a>(&'a mut self, rows: Rows<'a>, part: Part) -> [&'a [u32]; FLOAT_ROWS] {
        if let Some(stored) = stored_words(rows, part) {
            return stored;
        }
        // Rows that are missing, or lie at odd addresses.
        let pairs = part.count / 2;
        let words = self.filled(rows, part, pairs);
        for (out, bytes) in words.chunks_exact_mut(pairs).zip(rows.parts(part)) {
            cast_slice_mut::<u32, u8>(out).copy_from_slice(bytes);
        }
        words_of(&self.words, pairs)
    }

    /// Room for 32 rows of `words` words; those of rows that are not there are zeros.
    fn filled(&mut self, rows: Rows, part: Part, words: usize) -> &mut [u32] {
        let filled = (rows.count() - part.row).min(FLOAT_ROWS);
        let all = resize(&mut self.words, FLOAT_ROWS * words);
        all[filled * words..].fill(0);
        all
    }

    /// 16 rows as codes in blocks of 32.
    pub fn blocks(&mut self, isa: Isa, rows: Rows, part: Part) -> BlockRows<'_> {
        let unpack = unpack::blocks(rows.ty);
        let words = part.count / 4;
        let codes = resize(&mut self.words, LANES * words);
        let (ahead, mut parts) = (rows.ahead(part, LANES), rows.parts(part));
        let lanes = codes.chunks_exact_mut(words).zip(&mut self.blocks);
        for (lane, (codes, scales)) in lanes.enumerate() {
            let Some(bytes) = parts.next() else {
                codes.fill(0);
                *scales = BlockScales::default();
                continue;
            };
            let (codes, _) = cast_slice_mut::<u32, u8>(codes).as_chunks_mut::<32>();
            unpack(isa, bytes, codes, scales);
            ahead.fetch(lane * bytes.len(), bytes.len());
        }
        BlockRows {
            codes: words_of(&self.words, words),
            scales: &self.blocks,
            affine: matches!(rows.ty, GgmlType::Q4_1 | GgmlType::Q5_1),
        }
    }

    /// The same in super-blocks of 256.
    pub fn super_blocks(&mut self, isa: Isa, rows: Rows, part: Part) -> SuperRows<'_> {
        let unpack = unpack::super_blocks(rows.ty);
        let words = part.count / 4;
        let codes = resize(&mut self.words, LANES * words);
        let (ahead, mut parts) = (rows.ahead(part, LANES), rows.parts(part));
        let lanes = codes.chunks_exact_mut(words).zip(&mut self.super_blocks);
        for (lane, (codes, scales)) in lanes.enumerate() {
            let Some(bytes) = parts.next() else {
                codes.fill(0);
                *scales = [SuperScales::default(); MAX_SUPER_BLOCKS];
                continue;
            };
            let (codes, _) = cast_slice_mut::<u32, u8>(codes).as_chunks_mut::<256>();
            unpack(isa, bytes, codes, scales);
            ahead.fetch(lane * bytes.len(), bytes.len());
        }
        let sub_block = match rows.ty {
            GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q6_K => 16,
            _ => 32,
        };
        SuperRows {
            codes: words_of(&self.words, words),
            scales: &self.super_blocks,
            has_dmin: unpack::has_dmin(rows.ty),
            sub_words: sub_block / 4,
        }
    }
}

impl Panels {
    /// Rows that are multiplied without being interleaved.
    pub fn rows(&mut self) -> &mut UnpackedRows {
        &mut self.rows
    }

    /// Packs 32 rows as f32; rows that are not there are zeros.
    pub fn floats(&mut self, isa: Isa, rows: Rows, part: Part) -> Halves<'_, f32> {
        if rows.ty == GgmlType::BF16 && part.count.is_multiple_of(2) {
            return self.widened(isa, rows, part);
        }
        let rows = self.rows.floats(rows, part);
        let (low, high) = interleave_halves(isa, rows, &mut self.words, &mut self.beside);
        [cast_slice(low), cast_slice(high)]
    }

    /// Packs 32 rows of BF16 as f32: pairs take half the work to interleave.
    fn widened(&mut self, isa: Isa, rows: Rows, part: Part) -> Halves<'_, f32> {
        let rows = self.rows.bf16(rows, part);
        let (low, high) = interleave_halves(isa, rows, &mut self.words, &mut self.beside);
        let [first, second] = &mut self.widened;
        let (first, second) = (resize(first, part.count), resize(second, part.count));
        kernels::widen(isa, low, first);
        kernels::widen(isa, high, second);
        [cast_slice(first), cast_slice(second)]
    }

    /// The same for BF16 rows, as pairs.
    pub fn bf16(&mut self, isa: Isa, rows: Rows, part: Part) -> Halves<'_, u32> {
        let rows = self.rows.bf16(rows, part);
        let (low, high) = interleave_halves(isa, rows, &mut self.words, &mut self.beside);
        [low, high]
    }

    /// Packs 16 rows as codes in blocks of 32.
    pub fn blocks(&mut self, isa: Isa, rows: Rows, part: Part) -> Blocks<'_> {
        let rows = self.rows.blocks(isa, rows, part);
        let codes = resize(&mut self.words, part.count / 4);
        kernels::interleave(isa, rows.codes, codes);
        let scales = resize(&mut self.beside, 2 * LANES);
        let words = rows.scales.each_ref().map(|row| cast_slice(bytes_of(row)));
        kernels::interleave(isa, words, scales);
        let (d, m) = cast_slice(scales).split_at(LANES);
        let blocks = part.count / 32;
        Blocks {
            codes,
            d: &d[..blocks],
            m: if rows.affine { &m[..blocks] } else { &[] },
        }
    }

    /// The same in super-blocks of 256.
    pub fn super_blocks(&mut self, isa: Isa, rows: Rows, part: Part) -> SuperBlocks<'_> {
        let rows = self.rows.super_blocks(isa, rows, part);
        let codes = resize(&mut self.words, part.count / 4);
        kernels::interleave(isa, rows.codes, codes);
        let blocks = part.count / 256;
        let words = blocks * size_of::<SuperScales>() / size_of::<u32>();
        let scales = resize(&mut self.beside, words);
        let by_row = rows.scales.each_ref().map(|row| cast_slice(&row[..blocks]));
        kernels::interleave(isa, by_row, scales);
        SuperBlocks {
            codes,
            scales: cast_slice(scales),
            has_dmin: rows.has_dmin,
            sub_words: rows.sub_words,
        }
    }
}

/// Rows of `words` words each.
fn words_of<const ROWS: usize>(rows: &[u32], words: usize) -> [&[u32]; ROWS] {
    std::array::from_fn(|lane| &rows[lane * words..][..words])
}

/// 32 rows where they lie, if all are there and at addresses of whole words.
fn stored_words(rows: Rows<'_>, part: Part) -> Option<[&[u32]; FLOAT_ROWS]> {
    if rows.count() - part.row < FLOAT_ROWS {
        return None;
    }
    let mut stored: [&[u32]; FLOAT_ROWS] = [&[]; FLOAT_ROWS];
    for (words, bytes) in stored.iter_mut().zip(rows.parts(part)) {
        *words = try_cast_slice(bytes).ok()?;
    }
    Some(stored)
}

/// Interleaves the first and the second sixteen rows.
fn interleave_halves<'a>(
    isa: Isa,
    rows: [&[u32]; FLOAT_ROWS],
    low: &'a mut Vec<[u32; LANES]>,
    high: &'a mut Vec<[u32; LANES]>,
) -> (&'a [[u32; LANES]], &'a [[u32; LANES]]) {
    let words = rows[0].len();
    let (low, high) = (resize(low, words), resize(high, words));
    let (halves, _) = rows.as_chunks::<LANES>();
    kernels::interleave(isa, halves[0], low);
    kernels::interleave(isa, halves[1], high);
    (low, high)
}
