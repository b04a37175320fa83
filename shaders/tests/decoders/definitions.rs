//! Packed weights by their definitions: numbers that this writes into the bytes of every layout by itself, and their
//! values in f64.

use half::{bf16, f16};
use nemoconv_formats::Dtype;
use nemoconv_formats::packed::{GptqZeros, Group, Inputs, Layout, Nvfp4Names, Role, Scheme, Width};

use super::packed::{Linear, group_index, interleaved};
use super::{floats, integers};

/// Products of codes with scales of 16 bits or fewer are floats.
const EXACT: f64 = 0.0;
/// Half of a last place.
const ONE_ROUNDING: f64 = 1.0 / (1 << 24) as f64;
/// A last place where the last bit of the mantissa counts most.
const LAST_PLACE: f64 = 1.0 / (1 << 23) as f64;

/// Divides the rows below.
const HEAD_ROWS: usize = 8;
/// Rows that fill no word, and rows that do.
const ROWS: usize = 21;
const ROWS_OF_HEADS: usize = 24;

/// A number below `bound` that looks random: of a place, for a purpose.
fn noise(purpose: usize, row: usize, column: usize, bound: usize) -> usize {
    let mixed = (row * 1009 + column * 31 + purpose * 7_919 + 1).wrapping_mul(0x9e37_79b9);
    (mixed >> 13) % bound
}

const CODE: usize = 0;
const ZERO: usize = 1;
const SCALE: usize = 2;

/// A positive scale with every bit of its type's mantissa in use, as it is stored.
fn scale(dtype: Dtype, row: usize, group: usize) -> (Vec<u8>, f64) {
    let value = 0.01 + noise(SCALE, row, group, 100_003) as f32 / 77_777.0;
    match dtype {
        Dtype::Bf16 => {
            let value = bf16::from_f32(value);
            (value.to_le_bytes().to_vec(), value.to_f64())
        }
        Dtype::F16 => {
            let value = f16::from_f32(value);
            (value.to_le_bytes().to_vec(), value.to_f64())
        }
        _ => (value.to_le_bytes().to_vec(), f64::from(value)),
    }
}

/// Integers of a linear `[rows, columns]`.
#[derive(Debug, Clone, Copy)]
struct Integers {
    layout: Layout,
    rows: usize,
    columns: usize,
    scales: Dtype,
}

impl Integers {
    fn group_columns(&self) -> usize {
        match self.layout.group() {
            Some(Group::Columns(columns)) => columns,
            _ => self.columns,
        }
    }

    fn groups(&self) -> usize {
        self.columns / self.group_columns()
    }

    /// The row and group whose scale and zero point a weight has.
    fn place(&self, row: usize, group: usize) -> (usize, usize) {
        match self.layout.group() {
            Some(Group::Tensor) => (0, 0),
            _ => (row, group),
        }
    }

    /// Unsigned, as words hold it.
    fn code(&self, row: usize, column: usize) -> usize {
        noise(CODE, row, column, 1 << self.layout.bits())
    }

    /// Unsigned; at least 1, so that GPTQ's first version borrows nothing.
    fn zero(&self, row: usize, group: usize) -> usize {
        let (row, group) = self.place(row, group);
        match self.layout.is_symmetric() {
            true => 1 << (self.layout.bits() - 1),
            false => 1 + noise(ZERO, row, group, (1 << self.layout.bits()) - 1),
        }
    }

    fn value(&self, row: usize, column: usize) -> f64 {
        let group = column / self.group_columns();
        let code = self.code(row, column) as f64 - self.zero(row, group) as f64;
        let (row, group) = self.place(row, group);
        code * scale(self.scales, row, group).1
    }

    /// Words of digits, `digits` of them in each, `[lines, words]`: digit `at` of word `word` of line `line`.
    fn words(
        &self,
        [lines, words]: [usize; 2],
        digit: impl Fn(usize, usize, usize) -> usize,
    ) -> Vec<u8> {
        let bits = self.layout.bits();
        let places = (0..lines).flat_map(|line| (0..words).map(move |word| (line, word)));
        let joined = places.map(|(line, word)| {
            let digits = (0..32 / bits).map(|at| (digit(line, word, at) as u32) << (at * bits));
            digits.fold(0, |word, digit| word | digit)
        });
        joined.flat_map(u32::to_le_bytes).collect()
    }

    fn codes(&self) -> Vec<u8> {
        let per_word = 32 / self.layout.bits();
        let words = self.columns.div_ceil(per_word);
        let code = |row, column| match column < self.columns {
            true => self.code(row, column),
            false => 0,
        };
        match self.layout {
            Layout::Gptq { .. } => self.words([words, self.rows], |word, row, at| {
                code(row, word * per_word + at)
            }),
            Layout::PackQuantized { .. } => self.words([self.rows, words], |row, word, at| {
                code(row, word * per_word + at)
            }),
            _ => self.signed_bytes([self.rows, self.columns], code),
        }
    }

