//! Blocks chosen without a search, one at a time, in loops that compile to vector code.
//!
//! Enters: f32 blocks. Leaves: their extremes, codes as bytes, packed blocks. Only exact operations and
//! maxima cross elements, so the bits are the same on every CPU. Knows no type.

use bytemuck::{Pod, cast_slice_mut};
use half::f16;
use pulp::{Arch, Simd, WithSimd};

use super::ScaleOverflow;

/// Adding this puts a whole number of -2^22..2^22 into the low mantissa bits, in two's complement.
const WHOLE: f32 = 12_582_912.0;
const MAGNITUDE: u32 = 0x7fff_ffff;

/// How a block maps values to whole numbers.
#[derive(Clone, Copy)]
pub struct Grid {
    /// Distance of neighbouring values, stored as f16.
    pub step: f32,
    /// `1 / step`, 0 for 0.
    pub inverse: f32,
    /// The value of code 0, stored as f16 by the types that have one.
    pub offset: f32,
}

impl Grid {
    /// A grid of this step.
    #[inline(always)]
    pub fn new(step: f32, offset: f32) -> Self {
        let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
        Self {
            step,
            inverse,
            offset,
        }
    }
}

/// A type of `N` elements a block whose scale follows from the extremes.
///
/// Every method and all it calls must be inlined by force, to be compiled for the CPU at hand.
pub trait PlainType<const N: usize> {
    /// The packed block.
    type Block: Pod;
    /// How many of `step` and `offset` the block stores as f16.
    const SCALES: usize;

    /// What the grid follows from, at most two values.
    fn extremes<S: Simd>(simd: S, x: &[f32; N]) -> (f32, f32);

    /// The grid that spans the extremes.
    fn grid(extremes: (f32, f32)) -> Grid;

    /// The code of one value, given `inverse` and `offset` of its grid.
    fn code(x: f32, inverse: f32, offset: f32) -> u8;

    /// Packs a block, given `step` and `offset` as they are and as f16.
    fn pack(grid: (f32, f32), rounded: (f16, f16), codes: &[u8; N]) -> Self::Block;
}

/// Quantizes blocks of `N` elements.
///
/// # Panics
/// If `out` does not hold one block for every `N` elements.
pub fn quantize<T: PlainType<N>, const N: usize>(rows: &[f32], out: &mut [u8]) -> ScaleOverflow {
    let out = cast_slice_mut::<u8, T::Block>(out);
    assert_eq!(rows.len(), out.len() * N, "a block per {N} elements");
    Arch::new().dispatch(Run::<T, N> { rows, out })
}

pub(super) struct Run<'a, T: PlainType<N>, const N: usize> {
    pub rows: &'a [f32],
    pub out: &'a mut [T::Block],
}

impl<T: PlainType<N>, const N: usize> WithSimd for Run<'_, T, N> {
    type Output = ScaleOverflow;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> ScaleOverflow {
        let mut tile = Tile::new();
        let mut overflow = 0;
        for (rows, out) in self.rows.chunks(TILE).zip(self.out.chunks_mut(TILE / N)) {
            tile.fit::<T, S, N>(simd, rows);
            tile.encode::<T, N>(rows);
            overflow += tile.round_scales(out.len(), T::SCALES);
            tile.pack::<T, N>(out);
        }
        ScaleOverflow(overflow)
    }
}

/// Elements that go through one step after the other: loops over a single block would be unrolled
/// before the compiler sees that they are vector code.
const TILE: usize = 512;
/// Blocks in a tile.
const BLOCKS: usize = TILE / 32;

/// Blocks between the steps, each property of their grids side by side.
struct Tile {
    step: [f32; BLOCKS],
    inverse: [f32; BLOCKS],
    offset: [f32; BLOCKS],
    step_f16: [u16; BLOCKS],
    offset_f16: [u16; BLOCKS],
    inverse_of_each: [f32; TILE],
    offset_of_each: [f32; TILE],
    codes: [u8; TILE],
}

