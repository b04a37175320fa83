//! The types of ggml as error feedback sees them: sub-blocks of weights `d scale value - dmin min`.
//!
//! Enters: the targets of a block or sub-block, one row per lane. Leaves: scales to try, packed blocks. Decides nothing: the
//! sweep simulates every candidate and keeps the best.

use bytemuck::Pod;
use half::f16;
use pulp::Simd;

use super::super::ScaleOverflow;
use super::super::affine::{self, AffineGrid};
use super::super::integer::ScaleFloat;
use super::super::iq4_xs::{self, Iq4Values};
use super::super::lanes::{F16_MAX, Lanes};
use super::super::searched_block::Problem as BlockProblem;
use super::super::super_block::{Problem, SUPER_BLOCK, Sweep};
use super::super::symmetric::{
    self, CodeValues, Codebook, Nearest, NearestWhole, SymmetricGrid, Whole, largest,
};
use super::super::{affine_block, mxfp4, q2_k, q3_k, q4_k, q5_k, q6_k};
use super::description::{GridDescription, Search};
use super::scales::{Candidates, Scales};
use super::sweep::Half;
use crate::formats::block::*;

/// How the scales of a type may move once its codes are known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lattice {
    /// The scale is a float of its own.
    Own(ScaleFloat),
    /// The scale is an f16 of its own, and so is the minimum.
    HalfWithMin,
    /// The scale is a float of its own, the minimum a whole multiple of it within these bounds.
    ZeroPoint(ScaleFloat, f32, f32),
    /// Whole multiples of the super-block's factors, within these bounds; the second pair for minima.
    Whole(f32, f32, Option<f32>),
    /// No refit: powers of two, or scales that were chosen beforehand.
    Fixed,
}

/// A type that can be rounded to with feedback.
///
/// Everything is inlined by force, to be compiled for the CPU at hand.
pub trait FeedbackGrid: Sync + Send {
    /// The values of codes.
    type Codebook: Codebook;
    /// Weights of a block.
    const BLOCK: usize;
    /// Weights that share scales.
    const SUB: usize;
    /// Whether a block has factors of its own, fixed when it begins.
    const HAS_HEAD: bool = false;

    /// How scales may be refitted.
    fn lattice(&self) -> Lattice;

    /// How [`Self::begin`] and [`Self::candidates`] find scales.
    fn search(&self) -> Search;

    /// All that another machine has to know.
    fn description(&self) -> GridDescription {
        GridDescription {
            values: Self::Codebook::VALUES,
            first: Self::Codebook::FIRST,
            last: Self::Codebook::LAST,
            sub: Self::SUB,
            search: self.search(),
            lattice: self.lattice(),
        }
    }

    /// Scales that are chosen before the first pass, on the weights themselves: `pivots` is what an error in each column
    /// counts.
    fn preset(&self, half: &mut Half, pivots: &[f32]) {
        let _ = (half, pivots);
    }

    /// What is fixed when a block begins, given its targets and what an error in each column counts.
    ///
    /// # Panics
    /// Without [`Self::HAS_HEAD`]: there it is what was chosen beforehand.
    #[inline(always)]
    fn begin<S: Simd>(&self, _: S, _: &[Lanes<S>], _: &[f32]) -> Scales<S> {
        unreachable!("asked of grids whose blocks have factors of their own")
    }

    /// Scales to try for a sub-block, at least one.
    fn candidates<S: Simd>(
        &self,
        head: &Scales<S>,
        targets: &[Lanes<S>],
        weights: &[Lanes<S>],
        out: &mut Candidates,
    );

    /// Bytes of a packed row.
    fn row_bytes(&self, columns: usize) -> usize;

    /// Packs one row.
    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow;
}

/// One finished row.
#[derive(Clone, Copy)]
pub struct RoundedRow<'a> {
    /// The rows it is one of.
    pub half: &'a Half,
    /// Which.
    pub lane: usize,
}

impl RoundedRow<'_> {
    /// `[d, dmin, scale, min]` of a sub-block.
    pub fn scales(&self, sub: usize) -> [f32; 4] {
        self.half.scales[sub].map(|row| row[self.lane])
    }

    /// The value of a column's code.
    pub fn value(&self, column: usize) -> f32 {
        self.half.values[column][self.lane]
    }
}

