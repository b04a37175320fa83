//! Codes of 4 and 8 bits in 32-bit words.
//!
//! Enters: signed codes, or the bytes of I32 tensors. Leaves: the other. A word holds consecutive codes, the first in
//! its lowest bits, each as the unsigned number `code + 2^(bits - 1)`; so a row of words is one little-endian bit
//! string. Words are little-endian bytes at any alignment.
//!
//! Source: compressed-tensors 0.19 `pack_to_int32`, GPTQModel 7.7 `pack_block`.

use crate::{Error, Result};

/// Bytes of a word.
pub const WORD_BYTES: usize = 4;

/// Rows whose words are written side by side where words of a row lie far apart: a line of the cache.
const ROWS_TOGETHER: usize = 16;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// -8 to 7, eight to a word.
    Four,
    /// -128 to 127, four to a word.
    Eight,
}

/// How the codes of one width lie in a word.
struct Digits<const N: usize, const HALVINGS: usize> {
    shifts: [u32; N],
    mask: u8,
    /// What is added to a code to make it unsigned: its highest bit, which is flipped.
    offset: u8,
    /// How bytes that hold a code each move together: shift, then bits that stay.
    halvings: [(u32, u64); HALVINGS],
}

const FOUR: Digits<8, 3> = Digits {
    shifts: [0, 4, 8, 12, 16, 20, 24, 28],
    mask: 0xf,
    offset: 8,
    halvings: [
        (4, 0x00ff_00ff_00ff_00ff),
        (8, 0x0000_ffff_0000_ffff),
        (16, 0x0000_0000_ffff_ffff),
    ],
};

const EIGHT: Digits<4, 0> = Digits {
    shifts: [0, 8, 16, 24],
    mask: 0xff,
    offset: 128,
    halvings: [],
};

/// Calls a method of the digits of `$width`.
macro_rules! with_digits {
    ($width:expr, $method:ident($($argument:expr),*)) => {
        match $width {
            Width::Four => FOUR.$method($($argument),*),
            Width::Eight => EIGHT.$method($($argument),*),
        }
    };
}

impl Width {
    /// The width of `bits`; other widths than 4 and 8 cross words and differ between releases.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        match bits {
            4 => Some(Self::Four),
            8 => Some(Self::Eight),
            _ => None,
        }
    }

    /// 4 or 8.
    pub const fn bits(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// Codes in a word.
    pub const fn per_word(self) -> usize {
        match self {
            Self::Four => 8,
            Self::Eight => 4,
        }
    }

    /// Words that `codes` codes take, the last one filled with zero bits.
    pub const fn words(self, codes: usize) -> usize {
        codes.div_ceil(self.per_word())
    }

    /// 1 in every code of a word: what GPTQ's first version subtracts from its zero points.
    const fn ones(self) -> u32 {
        match self {
            Self::Four => 0x1111_1111,
            Self::Eight => 0x0101_0101,
        }
    }
}

/// Packs rows of codes, each row into whole words, the bits after its last code zero.
///
/// `codes`: `[rows, columns]`; `bytes`: words `[rows, ceil(columns / per_word)]`. Of a code that does not fit the width
/// the lowest bits stay.
///
/// # Errors
/// The two slices do not hold the same rows.
pub fn pack_rows(width: Width, columns: usize, codes: &[i8], bytes: &mut [u8]) -> Result<()> {
    let row_bytes = row_bytes(width, columns, codes.len(), bytes.len())?;
    let rows = codes
        .chunks(columns.max(1))
        .zip(bytes.chunks_mut(row_bytes));
    for (codes, bytes) in rows {
        with_digits!(width, pack(codes, bytes));
    }
    Ok(())
}

/// Undoes [`pack_rows`].
///
/// # Errors
/// The two slices do not hold the same rows.
pub fn unpack_rows(width: Width, columns: usize, bytes: &[u8], codes: &mut [i8]) -> Result<()> {
    let row_bytes = row_bytes(width, columns, codes.len(), bytes.len())?;
    let rows = codes
        .chunks_mut(columns.max(1))
        .zip(bytes.chunks(row_bytes));
    for (codes, bytes) in rows {
        with_digits!(width, unpack(bytes, codes));
    }
    Ok(())
}