    fn zeros(&self) -> Vec<u8> {
        let (per_word, groups) = (32 / self.layout.bits(), self.groups());
        let words = self.rows.div_ceil(per_word);
        let zero = |row, group| match row < self.rows {
            true => self.zero(row, group),
            false => 0,
        };
        match self.layout {
            Layout::Gptq { zeros, .. } => {
                let less = usize::from(zeros == GptqZeros::MinusOne);
                self.words([groups, words], |group, word, at| {
                    zero(word * per_word + at, group) - less
                })
            }
            Layout::PackQuantized { .. } => self.words([words, groups], |word, group, at| {
                zero(word * per_word + at, group)
            }),
            _ => self.signed_bytes(self.scale_shape(), zero),
        }
    }

    fn signed_bytes(
        &self,
        [rows, columns]: [usize; 2],
        digit: impl Fn(usize, usize) -> usize,
    ) -> Vec<u8> {
        let middle = 1 << (self.layout.bits() - 1);
        let places = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        let signed = places.map(|(row, column)| digit(row, column) as i32 - middle);
        signed.map(|code| code as i8 as u8).collect()
    }

    fn scale_shape(&self) -> [usize; 2] {
        match self.layout.group() {
            Some(Group::Tensor) => [1, 1],
            _ => [self.rows, self.groups()],
        }
    }

    fn scale_bytes(&self) -> Vec<u8> {
        let [rows, groups] = self.scale_shape();
        let at = |row, group| scale(self.scales, row, group).0;
        match self.layout {
            Layout::Gptq { .. } => (0..groups)
                .flat_map(|group| (0..rows).flat_map(move |row| at(row, group)))
                .collect(),
            _ => (0..rows)
                .flat_map(|row| (0..groups).flat_map(move |group| at(row, group)))
                .collect(),
        }
    }

    fn linear(&self) -> Linear {
        let scheme = Scheme {
            layout: self.layout,
            inputs: Inputs::AsTheyAre,
        };
        let group_index = group_index(&scheme, self.columns);
        let shape = [self.rows, self.columns];
        Linear::of(scheme, shape, (self.scales, 0), |role, _, _| match role {
            Role::Codes => self.codes(),
            Role::Scale => self.scale_bytes(),
            Role::ZeroPoint => self.zeros(),
            Role::GroupIndex => group_index.clone(),
            _ => shape.map(usize::to_le_bytes).concat(),
        })
    }

    fn check(&self, head_rows: usize) {
        let tolerance = match self.scales {
            Dtype::F32 => ONE_ROUNDING,
            _ => EXACT,
        };
        integers::on_every_device(&self.linear(), head_rows, |what, found, places| {
            for (found, at) in found.iter().zip(places) {
                let row = interleaved(at / self.columns, head_rows);
                let expected = self.value(row, at % self.columns);
                assert_near(what, at, *found, expected, tolerance);
            }
        });
    }
}

#[track_caller]
fn assert_near(what: &str, at: usize, found: f32, expected: f64, tolerance: f64) {
    let distance = (f64::from(found) - expected).abs();
    assert!(
        distance <= tolerance * expected.abs(),
        "{what}: value {at} must be {expected:e}, found {found:e}"
    );
}

/// Groups, and rows of several of them; rows that are one group end within a word.
const GROUPS: [(Group, usize); 5] = [
    (Group::Columns(32), 96),
    (Group::Columns(64), 192),
    (Group::Columns(128), 256),
    (Group::Row, 45),
    (Group::Tensor, 45),
];
const WIDTHS: [Width; 2] = [Width::Four, Width::Eight];
const SCALES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

/// In the order of rows, and with halves of heads interleaved.
fn check_integers(layout: Layout, columns: usize, scales: Dtype) {
    let rows = match layout {
        // Its zero points fill words.
        Layout::Gptq { .. } => ROWS_OF_HEADS,
        _ => ROWS,
    };
    for (rows, head_rows) in [(rows, 0), (ROWS_OF_HEADS, HEAD_ROWS)] {
        let integers = Integers {
            layout,
            rows,
            columns,
            scales,
        };
        integers.check(head_rows);
    }
}

#[test]
fn integers_in_words_of_rows() {
    for scales in SCALES {
        for (group, columns) in GROUPS {
            for width in WIDTHS {
                for symmetric in [true, false] {
                    let layout = Layout::PackQuantized {
                        width,
                        group,
                        symmetric,
                    };
                    if symmetric || group != Group::Tensor {
                        check_integers(layout, columns, scales);
                    }
                }
            }
        }
    }
}

#[test]
fn integers_in_bytes() {
    for scales in SCALES {
        for (group, columns) in GROUPS {
            for symmetric in [true, false] {
                let layout = Layout::IntQuantized {
                    bits: 8,
                    group,
                    symmetric,
                };
                check_integers(layout, columns, scales);
            }
        }
    }
}

