//! Parts of floats and sums of their products: to the bit, and against F32 and F64.
#![allow(clippy::print_stdout, reason = "errors are measured here")]

use nemoconv_device::kernels;

use crate::reference::{bits, floats, unknown, values};
use crate::run;

const PARTS: usize = 3;

fn nearest_bf16(x: f32) -> f32 {
    let rounded = half::bf16::from_f32(x).to_f32();
    match rounded.is_infinite() {
        true => f32::from_bits(x.to_bits() & 0xffff_0000),
        false => rounded,
    }
}

/// What `split_floats` makes of a finite value.
fn parts(mut x: f32) -> [f32; PARTS] {
    [(); PARTS].map(|()| {
        let part = nearest_bf16(x);
        x -= part;
        part
    })
}

/// Values whose products are summed before the sums are added to the result.
const CHUNK: usize = 4096;

/// Words of a part of a row.
fn part_words(inner: usize) -> usize {
    inner.next_multiple_of(32) / 2
}

/// Halves of rows of `inner` values, `[row, part, value]`.
fn expected(rows: &[f32], inner: usize) -> Vec<u16> {
    let mut all = Vec::new();
    for row in rows.chunks(inner) {
        let split: Vec<_> = row.iter().map(|x| parts(*x)).collect();
        for part in 0..PARTS {
            let halves = split.iter().map(|x| (x[part].to_bits() >> 16) as u16);
            let zeros = std::iter::repeat_n(0, 2 * part_words(inner) - inner);
            all.extend(halves.chain(zeros));
        }
    }
    all
}

fn split(
    x: &[f32],
    first: usize,
    [row, column]: [usize; 2],
    [rows, inner]: [usize; 2],
) -> Vec<u32> {
    let words = part_words(inner);
    let groups = rows.div_ceil(32) * (2 * words).div_ceil(64);
    let parameters = [rows, inner, first, row, column, words].map(|size| size as u32);
    let views = [bits(x), unknown(rows * PARTS * words)];
    // A group beyond the last does nothing.
    let results = run(
        &kernels::SPLIT_FLOATS,
        groups as u32 + 1,
        &views,
        &parameters,
    );
    results[1].clone()
}

fn halves(words: &[u32]) -> Vec<u16> {
    let both = |word: &u32| [*word as u16, (*word >> 16) as u16];
    words.iter().flat_map(both).collect()
}

/// From zero to the largest value, ties and subnormal numbers among them.
fn oddities() -> Vec<f32> {
    let words = [
        0x0000_0000,
        0x8000_0000,
        0x0000_0001,
        0x8000_ffff,
        0x007f_ffff,
        0x0080_0001,
        0x08ff_ffff,
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_8080,
        0xbf80_7f80,
        0x3fff_ffff,
        0x7f7f_7fff,
        0x7f7f_8000,
        0xff7f_ffff,
    ];
    floats(&words)
}

#[test]
fn split_floats() {
    for (rows, inner) in [(1, 1), (33, 31), (5, 65), (40, 128), (2, 33)] {
        let mut x = values(rows * inner, 1);
        x.iter_mut().zip(oddities()).for_each(|(x, odd)| *x = odd);
        let expected = expected(&x, inner);
        let mut shifted = vec![f32::NAN; 3];
        shifted.extend(&x);
        assert!(halves(&split(&shifted, 3, [inner, 1], [rows, inner])) == expected);
        let mut transposed = vec![f32::NAN; 2 + inner * (rows + 1)];
        for (at, x) in x.iter().enumerate() {
            transposed[2 + at % inner * (rows + 1) + at / inner] = *x;
        }
        assert!(halves(&split(&transposed, 2, [1, rows + 1], [rows, inner])) == expected);
    }
}

#[test]
fn no_number_has_one_part() {
    let words = [
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x7f80_0001,
        0xffff_ffff,
    ];
    let found = halves(&split(&floats(&words), 0, [5, 1], [1, 5]));
    let [first, rest @ ..] = [0, 1, 2].map(|part| &found[part * 32..][..5]);
    assert_eq!(first, [0x7f80, 0xff80, 0x7fc0, 0x7fc0, 0xffff]);
    assert!(rest.iter().all(|part| *part == [0; 5]));
}

/// Numbers of a normal distribution.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let uniform = values(12 * count, seed);
    let twelve = uniform.chunks(12);
    twelve
        .map(|twelve| twelve.iter().sum::<f32>() / 2.0)
        .collect()
}

/// Rows of both operands whose products are compared: those of a warp.
const ROWS: usize = 64;
const COLUMNS: usize = 32;

/// Root of the mean square and largest error of sums, in units of 2^-24 of the root mean square of all sums.
fn errors(found: &[f32], exact: &[f64]) -> [f64; 2] {
    let scale =
        (exact.iter().map(|x| x * x).sum::<f64>() / exact.len() as f64).sqrt() / f64::from(1 << 24);
    let errors = found
        .iter()
        .zip(exact)
        .map(|(found, exact)| ((f64::from(*found) - exact) / scale).abs());
    let squares: f64 = errors.clone().map(|error| error * error).sum();
    [
        (squares / exact.len() as f64).sqrt(),
        errors.fold(0.0, f64::max),
    ]
}