/// Packs columns of codes, each column into whole words: word `[w, c]` holds rows `per_word * w` and following of
/// column `c`. So lie the zero points of compressed-tensors.
///
/// `codes`: `[rows, columns]`; `bytes`: words `[ceil(rows / per_word), columns]`.
///
/// # Errors
/// The two slices do not hold the same columns.
pub fn pack_columns(width: Width, columns: usize, codes: &[i8], bytes: &mut [u8]) -> Result<()> {
    check_columns(width, columns, codes.len(), bytes.len())?;
    with_digits!(width, pack_columns(columns, codes, bytes));
    Ok(())
}

/// Undoes [`pack_columns`].
///
/// # Errors
/// The two slices do not hold the same columns.
pub fn unpack_columns(width: Width, columns: usize, bytes: &[u8], codes: &mut [i8]) -> Result<()> {
    check_columns(width, columns, codes.len(), bytes.len())?;
    with_digits!(width, unpack_columns(columns, bytes, codes));
    Ok(())
}

/// Packs rows of codes into columns of words: word `[w, r]` holds codes `per_word * w` and following of row `r`. So lies
/// the `qweight` of GPTQ.
///
/// `rows`: `columns` codes each, `columns` a multiple of `per_word`; `bytes`: words `[columns / per_word, rows]`.
///
/// # Errors
/// `bytes` is not as long as these rows take, or rows do not fill whole words.
pub fn pack_transposed(
    width: Width,
    columns: usize,
    rows: &[&[i8]],
    bytes: &mut [u8],
) -> Result<()> {
    let codes = rows.iter().map(|row| row.len()).sum();
    check_transposed(width, columns, codes, bytes.len())?;
    if rows.iter().any(|row| row.len() != columns) {
        return Err(mismatch(width, codes, bytes.len()));
    }
    with_digits!(width, pack_transposed(rows, bytes));
    Ok(())
}

/// Undoes [`pack_transposed`]. `bytes` may hold the words of some rows only: `[columns / per_word, rows]` cut out of a
/// wider tensor.
///
/// # Errors
/// The two slices do not hold the same rows, or rows do not fill whole words.
pub fn unpack_transposed(
    width: Width,
    columns: usize,
    bytes: &[u8],
    codes: &mut [i8],
) -> Result<()> {
    check_transposed(width, columns, codes.len(), bytes.len())?;
    with_digits!(width, unpack_transposed(columns, bytes, codes));
    Ok(())
}

/// Turns packed zero points into what the first version of GPTQ stores: one less, subtracted from whole words, so that
/// a zero point of 0 borrows from the next.
///
/// `bytes`: words.
pub fn to_gptq_v1_zeros(width: Width, bytes: &mut [u8]) {
    each_word(bytes, |word| word.wrapping_sub(width.ones()));
}

/// Undoes [`to_gptq_v1_zeros`].
pub fn from_gptq_v1_zeros(width: Width, bytes: &mut [u8]) {
    each_word(bytes, |word| word.wrapping_add(width.ones()));
}

fn each_word(bytes: &mut [u8], change: impl Fn(u32) -> u32) {
    for word in bytes.as_chunks_mut().0 {
        *word = change(u32::from_le_bytes(*word)).to_le_bytes();
    }
}

/// Bytes of a row of words, if rows of codes and of words are as many.
fn row_bytes(width: Width, columns: usize, codes: usize, bytes: usize) -> Result<usize> {
    let row_bytes = width.words(columns).saturating_mul(WORD_BYTES).max(1);
    let rows = codes.checked_div(columns).unwrap_or_default();
    let fits =
        rows.checked_mul(columns) == Some(codes) && rows.checked_mul(row_bytes) == Some(bytes);
    fits.then_some(row_bytes)
        .ok_or_else(|| mismatch(width, codes, bytes))
}

