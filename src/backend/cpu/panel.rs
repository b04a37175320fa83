//! Weight rows in their stored type to panels that the kernels multiply with.
//!
//! Enters: stored bytes of up to 32 (floats) or 16 (codes) rows, a chunk of columns. Leaves: words in lanes, codes
//! unsigned, scales beside them. Dequantizes nothing that a code can carry.

use bytemuck::{cast_slice, cast_slice_mut, try_cast_slice};
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;

use super::kernels::{self, Blocks, FLOAT_ROWS, Halves, Isa, LANES, SuperBlocks};
use super::unpack::{self, BlockScales, MAX_SUPER_BLOCKS, SuperScales};
use crate::backend::activation::Activation;

/// Columns that are packed at a time: a multiple of every block, small enough that panels stay in the cache.
pub const CHUNK: usize = 512;

/// Bytes of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

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
    /// The second half of a panel of floats.
    high: Vec<[u32; LANES]>,
    d: Vec<[f32; LANES]>,
    m: Vec<[f32; LANES]>,
    scales: Vec<[i32; LANES]>,
    mins: Vec<[u32; LANES]>,
    /// Rows before they are interleaved.
    rows: Vec<u32>,
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

    /// Asks for the bytes of a panel of `height` rows, which will be read soon: rows lie pages apart, further than the
    /// processor looks ahead by itself.
    pub fn prefetch(&self, part: Part, height: usize) {
        #[cfg(target_arch = "x86_64")]
        for row in part.row..(part.row + height).min(self.count()) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            let (lines, _) = self
                .part(row, part.first, part.count)
                .as_chunks::<LINE_BYTES>();
            for line in lines {
                // SAFETY: the address is that of a byte of the slice; a prefetch changes nothing but caches.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (part, height);
    }

    /// Bytes of `count` columns of a row from `first` on; both are whole blocks.
    fn part(&self, row: usize, first: usize, count: usize) -> &'a [u8] {
        let begin = row * self.row_bytes + self.bytes_of(first);
        &self.bytes[begin..begin + self.bytes_of(count)]
    }
}

/// Whole groups of lanes, for slices that are written lane by lane.
fn resize<T: Clone + bytemuck::Zeroable>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    buffer.resize(len.max(buffer.len()), T::zeroed());
    &mut buffer[..len]
}

