//! Weight rows in their stored type to panels that the kernels multiply with.
//!
//! Enters: stored bytes of up to 32 (floats) or 16 (codes) rows, a chunk of columns. Leaves: words in lanes, codes
//! unsigned, scales beside them. Dequantizes nothing that a code can carry.

use bytemuck::{cast_slice, cast_slice_mut};
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, IQ4_NL_VALUES, MXFP4_VALUES, dequantize,
    mxfp4_scale,
};

use super::kernels::{self, Blocks, FLOAT_ROWS, Isa, LANES, SuperBlocks};
use crate::backend::activation::Activation;

/// Columns that are packed at a time: a multiple of every block, small enough that panels stay in the cache.
pub const CHUNK: usize = 512;

/// The table of IQ4_NL and IQ4_XS as unsigned codes around 128.
const IQ4_NL_CODES: [u8; 16] = unsigned(IQ4_NL_VALUES);
/// The table of MXFP4 as unsigned codes around 128.
const MXFP4_CODES: [u8; 16] = unsigned(MXFP4_VALUES);

/// Whole numbers from -128 to 127, moved by 128.
const fn unsigned(values: [f32; 16]) -> [u8; 16] {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < codes.len() {
        codes[i] = (values[i] as i32 + 128) as u8;
        i += 1;
    }
    codes
}

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
    floats: Vec<[u32; FLOAT_ROWS]>,
    d: Vec<[f32; LANES]>,
    m: Vec<[f32; LANES]>,
    scales: Vec<[i32; LANES]>,
    mins: Vec<[u32; LANES]>,
    /// Rows before they are interleaved.
    rows: Vec<u32>,
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
}

impl<'a> Rows<'a> {
    fn row_bytes(&self) -> usize {
        self.bytes_of(self.columns)
    }

    fn bytes_of(&self, columns: usize) -> usize {
        columns / self.ty.block_elements() * self.ty.block_bytes()
    }

    fn count(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// Bytes of `count` columns of a row from `first` on; both are whole blocks.
    fn part(&self, row: usize, first: usize, count: usize) -> &'a [u8] {
        let begin = row * self.row_bytes() + self.bytes_of(first);
        &self.bytes[begin..begin + self.bytes_of(count)]
    }
}

/// Whole groups of lanes, for slices that are written lane by lane.
fn resize<T: Clone + bytemuck::Zeroable>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    buffer.resize(len.max(buffer.len()), T::zeroed());
    &mut buffer[..len]
}

impl Panels {
    /// Packs columns `first..first + count` of 32 rows from `row` on as f32 (fewer rows are filled up with zeros).
    pub fn floats(
        &mut self,
        isa: Isa,
        rows: Rows,
        row: usize,
        first: usize,
        count: usize,
    ) -> &[[f32; FLOAT_ROWS]] {
        let values = resize(&mut self.rows, FLOAT_ROWS * count);
        let filled = (rows.count() - row).min(FLOAT_ROWS);
        values[filled * count..].fill(0);
        for (index, out) in values.chunks_exact_mut(count).enumerate().take(filled) {
            let out: &mut [f32] = cast_slice_mut(out);
            dequantize(rows.ty, rows.part(row + index, first, count), out)
                .expect("the type was checked when the weight was opened");
        }
        let panel = resize(&mut self.floats, count);
        interleave_halves(isa, values, count, &mut self.words, panel);
        cast_slice(panel)
    }

    /// The same for BF16 rows, as pairs.
    pub fn bf16(
        &mut self,
        isa: Isa,
        rows: Rows,
        row: usize,
        first: usize,
        count: usize,
    ) -> &[[u32; FLOAT_ROWS]] {
        let pairs = count / 2;
        let words = resize(&mut self.rows, FLOAT_ROWS * pairs);
        let filled = (rows.count() - row).min(FLOAT_ROWS);
        words[filled * pairs..].fill(0);
        for (index, out) in words.chunks_exact_mut(pairs).enumerate().take(filled) {
            cast_slice_mut::<u32, u8>(out).copy_from_slice(rows.part(row + index, first, count));
        }
        let panel = resize(&mut self.floats, pairs);
        interleave_halves(isa, words, pairs, &mut self.words, panel);
        panel
    }