fn check_columns(width: Width, columns: usize, codes: usize, bytes: usize) -> Result<()> {
    let rows = codes.checked_div(columns).unwrap_or_default();
    let words = width.words(rows).checked_mul(columns);
    let fits = rows.checked_mul(columns) == Some(codes)
        && words.and_then(|words| words.checked_mul(WORD_BYTES)) == Some(bytes);
    fits.then_some(())
        .ok_or_else(|| mismatch(width, codes, bytes))
}

fn check_transposed(width: Width, columns: usize, codes: usize, bytes: usize) -> Result<()> {
    let rows = codes.checked_div(columns).unwrap_or_default();
    let words = width.words(columns).checked_mul(rows);
    let fits = columns.is_multiple_of(width.per_word())
        && rows.checked_mul(columns) == Some(codes)
        && words.and_then(|words| words.checked_mul(WORD_BYTES)) == Some(bytes);
    fits.then_some(())
        .ok_or_else(|| mismatch(width, codes, bytes))
}

fn mismatch(width: Width, codes: usize, bytes: usize) -> Error {
    let bits = width.bits();
    Error::malformed(format!(
        "{codes} codes of {bits} bits do not take {bytes} bytes of words in these rows"
    ))
}

impl<const N: usize, const HALVINGS: usize> Digits<N, HALVINGS> {
    fn join(&self, codes: [i8; N]) -> [u8; WORD_BYTES] {
        let mut bytes = [0; 8];
        bytes
            .iter_mut()
            .zip(codes)
            .for_each(|(to, code)| *to = (code.cast_unsigned() ^ self.offset) & self.mask);
        let joined = self
            .halvings
            .iter()
            .fold(u64::from_le_bytes(bytes), |digits, (shift, stay)| {
                (digits | digits.wrapping_shr(*shift)) & stay
            });
        let [a, b, c, d, ..] = joined.to_le_bytes();
        [a, b, c, d]
    }

    fn split(&self, word: [u8; WORD_BYTES]) -> [i8; N] {
        let word = u32::from_le_bytes(word);
        self.shifts.map(|shift| {
            let [unsigned, ..] = (word.wrapping_shr(shift) & u32::from(self.mask)).to_le_bytes();
            unsigned.wrapping_sub(self.offset).cast_signed()
        })
    }

    /// Codes that fill a word only in part, the missing ones as zero bits.
    fn join_part(&self, part: impl Iterator<Item = i8>) -> [u8; WORD_BYTES] {
        let mut codes = [0u8.wrapping_sub(self.offset).cast_signed(); N];
        codes.iter_mut().zip(part).for_each(|(to, code)| *to = code);
        self.join(codes)
    }

    fn pack(&self, codes: &[i8], bytes: &mut [u8]) {
        let (whole, rest) = codes.as_chunks::<N>();
        let (words, _) = bytes.as_chunks_mut();
        let mut words = words.iter_mut();
        // `zip` asks its left side first, so no word is lost when the codes end.
        for (codes, word) in whole.iter().zip(words.by_ref()) {
            *word = self.join(*codes);
        }
        for word in words {
            *word = self.join_part(rest.iter().copied());
        }
    }

    fn unpack(&self, bytes: &[u8], codes: &mut [i8]) {
        let (words, _) = bytes.as_chunks();
        for (codes, word) in codes.chunks_mut(N).zip(words) {
            copy(&self.split(*word), codes);
        }
    }

    fn pack_columns(&self, columns: usize, codes: &[i8], bytes: &mut [u8]) {
        let columns = columns.max(1);
        let words = bytes.chunks_mut(columns.saturating_mul(WORD_BYTES));
        for (codes, words) in codes.chunks(columns.saturating_mul(N)).zip(words) {
            for (column, word) in words.as_chunks_mut().0.iter_mut().enumerate() {
                *word = self.join_part(codes.iter().skip(column).step_by(columns).copied());
            }
        }
    }

    fn unpack_columns(&self, columns: usize, bytes: &[u8], codes: &mut [i8]) {
        let columns = columns.max(1);
        let words = bytes.chunks(columns.saturating_mul(WORD_BYTES));
        for (codes, words) in codes.chunks_mut(columns.saturating_mul(N)).zip(words) {
            for (column, word) in words.as_chunks().0.iter().enumerate() {
                let places = codes.iter_mut().skip(column).step_by(columns);
                places
                    .zip(self.split(*word))
                    .for_each(|(to, code)| *to = code);
            }
        }
    }