impl Panels {
    /// Packs 32 rows as f32; rows that are not there are zeros.
    pub fn floats(&mut self, isa: Isa, rows: Rows, part: Part) -> Halves<'_, f32> {
        let Part { row, first, count } = part;
        let values = resize(&mut self.rows, FLOAT_ROWS * count);
        let filled = (rows.count() - row).min(FLOAT_ROWS);
        values[filled * count..].fill(0);
        for (index, out) in values.chunks_exact_mut(count).enumerate().take(filled) {
            let out: &mut [f32] = cast_slice_mut(out);
            dequantize(rows.ty, rows.part(row + index, first, count), out)
                .expect("the type was checked when the weight was opened");
        }
        let (low, high) = interleave_halves(isa, values, count, &mut self.words, &mut self.high);
        [cast_slice(low), cast_slice(high)]
    }

    /// The same for BF16 rows, as pairs.
    pub fn bf16(&mut self, isa: Isa, rows: Rows, part: Part) -> Halves<'_, u32> {
        let Part { row, first, count } = part;
        let pairs = count / 2;
        let filled = (rows.count() - row).min(FLOAT_ROWS);
        let mut stored: [&[u32]; FLOAT_ROWS] = [&[]; FLOAT_ROWS];
        for (index, words) in stored.iter_mut().enumerate().take(filled) {
            *words = try_cast_slice(rows.part(row + index, first, count)).unwrap_or_default();
        }
        if stored.iter().all(|words| words.len() == pairs) {
            let (low, high) = (
                resize(&mut self.words, pairs),
                resize(&mut self.high, pairs),
            );
            let (halves, _) = stored.as_chunks::<LANES>();
            kernels::interleave(isa, halves[0], low);
            kernels::interleave(isa, halves[1], high);
            return [low, high];
        }
        // Rows that are missing, or lie at odd addresses.
        let words = resize(&mut self.rows, FLOAT_ROWS * pairs);
        words[filled * pairs..].fill(0);
        for (index, out) in words.chunks_exact_mut(pairs).enumerate().take(filled) {
            cast_slice_mut::<u32, u8>(out).copy_from_slice(rows.part(row + index, first, count));
        }
        let (low, high) = interleave_halves(isa, words, pairs, &mut self.words, &mut self.high);
        [low, high]
    }

    /// Packs 16 rows as codes in blocks of 32.
    pub fn blocks(&mut self, isa: Isa, rows: Rows, part: Part) -> Blocks<'_> {
        let Part { row, first, count } = part;
        let (blocks, words) = (count / 32, count / 4);
        let d = resize(&mut self.d, blocks);
        let m = resize(&mut self.m, blocks);
        let codes = resize(&mut self.rows, LANES * words);
        let mut scales = BlockScales::default();
        for (lane, codes) in codes.chunks_exact_mut(words).enumerate() {
            if row + lane < rows.count() {
                let (codes, _) = cast_slice_mut::<u32, u8>(codes).as_chunks_mut::<32>();
                let bytes = rows.part(row + lane, first, count);
                unpack::blocks(isa, rows.ty, bytes, codes, &mut scales);
            } else {
                codes.fill(0);
                scales = BlockScales::default();
            }
            for block in 0..blocks {
                d[block][lane] = scales.d[block];
                m[block][lane] = scales.m[block];
            }
        }
        let panel = resize(&mut self.words, words);
        kernels::interleave(isa, lanes(codes, words), panel);
        let is_affine = matches!(rows.ty, GgmlType::Q4_1 | GgmlType::Q5_1);
        Blocks {
            codes: panel,
            d,
            m: if is_affine { m } else { &[] },
        }
    }

    /// The same in super-blocks of 256.
    pub fn super_blocks(&mut self, isa: Isa, rows: Rows, part: Part) -> SuperBlocks<'_> {
        let Part { row, first, count } = part;
        let (blocks, words) = (count / 256, count / 4);
        let sub_block = match rows.ty {
            GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q6_K => 16,
            _ => 32,
        };
        let subs = 256 / sub_block;
        let d = resize(&mut self.d, blocks);
        let dmin = resize(&mut self.m, blocks);
        let scales = resize(&mut self.scales, blocks * subs);
        let mins = resize(&mut self.mins, blocks * subs / 2);
        let codes = resize(&mut self.rows, LANES * words);
        let mut unpacked = [SuperScales::default(); MAX_SUPER_BLOCKS];
        for (lane, codes) in codes.chunks_exact_mut(words).enumerate() {
            if row + lane < rows.count() {
                let (codes, _) = cast_slice_mut::<u32, u8>(codes).as_chunks_mut::<256>();
                let bytes = rows.part(row + lane, first, count);
                unpack::super_blocks(isa, rows.ty, bytes, codes, &mut unpacked);
            } else {
                codes.fill(0);
                unpacked = [SuperScales::default(); MAX_SUPER_BLOCKS];
            }
            for (block, from) in unpacked.iter().enumerate().take(blocks) {
                d[block][lane] = from.d;
                dmin[block][lane] = from.dmin;
                for sub in 0..subs {
                    scales[block * subs + sub][lane] = i32::from(from.scales[sub]);
                }
                for pair in 0..subs / 2 {
                    let word = |i: usize| u32::from(from.mins[i] as u16);
                    mins[block * subs / 2 + pair][lane] = word(2 * pair) | word(2 * pair + 1) << 16;
                }
            }
        }
        let panel = resize(&mut self.words, words);
        kernels::interleave(isa, lanes(codes, words), panel);
        SuperBlocks {
            codes: panel,
            scales,
            mins,
            d,
            dmin: if unpack::has_dmin(rows.ty) { dmin } else { &[] },
            sub_words: sub_block / 4,
        }
    }
}

/// Sixteen rows of `words` words each.
fn lanes(rows: &[u32], words: usize) -> [&[u32]; LANES] {
    std::array::from_fn(|lane| &rows[lane * words..][..words])
}

/// Interleaves the first and the second sixteen rows.
fn interleave_halves<'a>(
    isa: Isa,
    rows: &[u32],
    words: usize,
    low: &'a mut Vec<[u32; LANES]>,
    high: &'a mut Vec<[u32; LANES]>,
) -> (&'a [[u32; LANES]], &'a [[u32; LANES]]) {
    let (low, high) = (resize(low, words), resize(high, words));
    let (first, second) = rows.split_at(LANES * words);
    kernels::interleave(isa, lanes(first, words), low);
    kernels::interleave(isa, lanes(second, words), high);
    (low, high)
}