/// Bytes of a row of blocks.
fn bytes_of_blocks<G: FeedbackGrid, B: Pod>(columns: usize) -> usize {
    columns / G::BLOCK * size_of::<B>()
}

/// Packs a row block by block: `pack` gets the scales of every sub-block of one as `[d, dmin, scale, min]`, and its codes in
/// order.
fn pack_blocks<G: FeedbackGrid, B: Pod>(
    row: RoundedRow,
    out: &mut [u8],
    pack: impl Fn(&[[f32; 4]], &[u8]) -> B,
) -> ScaleOverflow {
    let subs = G::BLOCK / G::SUB;
    let mut overflow = 0;
    let blocks: &mut [B] = bytemuck::cast_slice_mut(out);
    for (index, block) in blocks.iter_mut().enumerate() {
        let scales = index * subs..(index + 1) * subs;
        let scales: Vec<[f32; 4]> = scales.map(|sub| row.scales(sub)).collect();
        let columns = index * G::BLOCK..(index + 1) * G::BLOCK;
        let codes: Vec<u8> = columns
            .map(|column| code_of::<G::Codebook>(row.value(column)))
            .collect();
        overflow += u64::from(is_saturated(scales[0][0])) + u64::from(is_saturated(scales[0][1]));
        *block = pack(&scales, &codes);
    }
    ScaleOverflow(overflow)
}

/// The stored code of a value of the codebook.
fn code_of<C: Codebook>(value: f32) -> u8 {
    let code = C::code(Lanes::splat(pulp::Scalar, value));
    code.as_slice()[0] as i32 as u8
}

/// Puts the largest weight at values around both ends, as f16 scales.
#[inline(always)]
fn push_ends<S: Simd, C: Codebook>(
    targets: &[Lanes<S>],
    first: &Sweep,
    last: &Sweep,
    out: &mut Candidates,
) {
    let largest = largest(targets);
    for (end, sweep) in [(C::FIRST, first), (C::LAST, last)] {
        for k in 0..sweep.tries {
            let d = (largest * largest.like(1.0 / (end + sweep.at(k)))).round_to_f16();
            out.push(Scales::of_block(d, d.like(0.0)));
        }
    }
}

macro_rules! symmetric_block {
    ($(#[$doc:meta])* $name:ident, $block:ident, $codebook:ty, $first:expr, $last:expr, |$d:ident, $codes:ident| $pack:expr) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the name is ggml's")]
        pub struct $name;

        impl FeedbackGrid for $name {
            type Codebook = $codebook;
            const BLOCK: usize = 32;
            const SUB: usize = 32;

            #[inline(always)]
            fn lattice(&self) -> Lattice {
                Lattice::Own(ScaleFloat::F16)
            }

            fn search(&self) -> Search {
                Search::Ends($first, $last)
            }

            #[inline(always)]
            fn candidates<S: Simd>(&self, _: &Scales<S>, targets: &[Lanes<S>], _: &[Lanes<S>], out: &mut Candidates) {
                const FIRST: Sweep = $first;
                const LAST: Sweep = $last;
                push_ends::<S, $codebook>(targets, &FIRST, &LAST, out);
            }

            fn row_bytes(&self, columns: usize) -> usize {
                bytes_of_blocks::<Self, $block>(columns)
            }

            fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
                pack_blocks::<Self, $block>(row, out, |scales, codes| {
                let $d = f16::from_f32(scales[0][0]);
                let $codes: &[u8; 32] = codes.try_into().expect("a block has 32 codes");
                $pack
            })
            }
        }
    };
}

symmetric_block!(
    /// 4-bit codes, one scale.
    Q4_0, BlockQ4_0, Whole<8>, Sweep::new(-1.4, 0.1, 25), Sweep::new(1.0, -0.2, 9),
    |d, codes| BlockQ4_0::pack(d, codes)
);
symmetric_block!(
    /// 5-bit codes, one scale.
    Q5_0, BlockQ5_0, Whole<16>, Sweep::new(-1.4, 0.15, 20), Sweep::new(1.4, -0.2, 12),
    |d, codes| BlockQ5_0::pack(d, codes)
);
symmetric_block!(
    /// 4-bit codes of uneven values, one scale.
    IQ4_NL, BlockIQ4NL, Iq4Values, Sweep::new(-35.0, 4.0, 20), Sweep::new(-25.0, 4.0, 16),
    |d, codes| BlockIQ4NL::pack(d, codes)
);
symmetric_block!(
    /// 8-bit codes, one scale.
    Q8_0, BlockQ8_0, Bytes, Sweep::new(-3.0, 0.5, 10), Sweep::new(0.0, 1.0, 2),
    |d, codes| BlockQ8_0::pack(d, bytemuck::cast_ref(codes))
);