    /// Packs columns `first..first + count` of 16 rows from `row` on as codes in blocks of 32.
    pub fn blocks(
        &mut self,
        isa: Isa,
        rows: Rows,
        row: usize,
        first: usize,
        count: usize,
    ) -> Blocks<'_> {
        let blocks = count / 32;
        let d = resize(&mut self.d, blocks);
        let m = resize(&mut self.m, blocks);
        let codes = resize(&mut self.rows, LANES * count / 4);
        d.fill([0.0; LANES]);
        m.fill([0.0; LANES]);
        let mut affine = false;
        for (lane, codes) in codes.chunks_exact_mut(count / 4).enumerate() {
            if row + lane >= rows.count() {
                codes.fill(0);
                continue;
            }
            let bytes = rows.part(row + lane, first, count);
            let (codes, _) = cast_slice_mut::<u32, u8>(codes).as_chunks_mut::<32>();
            affine = block_row(rows.ty, bytes, codes, |block, scale, min| {
                d[block][lane] = scale;
                m[block][lane] = min;
            });
        }
        let words = resize(&mut self.words, count / 4);
        kernels::interleave(isa, lanes(codes, count / 4), words);
        Blocks {
            codes: words,
            d,
            m: if affine { m } else { &[] },
        }
    }

    /// The same in super-blocks of 256.
    pub fn super_blocks(
        &mut self,
        isa: Isa,
        rows: Rows,
        row: usize,
        first: usize,
        count: usize,
    ) -> SuperBlocks<'_> {
        let blocks = count / 256;
        let sub_block = match rows.ty {
            GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q6_K => 16,
            _ => 32,
        };
        let subs = 256 / sub_block;
        let d = resize(&mut self.d, blocks);
        let dmin = resize(&mut self.m, blocks);
        let scales = resize(&mut self.scales, blocks * subs);
        let mins = resize(&mut self.mins, blocks * subs / 2);
        let codes = resize(&mut self.rows, LANES * count / 4);
        d.fill([0.0; LANES]);
        dmin.fill([0.0; LANES]);
        let mut has_dmin = false;
        for (lane, codes) in codes.chunks_exact_mut(count / 4).enumerate() {
            if row + lane >= rows.count() {
                codes.fill(0);
                continue;
            }
            let bytes = rows.part(row + lane, first, count);
            let (codes, _) = cast_slice_mut::<u32, u8>(codes).as_chunks_mut::<256>();
            for (index, codes) in codes.iter_mut().enumerate() {
                let block = super_block(rows.ty, bytes, index, codes);
                d[index][lane] = block.d;
                dmin[index][lane] = block.dmin.unwrap_or(0.0);
                has_dmin = block.dmin.is_some();
                for sub in 0..subs {
                    scales[index * subs + sub][lane] = i32::from(block.scales[sub]);
                }
                for pair in 0..subs / 2 {
                    let word = |i: usize| u32::from(block.mins[i] as u16);
                    mins[index * subs / 2 + pair][lane] = word(2 * pair) | word(2 * pair + 1) << 16;
                }
            }
        }
        let words = resize(&mut self.words, count / 4);
        kernels::interleave(isa, lanes(codes, count / 4), words);
        SuperBlocks {
            codes: words,
            scales,
            mins,
            d,
            dmin: if has_dmin { dmin } else { &[] },
            sub_words: sub_block / 4,
        }
    }
}

/// Sixteen rows of `words` words each.
fn lanes(rows: &[u32], words: usize) -> [&[u32]; LANES] {
    std::array::from_fn(|lane| &rows[lane * words..][..words])
}

/// Interleaves two times sixteen rows into the halves of a float panel.
fn interleave_halves(
    isa: Isa,
    rows: &[u32],
    words: usize,
    buffer: &mut Vec<[u32; LANES]>,
    panel: &mut [[u32; FLOAT_ROWS]],
) {
    let half = resize(buffer, words);
    for side in 0..2 {
        kernels::interleave(isa, lanes(&rows[side * LANES * words..], words), half);
        for (out, lanes) in panel.iter_mut().zip(half.iter()) {
            out[side * LANES..][..LANES].copy_from_slice(lanes);
        }
    }
}