fn exact(x: &[f32], y: &[f32], inner: usize) -> Vec<f64> {
    let dot = |x: &[f32], y: &[f32]| {
        x.iter()
            .zip(y)
            .map(|(x, y)| f64::from(*x) * f64::from(*y))
            .sum()
    };
    x.chunks(inner)
        .flat_map(|x| y.chunks(inner).map(move |y| dot(x, y)))
        .collect()
}

fn in_f32(x: &[f32], y: &[f32], inner: usize) -> Vec<f32> {
    let sizes = [ROWS, COLUMNS, inner, 0, inner, 1, 0, 1, inner, 0, COLUMNS];
    let mut parameters = sizes.map(|size| size as u32).to_vec();
    parameters.extend(bits(&[1.0, 0.0]));
    let views = [bits(x), bits(y), unknown(ROWS * COLUMNS)];
    floats(&run(&kernels::MATMUL_TILED, 1, &views, &parameters)[2])
}

fn in_parts(x: &[f32], y: &[f32], inner: usize) -> Vec<f32> {
    let [x, y] =
        [(x, ROWS), (y, COLUMNS)].map(|(values, rows)| split(values, 0, [inner, 1], [rows, inner]));
    let sizes = [ROWS, COLUMNS, inner, 0, 0, 0, COLUMNS];
    let mut parameters = sizes.map(|size| size as u32).to_vec();
    parameters.extend(bits(&[1.0, 0.0]));
    let views = [x, y, unknown(ROWS * COLUMNS)];
    floats(&run(&kernels::MATMUL_SPLIT, 1, &views, &parameters)[2])
}

fn with_stored(x: &[f32], y: &[f32], inner: usize) -> Vec<f32> {
    let x = split(x, 0, [inner, 1], [ROWS, inner]);
    let pair = |pair: &[f32]| pair[0].to_bits() >> 16 | pair[1].to_bits() & 0xffff_0000;
    let y = y.chunks(2).map(pair).collect();
    let parameters = [ROWS, COLUMNS, inner, 0, 0, 0, COLUMNS].map(|size| size as u32);
    let views = [y, x, unknown(ROWS * COLUMNS)];
    floats(&run(&kernels::MATMUL_SPLIT_BF16, 1, &views, &parameters)[2])
}

/// A sum of products and what was there as a tensor core is taken to cut it off: each addend, and the sum, towards zero.
fn cut_off(x: &[f32], y: &[f32], before: f32) -> f32 {
    let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
    let addends: Vec<f64> = products.chain([f64::from(before)]).collect();
    let largest = addends.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let unit = (largest.log2().floor() - 23.0).exp2();
    let sum: f64 = addends.iter().map(|x| (x / unit).trunc() * unit).sum();
    let rounded = sum as f32;
    match f64::from(rounded).abs() > sum.abs() {
        true => f32::from_bits(rounded.to_bits() - 1),
        false => rounded,
    }
}

/// `matmul_split` of sums that are cut off, for `columns` parts of Y.
fn in_parts_cut_off(x: &[f32], y: &[f32], inner: usize, columns: usize) -> Vec<f32> {
    let planes = |values: &[f32]| {
        let split: Vec<_> = values.iter().map(|x| parts(*x)).collect();
        [0, 1, 2].map(|part| split.iter().map(|x| x[part]).collect::<Vec<f32>>())
    };
    let (x, y) = (planes(x), planes(y));
    let sum = |i: usize, j: usize| {
        let mut chunks = vec![0.0; inner.div_ceil(CHUNK)];
        for k in (0..inner).step_by(16) {
            let mut sum = 0.0;
            for size in (0..PARTS).rev() {
                for part in 0..=size.min(columns - 1) {
                    let left = &x[size - part][i * inner + k..][..16];
                    sum = cut_off(left, &y[part][j * inner + k..][..16], sum);
                }
            }
            chunks[k / CHUNK] += sum;
        }
        chunks.iter().sum::<f32>()
    };
    (0..ROWS * COLUMNS)
        .map(|at| sum(at / COLUMNS, at % COLUMNS))
        .collect()
}

/// How much larger the root of the mean square and the largest of the errors may be than those of `matmul_tiled`, also where
/// tensor cores cut sums off.
const AS_GOOD: [f64; 2] = [1.1, 2.5];

#[test]
fn sums_of_parts_are_as_good_as_those_of_floats() {
    println!("| k | | F32: rms | largest | parts | | parts, cut off | |");
    for inner in [32, 256, 1024, 4096, 10_000] {
        let (x, y) = (normal(ROWS * inner, 1), normal(COLUMNS * inner, 2));
        let stored: Vec<f32> = y.iter().map(|y| nearest_bf16(*y)).collect();
        let cases = [
            ("F32", &y, in_parts(&x, &y, inner), PARTS),
            ("BF16", &stored, with_stored(&x, &stored, inner), 1),
        ];
        for (name, y, found, columns) in cases {
            let exact = exact(&x, y, inner);
            let floats = errors(&in_f32(&x, y, inner), &exact);
            let whole = errors(&found, &exact);
            let cut = errors(&in_parts_cut_off(&x, y, inner, columns), &exact);
            println!("| {inner} | {name} | {floats:.2?} | {whole:.2?} | {cut:.2?} |");
            for found in [whole, cut] {
                let is_as_good = |at: usize| found[at] <= AS_GOOD[at] * floats[at];
                assert!(
                    is_as_good(0) && is_as_good(1),
                    "{inner} {name}: {found:?}, {floats:?}"
                );
            }
        }
    }
}