/// The whole numbers from -127 to 127, each its own code.
pub struct Bytes;

impl Codebook for Bytes {
    const FIRST: f32 = -127.0;
    const LAST: f32 = 127.0;
    type Nearest = NearestWhole;
    const NEAREST: NearestWhole = NearestWhole {
        first: Self::FIRST,
        last: Self::LAST,
    };
}

/// The whole numbers from 0 on, each its own code.
pub struct Unsigned<const LAST: i32>;

impl<const LAST: i32> Codebook for Unsigned<LAST> {
    const FIRST: f32 = 0.0;
    const LAST: f32 = LAST as f32;
    type Nearest = NearestWhole;
    const NEAREST: NearestWhole = NearestWhole {
        first: Self::FIRST,
        last: Self::LAST,
    };
}

/// Relative changes of the scale that are tried around the best line.
const D_AROUND: Sweep = Sweep::new(-0.06, 0.03, 5);
/// Changes of the minimum that are tried, in steps.
const MIN_AROUND: Sweep = Sweep::new(-0.3, 0.15, 5);

macro_rules! affine_block {
    ($(#[$doc:meta])* $name:ident, $block:ident, $last:literal) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the name is ggml's")]
        pub struct $name;

        impl FeedbackGrid for $name {
            type Codebook = Unsigned<$last>;
            const BLOCK: usize = 32;
            const SUB: usize = 32;

            #[inline(always)]
            fn lattice(&self) -> Lattice {
                Lattice::HalfWithMin
            }

            fn search(&self) -> Search {
                Search::Lines(D_AROUND, MIN_AROUND)
            }

            #[inline(always)]
            fn candidates<S: Simd>(&self, _: &Scales<S>, targets: &[Lanes<S>], weights: &[Lanes<S>], out: &mut Candidates) {
                let problem = BlockProblem::of_lanes(targets, weights);
                let found = affine_block::search(&problem, $last as f32);
                let (scale, low) = (problem.in_original_units(found.d), problem.in_original_units(found.m));
                for k in 0..D_AROUND.tries {
                    let d = (scale * scale.like(1.0 + D_AROUND.at(k))).round_to_f16();
                    for k in 0..MIN_AROUND.tries {
                        let min = (d.like(MIN_AROUND.at(k)) * d - low).round_to_f16();
                        out.push(Scales::of_block(d, min));
                    }
                }
            }

            fn row_bytes(&self, columns: usize) -> usize {
                bytes_of_blocks::<Self, $block>(columns)
            }

            fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
                pack_blocks::<Self, $block>(row, out, |scales, codes| {
                let [d, dmin, ..] = scales[0];
                let codes: &[u8; 32] = codes.try_into().expect("a block has 32 codes");
                $block::pack(f16::from_f32(d), f16::from_f32(-dmin), codes)
            })
            }
        }
    };
}

affine_block!(
    /// 4-bit codes, scale and minimum.
    Q4_1, BlockQ4_1, 15
);
affine_block!(
    /// 5-bit codes, scale and minimum.
    Q5_1, BlockQ5_1, 31
);

/// 4-bit floats with a power of two.
pub struct MXFP4;

/// The values of E2M1 codes, doubled.
#[derive(Debug, Clone, Copy)]
pub struct E2M1;

impl Nearest for E2M1 {
    #[inline(always)]
    fn nearest<S: Simd>(self, x: Lanes<S>) -> Lanes<S> {
        let mut magnitude = x.like(0.0);
        for (midpoint, value) in mxfp4::MIDPOINTS.into_iter().zip(&MXFP4_VALUES[1..8]) {
            magnitude = x
                .abs()
                .gt(x.like(midpoint))
                .select(x.like(*value), magnitude);
        }
        x.lt(x.like(0.0)).select(-magnitude, magnitude)
    }
}