impl Tile {
    #[inline(always)]
    fn new() -> Self {
        Self {
            step: [0.0; BLOCKS],
            inverse: [0.0; BLOCKS],
            offset: [0.0; BLOCKS],
            step_f16: [0; BLOCKS],
            offset_f16: [0; BLOCKS],
            inverse_of_each: [0.0; TILE],
            offset_of_each: [0.0; TILE],
            codes: [0; TILE],
        }
    }

    #[inline(always)]
    fn fit<T: PlainType<N>, S: Simd, const N: usize>(&mut self, simd: S, rows: &[f32]) {
        let (mut first, mut second) = ([0.0; BLOCKS], [0.0; BLOCKS]);
        for ((x, first), second) in rows
            .as_chunks::<N>()
            .0
            .iter()
            .zip(&mut first)
            .zip(&mut second)
        {
            (*first, *second) = T::extremes(simd, x);
        }
        for b in 0..BLOCKS {
            let grid = T::grid((first[b], second[b]));
            (self.step[b], self.inverse[b], self.offset[b]) =
                (grid.step, grid.inverse, grid.offset);
        }
        spread::<S, N>(simd, &self.inverse, &mut self.inverse_of_each);
        spread::<S, N>(simd, &self.offset, &mut self.offset_of_each);
    }

    #[inline(always)]
    fn encode<T: PlainType<N>, const N: usize>(&mut self, rows: &[f32]) {
        let grids = self.inverse_of_each.iter().zip(&self.offset_of_each);
        for ((code, x), (inverse, offset)) in self.codes.iter_mut().zip(rows).zip(grids) {
            *code = T::code(*x, *inverse, *offset);
        }
    }

    /// Returns how many of the first `scales` fields of `blocks` blocks are not finite as f16.
    #[inline(always)]
    fn round_scales(&mut self, blocks: usize, scales: usize) -> u64 {
        for b in 0..BLOCKS {
            self.step_f16[b] = f16_bits(self.step[b]);
            self.offset_f16[b] = f16_bits(self.offset[b]);
        }
        let infinite = |bits: &[u16]| bits.iter().filter(|bits| *bits & 0x7c00 == 0x7c00).count();
        let fields = [&self.step_f16, &self.offset_f16];
        fields[..scales]
            .iter()
            .map(|field| infinite(&field[..blocks]) as u64)
            .sum()
    }

    #[inline(always)]
    fn pack<T: PlainType<N>, const N: usize>(&self, out: &mut [T::Block]) {
        for (b, (block, codes)) in out.iter_mut().zip(self.codes.as_chunks().0).enumerate() {
            let rounded = (
                f16::from_bits(self.step_f16[b]),
                f16::from_bits(self.offset_f16[b]),
            );
            *block = T::pack((self.step[b], self.offset[b]), rounded, codes);
        }
    }
}

/// Repeats what belongs to a block for each of its elements.
#[inline(always)]
fn spread<S: Simd, const N: usize>(simd: S, of_blocks: &[f32], of_each: &mut [f32; TILE]) {
    for (value, of_each) in of_blocks.iter().zip(of_each.as_chunks_mut::<N>().0) {
        let (lanes, rest) = S::as_mut_simd_f32s(of_each);
        lanes.fill(simd.splat_f32s(*value));
        rest.fill(*value);
    }
}

/// The bits of the nearest f16, ties to even; NaN stays NaN.
#[inline(always)]
pub fn f16_bits(x: f32) -> u16 {
    let sign = ((x.to_bits() & !MAGNITUDE) >> 16) as u16;
    let magnitude = x.to_bits() & MAGNITUDE;
    // The exponent moves from bias 127 to 15; a carry out of the mantissa lands in it, as it should.
    let normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13).wrapping_sub(112 << 10);
    // 0.5 has the unit of an f16 subnormal, 2^-24, in its last place: the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 0x3880_0000 {
        subnormal
    } else {
        normal
    };
    let large = if magnitude > 0x7f80_0000 {
        0x7e00
    } else {
        0x7c00
    };
    sign | if magnitude >= 0x4780_0000 {
        large
    } else {
        finite
    } as u16
}

/// The low byte of a whole number; 0 for infinities and NaN.
#[inline(always)]
pub fn low_byte(whole: f32) -> u8 {
    (whole + WHOLE).to_bits() as u8
}