#[test]
fn integers_in_words_of_columns() {
    for scales in SCALES {
        for (group, columns) in &GROUPS[..4] {
            // Rows fill words.
            let columns = columns.next_multiple_of(8);
            for width in WIDTHS {
                for zeros in [GptqZeros::MinusOne, GptqZeros::AsTheyAre] {
                    let layout = Layout::Gptq {
                        width,
                        group: *group,
                        symmetric: false,
                        zeros,
                    };
                    check_integers(layout, columns, scales);
                }
            }
        }
    }
}

/// 4 bits of exponent with bias 7, 3 of mantissa.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7),
    };
    if code < 128 { magnitude } else { -magnitude }
}

/// A sign and one of eight.
fn e2m1(code: u8) -> f64 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code < 8 { magnitude } else { -magnitude }
}

/// A code of F8_E4M3 that is a number.
fn number(purpose: usize, row: usize, column: usize) -> u8 {
    let code = noise(purpose, row, column, 254) as u8;
    code + u8::from(code >= 0x7f)
}

/// More than one block of 128 in both dimensions, the last not whole; whole heads.
const FLOAT8_SHAPE: [usize; 2] = [152, 131];

fn check_float8(scales: Dtype, scale_shape: usize) {
    let [rows, columns] = FLOAT8_SHAPE;
    // Of a row, of all, of a block.
    let [block_rows, block_columns] = [[1, columns], [rows, columns], [128, 128]][scale_shape];
    let across = columns.div_ceil(block_columns);
    let scheme = Scheme::float8("weight_scale", Inputs::AsTheyAre);
    let linear = Linear::of(
        scheme,
        FLOAT8_SHAPE,
        (scales, scale_shape),
        |role, dtype, count| match role {
            Role::Codes => (0..count)
                .map(|at| number(CODE, at / columns, at % columns))
                .collect(),
            Role::Scale => (0..count)
                .flat_map(|at| scale(scales, at / across, at % across).0)
                .collect(),
            _ => vec![0; count * dtype.bytes()],
        },
    );
    let value = |row: usize, column: usize| {
        let (_, scale) = scale(scales, row / block_rows, column / block_columns);
        e4m3(number(CODE, row, column)) * scale
    };
    let tolerance = match scales {
        Dtype::F32 => ONE_ROUNDING,
        _ => EXACT,
    };
    for head_rows in [0, HEAD_ROWS] {
        floats::on_every_device(&linear, head_rows, |what, _, found, places| {
            for (found, at) in found.iter().zip(places) {
                let row = interleaved(at / columns, head_rows);
                let expected = value(row, at % columns);
                assert_near(what, at, *found, expected, tolerance);
            }
        });
    }
}

#[test]
fn float8_of_rows_tensors_and_blocks() {
    for scales in SCALES {
        for scale_shape in 0..3 {
            check_float8(scales, scale_shape);
        }
    }
}

/// Groups of 16, rows of heads.
const NVFP4_SHAPE: [usize; 2] = [40, 80];
/// All bits of its mantissa in use.
const SECOND_SCALE: f32 = 2688.7;

fn check_nvfp4(names: Nvfp4Names) {
    let [_, columns] = NVFP4_SHAPE;
    let groups = columns / 16;
    let scheme = Scheme {
        layout: Layout::Nvfp4(names),
        inputs: Inputs::AsTheyAre,
    };
    let code = |row, column| noise(CODE, row, column, 16) as u8;
    let pair = |row, at| code(row, 2 * at) | code(row, 2 * at + 1) << 4;
    let bytes = columns / 2;
    let linear = Linear::of(
        scheme,
        NVFP4_SHAPE,
        (Dtype::F8E4M3, 0),
        |role, dtype, count| match role {
            Role::Codes => (0..count).map(|at| pair(at / bytes, at % bytes)).collect(),
            Role::Scale => (0..count)
                .map(|at| number(SCALE, at / groups, at % groups))
                .collect(),
            Role::SecondScale => SECOND_SCALE.to_le_bytes().to_vec(),
            _ => vec![0; count * dtype.bytes()],
        },
    );
    let value = |row: usize, column: usize| {
        let scaled = e2m1(code(row, column)) * e4m3(number(SCALE, row, column / 16));
        match names {
            Nvfp4Names::CompressedTensors => scaled / f64::from(SECOND_SCALE),
            Nvfp4Names::ModelOpt => scaled * f64::from(SECOND_SCALE),
        }
    };
    for head_rows in [0, HEAD_ROWS] {
        floats::on_every_device(&linear, head_rows, |what, off, found, places| {
            for (found, at) in found.iter().zip(places) {
                let row = interleaved(at / columns, head_rows);
                let expected = value(row, at % columns);
                let tolerance = ONE_ROUNDING + f64::from(off) * LAST_PLACE;
                assert_near(what, at, *found, expected, tolerance);
            }
        });
    }
}

#[test]
fn nvfp4_with_factors_and_divisors() {
    check_nvfp4(Nvfp4Names::ModelOpt);
    check_nvfp4(Nvfp4Names::CompressedTensors);
}