impl Codebook for E2M1 {
    const VALUES: CodeValues = CodeValues::Floats;
    const FIRST: f32 = -12.0;
    const LAST: f32 = 12.0;
    type Nearest = Self;
    const NEAREST: Self = Self;

    #[inline(always)]
    fn code<S: Simd>(x: Lanes<S>) -> Lanes<S> {
        let mut code = x.like(0.0);
        for midpoint in mxfp4::MIDPOINTS {
            code = x
                .abs()
                .gt(x.like(midpoint))
                .select(code + x.like(1.0), code);
        }
        let negative = x.lt(x.like(0.0)) & code.gt(x.like(0.0));
        negative.select(code + x.like(8.0), code)
    }
}

impl FeedbackGrid for MXFP4 {
    type Codebook = E2M1;
    const BLOCK: usize = 32;
    const SUB: usize = 32;

    #[inline(always)]
    fn lattice(&self) -> Lattice {
        Lattice::Fixed
    }

    fn search(&self) -> Search {
        Search::Powers
    }

    #[inline(always)]
    fn candidates<S: Simd>(
        &self,
        _: &Scales<S>,
        targets: &[Lanes<S>],
        _: &[Lanes<S>],
        out: &mut Candidates,
    ) {
        let power = largest(targets).abs().power_of_two();
        for shift in [0.0625, 0.125, 0.25, 0.5] {
            let d = (power * power.like(shift)).max(power.like(2f32.powi(-126)));
            out.push(Scales::of_block(d, d.like(0.0)));
        }
    }

    fn row_bytes(&self, columns: usize) -> usize {
        bytes_of_blocks::<Self, BlockMXFP4>(columns)
    }

    fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
        pack_blocks::<Self, BlockMXFP4>(row, out, |scales, codes| {
            // The inverse of `mxfp4_scale` for normal powers of two.
            let exponent = (scales[0][0].to_bits() >> 23) as u8;
            let codes: &[u8; 32] = codes.try_into().expect("a block has 32 codes");
            BlockMXFP4::pack(exponent.saturating_add(1), codes)
        })
    }
}

/// Whole multiples around the nearest one, in both directions.
#[inline(always)]
fn push_affine<S: Simd>(
    head: &Scales<S>,
    targets: &[Lanes<S>],
    weights: &[Lanes<S>],
    grid: &AffineGrid,
    out: &mut Candidates,
) {
    let (step, offset) = affine::fit_sub_block(targets, weights, grid);
    let (scale, min) = (
        step * head.d.recip_or_zero(),
        offset * head.dmin.recip_or_zero(),
    );
    for scale_shift in -2..=2 {
        for min_shift in -2..=2 {
            out.push(Scales {
                scale: grid.whole(scale + scale.like(scale_shift as f32)),
                min: grid.whole(min + min.like(min_shift as f32)),
                ..*head
            });
        }
    }
}

#[inline(always)]
fn push_symmetric<S: Simd, C: Codebook>(
    head: &Scales<S>,
    targets: &[Lanes<S>],
    weights: &[Lanes<S>],
    grid: &SymmetricGrid,
    reach: i32,
    out: &mut Candidates,
) {
    let step = symmetric::fit_sub_block::<S, C>(targets, weights, grid);
    let scale = step * head.d.recip_or_zero();
    for sign in [1.0, -1.0] {
        for shift in -reach..=reach {
            out.push(Scales {
                scale: grid.whole(scale * scale.like(sign) + scale.like(shift as f32)),
                ..*head
            });
        }
    }
}