/// The largest magnitude; if anything is NaN, unspecified.
#[inline(always)]
pub fn largest_magnitude<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let mut largest = simd.splat_f32s(0.0);
    for v in S::as_simd_f32s(x).0 {
        largest = simd.max_f32s(largest, simd.abs_f32s(*v));
    }
    simd.reduce_max_f32s(largest)
}

/// The first of the values of largest magnitude, with its sign; 0.0 in a block of zeros.
#[inline(always)]
pub fn first_extreme<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (low, high) = unsigned_range(simd, x);
    if high == -low {
        return x
            .iter()
            .copied()
            .find(|v| v.abs() == high && high > 0.0)
            .unwrap_or(0.0);
    }
    if high > -low { high } else { low }
}

/// The smallest and the largest value. A smallest value of zero has the sign of the first zero, a largest none.
#[inline(always)]
pub fn range<S: Simd>(simd: S, x: &[f32]) -> (f32, f32) {
    let (low, high) = unsigned_range(simd, x);
    let first_zero = || x.iter().copied().find(|v| *v == 0.0).unwrap_or(low);
    (if low == 0.0 { first_zero() } else { low }, high + 0.0)
}

/// The extremes, with any sign if they are zero.
#[inline(always)]
fn unsigned_range<S: Simd>(simd: S, x: &[f32]) -> (f32, f32) {
    let mut low = simd.splat_f32s(f32::INFINITY);
    let mut high = simd.splat_f32s(f32::NEG_INFINITY);
    for v in S::as_simd_f32s(x).0 {
        low = simd.min_f32s(low, *v);
        high = simd.max_f32s(high, *v);
    }
    (simd.reduce_min_f32s(low), simd.reduce_max_f32s(high))
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;

    #[test]
    fn f16_is_the_nearest() {
        let near_every_f16 = (0..=0x7c00u32).flat_map(|bits| {
            let below = f16::from_bits(bits as u16).to_f32().to_bits();
            [
                below.wrapping_sub(1),
                below,
                below + 1,
                below + 0xfff,
                below + 0x1000,
                below + 0x1001,
            ]
        });
        let subnormal_ties = (0..0x400u32).flat_map(|n| {
            let tie = ((n as f32 + 0.5) * 2f32.powi(-24)).to_bits();
            [tie - 1, tie, tie + 1]
        });
        let more = [0, 1, 0x477f_efff, 0x477f_f000, 0x7f7f_ffff, 0x7f80_0000].into_iter();
        for bits in near_every_f16.chain(subnormal_ties).chain(more) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let (ours, theirs) = (f16::from_bits(f16_bits(x)), f16::from_f32(x));
                assert!(
                    ours.to_bits() == theirs.to_bits() || x.is_nan() && ours.is_nan(),
                    "{x:e}"
                );
            }
        }
    }

    #[test]
    fn extremes_are_the_first_of_equals() {
        let check = |x: [f32; 4], extreme: f32, low: f32, high: f32| {
            let simd = Scalar;
            assert_eq!(
                first_extreme(simd, &x).to_bits(),
                extreme.to_bits(),
                "{x:?}"
            );
            assert_eq!(range(simd, &x).0.to_bits(), low.to_bits(), "{x:?}");
            assert_eq!(range(simd, &x).1, high, "{x:?}");
        };
        check([1.0, -2.0, 2.0, 0.0], -2.0, -2.0, 2.0);
        check([1.0, 2.0, -2.0, 0.5], 2.0, -2.0, 2.0);
        check([0.0, -0.0, 1.0, 0.0], 1.0, 0.0, 1.0);
        check([-0.0, 0.0, 0.0, 1.0], 1.0, -0.0, 1.0);
        check([-0.0, 0.0, -0.0, 0.0], 0.0, -0.0, 0.0);
        check(
            [-1e-40, -3.0, f32::NEG_INFINITY, 1.0],
            f32::NEG_INFINITY,
            f32::NEG_INFINITY,
            1.0,
        );
    }

    #[test]
    fn bytes_of_whole_numbers() {
        for whole in -128..=255i32 {
            assert_eq!(low_byte(whole as f32), whole as u8);
        }
        for beyond in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(low_byte(beyond), 0);
        }
    }
}