/// Unpacks a row of 32-blocks: unsigned codes, scale and minimum of each. Whether the type has minima.
fn block_row(
    ty: GgmlType,
    bytes: &[u8],
    codes: &mut [[u8; 32]],
    mut scales: impl FnMut(usize, f32, f32),
) -> bool {
    macro_rules! each {
        ($block:ident, |$b:ident, $out:ident| $scale:expr, $min:expr) => {
            for (index, ($b, $out)) in cast_slice::<u8, $block>(bytes)
                .iter()
                .zip(codes)
                .enumerate()
            {
                let (scale, min) = ($scale, $min);
                scales(index, scale, min);
            }
        };
    }
    match ty {
        GgmlType::Q8_0 => each!(
            BlockQ8_0,
            |b, out| {
                let (d, signed) = b.parts();
                *out = signed.map(|code| code as u8 ^ 0x80);
                d.to_f32()
            },
            0.0
        ),
        GgmlType::Q4_0 => each!(
            BlockQ4_0,
            |b, out| {
                let (d, unsigned) = b.parts();
                *out = unsigned;
                d.to_f32()
            },
            0.0
        ),
        GgmlType::Q5_0 => each!(
            BlockQ5_0,
            |b, out| {
                let (d, unsigned) = b.parts();
                *out = unsigned;
                d.to_f32()
            },
            0.0
        ),
        GgmlType::IQ4_NL => each!(
            BlockIQ4NL,
            |b, out| {
                let (d, indices) = b.parts();
                *out = indices.map(|i| IQ4_NL_CODES[usize::from(i & 15)]);
                d.to_f32()
            },
            0.0
        ),
        GgmlType::MXFP4 => each!(
            BlockMXFP4,
            |b, out| {
                let (e, indices) = b.parts();
                *out = indices.map(|i| MXFP4_CODES[usize::from(i & 15)]);
                mxfp4_scale(e)
            },
            0.0
        ),
        GgmlType::Q4_1 => {
            for (index, (b, out)) in cast_slice::<u8, BlockQ4_1>(bytes)
                .iter()
                .zip(codes)
                .enumerate()
            {
                let (d, m, unsigned) = b.parts();
                *out = unsigned;
                scales(index, d.to_f32(), m.to_f32());
            }
            return true;
        }
        GgmlType::Q5_1 => {
            for (index, (b, out)) in cast_slice::<u8, BlockQ5_1>(bytes)
                .iter()
                .zip(codes)
                .enumerate()
            {
                let (d, m, unsigned) = b.parts();
                *out = unsigned;
                scales(index, d.to_f32(), m.to_f32());
            }
            return true;
        }
        _ => unreachable!("`Form::of` names the types of this form"),
    }
    false
}

/// Scales of one super-block; codes are written beside.
struct SuperBlock {
    d: f32,
    /// `None` where the minima share `d`.
    dmin: Option<f32>,
    scales: [i16; 16],
    /// With `dmin` the stored minima, else scale times the code of zero.
    mins: [i16; 16],
}

impl SuperBlock {
    /// `d * scale * (code - zero)`.
    fn symmetric<const N: usize>(d: f32, scales: [i8; N], zero: i16) -> Self {
        let mut all = [0; 16];
        all.iter_mut()
            .zip(scales)
            .for_each(|(wide, scale)| *wide = i16::from(scale));
        Self {
            d,
            dmin: None,
            scales: all,
            mins: all.map(|scale| scale * zero),
        }
    }

    /// `d * scale * code - dmin * min`.
    fn affine<const N: usize>(d: f32, dmin: f32, scales: [u8; N], mins: [u8; N]) -> Self {
        let widen = |narrow: [u8; N]| {
            let mut all = [0; 16];
            all.iter_mut()
                .zip(narrow)
                .for_each(|(wide, value)| *wide = i16::from(value));
            all
        };
        Self {
            d,
            dmin: Some(dmin),
            scales: widen(scales),
            mins: widen(mins),
        }
    }
}

fn super_block(ty: GgmlType, bytes: &[u8], index: usize, codes: &mut [u8; 256]) -> SuperBlock {
    match ty {
        GgmlType::Q2_K => {
            let (d, dmin, scales, mins, unsigned) =
                cast_slice::<u8, BlockQ2K>(bytes)[index].parts();
            *codes = unsigned;
            SuperBlock::affine(d.to_f32(), dmin.to_f32(), scales, mins)
        }
        GgmlType::Q4_K => {
            let (d, dmin, scales, mins, unsigned) =
                cast_slice::<u8, BlockQ4K>(bytes)[index].parts();
            *codes = unsigned;
            SuperBlock::affine(d.to_f32(), dmin.to_f32(), scales, mins)
        }
        GgmlType::Q5_K => {
            let (d, dmin, scales, mins, unsigned) =
                cast_slice::<u8, BlockQ5K>(bytes)[index].parts();
            *codes = unsigned;
            SuperBlock::affine(d.to_f32(), dmin.to_f32(), scales, mins)
        }
        GgmlType::Q3_K => {
            let (d, scales, unsigned) = cast_slice::<u8, BlockQ3K>(bytes)[index].parts();
            *codes = unsigned;
            SuperBlock::symmetric(d.to_f32(), scales, 4)
        }
        GgmlType::Q6_K => {
            let (d, scales, unsigned) = cast_slice::<u8, BlockQ6K>(bytes)[index].parts();
            *codes = unsigned;
            SuperBlock::symmetric(d.to_f32(), scales, 32)
        }
        GgmlType::IQ4_XS => {
            let (d, scales, indices) = cast_slice::<u8, BlockIQ4XS>(bytes)[index].parts();
            *codes = indices.map(|i| IQ4_NL_CODES[usize::from(i & 15)]);
            SuperBlock::symmetric(d.to_f32(), scales, 128)
        }
        _ => unreachable!("`Form::of` names the types of this form"),
    }
}