macro_rules! affine_super_block {
    ($(#[$doc:meta])* $name:ident, $block:ident, $room:ident, $subs:literal, $last:literal) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the name is ggml's")]
        pub struct $name;

        impl FeedbackGrid for $name {
            type Codebook = Unsigned<$last>;
            const BLOCK: usize = SUPER_BLOCK;
            const SUB: usize = SUPER_BLOCK / $subs;
            const HAS_HEAD: bool = true;

            #[inline(always)]
            fn lattice(&self) -> Lattice {
                Lattice::Whole(0.0, $room::GRID.scales, Some($room::GRID.scales))
            }

            fn search(&self) -> Search {
                Search::Affine($room::GRID)
            }

            #[inline(always)]
            fn begin<S: Simd>(&self, simd: S, targets: &[Lanes<S>], weights: &[f32]) -> Scales<S> {
                let problem = Problem::of_lanes(simd, targets, weights);
                let (d, dmin) = affine::factors::<S, $subs>(simd, &problem, &$room::GRID);
                Scales::head(d, dmin)
            }

            #[inline(always)]
            fn candidates<S: Simd>(&self, head: &Scales<S>, targets: &[Lanes<S>], weights: &[Lanes<S>], out: &mut Candidates) {
                push_affine(head, targets, weights, &$room::GRID, out);
            }

            fn row_bytes(&self, columns: usize) -> usize {
                bytes_of_blocks::<Self, $block>(columns)
            }

            fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
                pack_blocks::<Self, $block>(row, out, |scales, codes| {
                let [d, dmin, ..] = scales[0];
                let whole = |part: usize| std::array::from_fn(|sub| scales[sub][part] as u8);
                let codes = codes.try_into().expect("a super-block has 256 codes");
                $block::pack(f16::from_f32(d), f16::from_f32(dmin), &whole(2), &whole(3), codes)
            })
            }
        }
    };
}

affine_super_block!(
    /// 2-bit codes, 4-bit scales and minima per 16.
    Q2_K, BlockQ2K, q2_k, 16, 3
);
affine_super_block!(
    /// 4-bit codes, 6-bit scales and minima per 32.
    Q4_K, BlockQ4K, q4_k, 8, 15
);
affine_super_block!(
    /// 5-bit codes, 6-bit scales and minima per 32.
    Q5_K, BlockQ5K, q5_k, 8, 31
);

macro_rules! symmetric_super_block {
    ($(#[$doc:meta])* $name:ident, $block:ident, $room:ident, $subs:literal, $codebook:ty, $reach:literal) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the name is ggml's")]
        pub struct $name;

        impl FeedbackGrid for $name {
            type Codebook = $codebook;
            const BLOCK: usize = SUPER_BLOCK;
            const SUB: usize = SUPER_BLOCK / $subs;
            const HAS_HEAD: bool = true;

            #[inline(always)]
            fn lattice(&self) -> Lattice {
                Lattice::Whole(-$room::GRID.scales, $room::GRID.scales - 1.0, None)
            }

            fn search(&self) -> Search {
                Search::Symmetric($room::GRID, $reach)
            }

            #[inline(always)]
            fn begin<S: Simd>(&self, simd: S, targets: &[Lanes<S>], weights: &[f32]) -> Scales<S> {
                let problem = Problem::of_lanes(simd, targets, weights);
                let d = symmetric::factor::<S, $codebook, $subs>(simd, &problem, &$room::GRID);
                Scales::head(d, d.like(0.0))
            }

            #[inline(always)]
            fn candidates<S: Simd>(&self, head: &Scales<S>, targets: &[Lanes<S>], weights: &[Lanes<S>], out: &mut Candidates) {
                push_symmetric::<S, $codebook>(head, targets, weights, &$room::GRID, $reach, out);
            }

            fn row_bytes(&self, columns: usize) -> usize {
                bytes_of_blocks::<Self, $block>(columns)
            }

            fn pack_row(&self, row: RoundedRow, out: &mut [u8]) -> ScaleOverflow {
                pack_blocks::<Self, $block>(row, out, |scales, codes| {
                let whole = std::array::from_fn(|sub| scales[sub][2] as i8);
                let codes = codes.try_into().expect("a super-block has 256 codes");
                $block::pack(f16::from_f32(scales[0][0]), &whole, codes)
            })
            }
        }
    };
}

symmetric_super_block!(
    /// 3-bit codes, signed 6-bit scales per 16.
    Q3_K, BlockQ3K, q3_k, 16, Whole<4>, 3
);
symmetric_super_block!(
    /// 6-bit codes, signed 8-bit scales per 16.
    Q6_K, BlockQ6K, q6_k, 16, Whole<32>, 3
);
symmetric_super_block!(
    /// 4-bit codes of uneven values, signed 6-bit scales per 32.
    IQ4_XS, BlockIQ4XS, iq4_xs, 8, Iq4Values, 3
);

/// Whether a scale is as large as f16 can hold, and so may have been cut.
fn is_saturated(scale: f32) -> bool {
    scale.abs() >= F16_MAX
}