    fn pack_transposed(&self, rows: &[&[i8]], bytes: &mut [u8]) {
        let row_of_words = rows.len().saturating_mul(WORD_BYTES).max(1);
        for (index, together) in rows.chunks(ROWS_TOGETHER).enumerate() {
            let first = index.saturating_mul(ROWS_TOGETHER);
            for (word, words) in bytes.chunks_mut(row_of_words).enumerate() {
                let words = words.as_chunks_mut().0.iter_mut().skip(first);
                for (row, to) in together.iter().zip(words) {
                    if let Some(codes) = row.as_chunks::<N>().0.get(word) {
                        *to = self.join(*codes);
                    }
                }
            }
        }
    }

    fn unpack_transposed(&self, columns: usize, bytes: &[u8], codes: &mut [i8]) {
        let rows = codes.len().checked_div(columns).unwrap_or_default().max(1);
        let (words, _) = bytes.as_chunks();
        for (row, codes) in codes.chunks_mut(columns.max(1)).enumerate() {
            let places = words.iter().skip(row).step_by(rows);
            for (codes, word) in codes.as_chunks_mut::<N>().0.iter_mut().zip(places) {
                *codes = self.split(*word);
            }
        }
    }
}

/// As many as both hold.
fn copy(from: &[i8], to: &mut [i8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

#[cfg(test)]
mod tests {
    use super::*;

    type Pack = fn(Width, usize, &[i8], &mut [u8]) -> Result<()>;
    type Unpack = fn(Width, usize, &[u8], &mut [i8]) -> Result<()>;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Packs to these words and back.
    #[track_caller]
    fn check(
        (pack, unpack): (Pack, Unpack),
        width: Width,
        columns: usize,
        codes: &[i8],
        expected: &[u32],
    ) {
        let expected = words(expected);
        let mut bytes = vec![0xaa; expected.len()];
        pack(width, columns, codes, &mut bytes).unwrap();
        assert_eq!(bytes, expected);
        let mut back = vec![77; codes.len()];
        unpack(width, columns, &bytes, &mut back).unwrap();
        assert_eq!(back, codes);
    }

    const ROWS: (Pack, Unpack) = (pack_rows, unpack_rows);
    const COLUMNS: (Pack, Unpack) = (pack_columns, unpack_columns);
    const TRANSPOSED: (Pack, Unpack) = (rows_transposed, unpack_transposed);

    fn rows_transposed(width: Width, columns: usize, codes: &[i8], bytes: &mut [u8]) -> Result<()> {
        let rows: Vec<_> = codes.chunks(columns.max(1)).collect();
        pack_transposed(width, columns, &rows, bytes)
    }

    #[test]
    fn words_of_many_rows_lie_side_by_side() {
        let rows = 2 * ROWS_TOGETHER + 5;
        let code = |row: usize, column: usize| ((3 * row + column) % 16) as i8 - 8;
        let codes: Vec<i8> = (0..rows)
            .flat_map(|row| (0..16).map(move |column| code(row, column)))
            .collect();
        let word = |at: usize| {
            let (first, row) = (at / rows * 8, at % rows);
            (0..8).fold(0, |word, k| {
                word | ((code(row, first + k) + 8) as u32) << (4 * k)
            })
        };
        let expected: Vec<u32> = (0..2 * rows).map(word).collect();
        check(TRANSPOSED, Width::Four, 16, &codes, &expected);
    }

    #[test]
    fn the_first_code_has_the_lowest_bits() {
        check(
            ROWS,
            Width::Four,
            8,
            &[-8, -7, -6, -5, -4, -3, -2, 7],
            &[0xf654_3210],
        );
        check(ROWS, Width::Eight, 4, &[-128, -127, 0, 127], &[0xff80_0100]);
    }

    #[test]
    fn rows_and_columns_end_in_zero_bits() {
        check(
            ROWS,
            Width::Four,
            3,
            &[-7, -6, -5, 7, 7, 7],
            &[0x321, 0xfff],
        );
        check(
            ROWS,
            Width::Eight,
            5,
            &[1, 2, 3, 4, 5],
            &[0x8483_8281, 0x85],
        );
        check(
            COLUMNS,
            Width::Four,
            2,
            &[-7, 7, -6, 6, -5, 5],
            &[0x321, 0xdef],
        );
        let nine: Vec<i8> = (-8..1).collect();
        check(COLUMNS, Width::Four, 1, &nine, &[0x7654_3210, 8]);
    }

    #[test]
    fn transposed_words_follow_the_row() {
        let codes: Vec<i8> = (0..16).map(|code| code - 8).collect();
        check(
            TRANSPOSED,
            Width::Four,
            8,
            &codes,
            &[0x7654_3210, 0xfedc_ba98],
        );
        let codes = [
            -128, -127, -126, -125, -124, -123, -122, -121, 0, 0, 0, 0, 1, 1, 1, 1,
        ];
        check(
            TRANSPOSED,
            Width::Eight,
            8,
            &codes,
            &[0x0302_0100, 0x8080_8080, 0x0706_0504, 0x8181_8181],
        );
    }

    #[test]
    fn every_code_comes_back() {
        let four: Vec<i8> = (0..37).map(|i| (i * 5 % 16) as i8 - 8).collect();
        let eight: Vec<i8> = (-128..=127).collect();
        for (width, codes) in [(Width::Four, four), (Width::Eight, eight)] {
            for columns in [1, codes.len()] {
                let rows = codes.len() / columns;
                let mut bytes = vec![0; width.words(columns) * rows * 4];
                pack_rows(width, columns, &codes, &mut bytes).unwrap();
                let mut back = vec![0; codes.len()];
                unpack_rows(width, columns, &bytes, &mut back).unwrap();
                assert_eq!(back, codes);
            }
        }
    }

    #[test]
    fn zero_points_of_the_first_version_borrow() {
        let mut bytes = words(&[0x8888_9796, 0x8888_8888, 0x0000_0000]);
        to_gptq_v1_zeros(Width::Four, &mut bytes);
        assert_eq!(bytes, words(&[0x7777_8685, 0x7777_7777, 0xeeee_eeef]));
        from_gptq_v1_zeros(Width::Four, &mut bytes);
        assert_eq!(bytes, words(&[0x8888_9796, 0x8888_8888, 0x0000_0000]));
        let mut bytes = words(&[0x8080_8080]);
        to_gptq_v1_zeros(Width::Eight, &mut bytes);
        assert_eq!(bytes, words(&[0x7f7f_7f7f]));
    }

    #[test]
    fn sizes_that_do_not_match_are_errors() {
        let hostile = [0, 1, 3, 7, 8, usize::MAX / 2, usize::MAX];
        for width in [Width::Four, Width::Eight] {
            for columns in hostile {
                let mut codes = [0; 21];
                let refused = [
                    pack_rows(width, columns, &codes, &mut [0; 11]).is_err(),
                    pack_columns(width, columns, &codes, &mut [0; 11]).is_err(),
                    rows_transposed(width, columns, &codes, &mut [0; 11]).is_err(),
                    unpack_rows(width, columns, &[0; 11], &mut codes).is_err(),
                    unpack_columns(width, columns, &[0; 11], &mut codes).is_err(),
                    unpack_transposed(width, columns, &[0; 11], &mut codes).is_err(),
                ];
                assert_eq!(refused, [true; 6], "{width:?} {columns}");
            }
            pack_rows(width, 0, &[], &mut []).unwrap();
            unpack_columns(width, 3, &[], &mut []).unwrap();
        }
        assert!(rows_transposed(Width::Four, 4, &[0; 8], &mut [0; 8]).is_err());
        let uneven: [&[i8]; 2] = [&[0; 4], &[0; 12]];
        assert!(pack_transposed(Width::Four, 8, &uneven, &mut [0; 8]).is_err());
    }
}
