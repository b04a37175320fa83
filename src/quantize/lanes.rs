//! One f32 per block, as many blocks side by side as the CPU has lanes.
//!
//! Enters: a `pulp` token and blocks in memory. Leaves: lane arithmetic in which every lane is a
//! block of its own, so sums run in index order and the bits are the same on every CPU. No fused
//! multiply-add and nothing that crosses lanes; knows nothing of types or searches.

use std::ops::{Add, AddAssign, BitAnd, BitOr, Div, Mul, Neg, Not, Sub};

use bytemuck::Zeroable;
use pulp::Simd;

/// Adding and subtracting this rounds an f32 below 2^22 in magnitude to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// Largest finite f16.
pub const F16_MAX: f32 = 65_504.0;

/// One f32 for each of `S::F32_LANES` blocks.
///
/// Everything on it is inlined by force, because code outside the function that `pulp` compiled for
/// the CPU would fall back to the baseline instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Lanes<S: Simd> {
    simd: S,
    lanes: S::f32s,
}

/// One truth value for each block.
#[derive(Clone, Copy, Debug)]
pub struct Mask<S: Simd> {
    simd: S,
    lanes: S::m32s,
}

impl<S: Simd> Lanes<S> {
    /// How many blocks go side by side.
    pub const COUNT: usize = S::F32_LANES;

    /// The same value for every block.
    #[inline(always)]
    pub fn splat(simd: S, value: f32) -> Self {
        Self {
            simd,
            lanes: simd.splat_f32s(value),
        }
    }

    /// Zero for every block.
    #[inline(always)]
    pub fn zero(simd: S) -> Self {
        Self {
            simd,
            lanes: S::f32s::zeroed(),
        }
    }

    /// The same value for every block, where another lane value stands for the CPU.
    #[inline(always)]
    pub fn like(self, value: f32) -> Self {
        Self::splat(self.simd, value)
    }

    /// The lanes as a slice of `COUNT` values.
    #[inline(always)]
    pub fn as_slice(&self) -> &[f32] {
        bytemuck::cast_slice(std::slice::from_ref(&self.lanes))
    }

    /// The lanes as a mutable slice of `COUNT` values.
    #[inline(always)]
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(std::slice::from_mut(&mut self.lanes))
    }

    #[inline(always)]
    fn with(self, lanes: S::f32s) -> Self {
        Self {
            simd: self.simd,
            lanes,
        }
    }

    #[inline(always)]
    fn mask(self, lanes: S::m32s) -> Mask<S> {
        Mask {
            simd: self.simd,
            lanes,
        }
    }

    /// Magnitude.
    #[inline(always)]
    pub fn abs(self) -> Self {
        self.with(self.simd.abs_f32s(self.lanes))
    }

    /// Square root.
    #[inline(always)]
    pub fn sqrt(self) -> Self {
        self.with(self.simd.sqrt_f32s(self.lanes))
    }

    /// The smaller value; neither may be NaN, where CPUs differ.
    #[inline(always)]
    pub fn min(self, other: Self) -> Self {
        self.with(self.simd.min_f32s(self.lanes, other.lanes))
    }

    /// The larger value; neither may be NaN, where CPUs differ.
    #[inline(always)]
    pub fn max(self, other: Self) -> Self {
        self.with(self.simd.max_f32s(self.lanes, other.lanes))
    }

    /// `self * factor + addend`, rounded once.
    #[inline(always)]
    pub fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.with(
            self.simd
                .mul_add_f32s(self.lanes, factor.lanes, addend.lanes),
        )
    }

    /// Reads `COUNT` lanes.
    #[inline(always)]
    pub fn read(simd: S, values: &[f32]) -> Self {
        let mut lanes = Self::zero(simd);
        lanes.as_mut_slice().copy_from_slice(&values[..Self::COUNT]);
        lanes
    }

    /// Nearest integer, ties to even, of a value below 2^22 in magnitude.
    #[inline(always)]
    pub fn round(self) -> Self {
        let magic = self.like(ROUND);
        (self + magic) - magic
    }

    /// `1 / self`, and 0 where `self` is 0.
    #[inline(always)]
    pub fn recip_or_zero(self) -> Self {
        let zero = self.like(0.0);
        self.eq(zero).select(zero, self.like(1.0) / self)
    }

    /// The power of two in the value's exponent: 1 for 1.0..2.0, 0 below 2^-126, infinite above every f32.
    #[inline(always)]
    pub fn power_of_two(self) -> Self {
        self.with(
            self.simd
                .and_f32s(self.lanes, self.simd.splat_f32s(f32::INFINITY)),
        )
    }

    /// The nearest value an f16 can hold, ties to even; what overflows becomes the largest finite one.
    #[inline(always)]
    pub fn round_to_f16(self) -> Self {
        let limit = self.like(F16_MAX);
        let clamped = self.min(limit).max(-limit);
        let step = clamped.power_of_two().max(self.like(2f32.powi(-14)));
        let magic = step * self.like(1.5 * 8192.0);
        (clamped + magic) - magic
    }

    /// The nearest BF16, ties to even, of a value below 2^110 in magnitude.
    #[inline(always)]
    pub fn round_to_bf16(self) -> Self {
        let step = self.power_of_two().max(self.like(f32::MIN_POSITIVE));
        let magic = step * self.like(1.5 * 65536.0);
        (self + magic) - magic
    }

    /// Where `self < other`.
    #[inline(always)]
    pub fn lt(self, other: Self) -> Mask<S> {
        self.mask(self.simd.less_than_f32s(self.lanes, other.lanes))
    }

    /// Where `self > other`.
    #[inline(always)]
    pub fn gt(self, other: Self) -> Mask<S> {
        other.lt(self)
    }

    /// Where `self == other`.
    #[inline(always)]
    pub fn eq(self, other: Self) -> Mask<S> {
        self.mask(self.simd.equal_f32s(self.lanes, other.lanes))
    }
}

impl<S: Simd> Mask<S> {
    /// `yes` where the mask holds, else `no`.
    #[inline(always)]
    pub fn select(self, yes: Lanes<S>, no: Lanes<S>) -> Lanes<S> {
        yes.with(self.simd.select_f32s(self.lanes, yes.lanes, no.lanes))
    }

    /// Whether the mask holds anywhere.
    #[inline(always)]
    pub fn any(self) -> bool {
        self.simd.first_true_m32s(self.lanes) < S::F32_LANES
    }
}

macro_rules! lane_operators {
    ($($operator:ident, $method:ident, $lanes:ident;)*) => {$(
        impl<S: Simd> $operator for Lanes<S> {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.with(self.simd.$lanes(self.lanes, other.lanes))
            }
        }
    )*};
}

lane_operators! {
    Add, add, add_f32s;
    Sub, sub, sub_f32s;
    Mul, mul, mul_f32s;
    Div, div, div_f32s;
}

impl<S: Simd> AddAssign for Lanes<S> {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl<S: Simd> Neg for Lanes<S> {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        self.with(self.simd.neg_f32s(self.lanes))
    }
}

impl<S: Simd> BitAnd for Mask<S> {
    type Output = Self;

    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Self {
            lanes: self.simd.and_m32s(self.lanes, other.lanes),
            ..self
        }
    }
}

impl<S: Simd> BitOr for Mask<S> {
    type Output = Self;

    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Self {
            lanes: self.simd.or_m32s(self.lanes, other.lanes),
            ..self
        }
    }
}

impl<S: Simd> Not for Mask<S> {
    type Output = Self;

    #[inline(always)]
    fn not(self) -> Self {
        Self {
            lanes: self.simd.not_m32s(self.lanes),
            ..self
        }
    }
}

/// Reads blocks, one per lane: afterwards `tile[i]` holds element `i` of every block.
///
/// `blocks`: at most `Lanes::COUNT` slices of `tile.len()` elements. Lanes beyond the last block are zero.
#[inline(always)]
pub fn load<'a, S: Simd>(
    simd: S,
    tile: &mut [Lanes<S>],
    blocks: impl IntoIterator<Item = &'a [f32]>,
) {
    tile.fill(Lanes::zero(simd));
    for (lane, block) in blocks.into_iter().take(Lanes::<S>::COUNT).enumerate() {
        for (column, &value) in tile.iter_mut().zip(block) {
            column.as_mut_slice()[lane] = value;
        }
    }
}

/// Writes the codes of one block: whole numbers of -128..=255, their low byte kept.
#[inline(always)]
pub fn unload_codes<S: Simd>(tile: &[Lanes<S>], lane: usize, codes: &mut [u8]) {
    for (code, column) in codes.iter_mut().zip(tile) {
        *code = (column.as_slice()[lane] + ROUND).to_bits() as u8;
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    /// Applies `op` to every value, on the given CPU's lanes.
    struct Map<'a, F>(&'a [f32], F);

    trait LaneOp {
        fn apply<S: Simd>(&self, value: Lanes<S>) -> Lanes<S>;
    }

    impl<F: LaneOp> WithSimd for Map<'_, F> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u32> {
            let mut bits = Vec::new();
            for chunk in self.0.chunks(Lanes::<S>::COUNT) {
                let mut value = Lanes::zero(simd);
                value.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
                let result = self.1.apply(value);
                bits.extend(result.as_slice()[..chunk.len()].iter().map(|v| v.to_bits()));
            }
            bits
        }
    }

    /// The same bits from this CPU's lanes, from single lanes and from `expected`.
    fn check(op: impl LaneOp + Copy, inputs: &[f32], expected: impl Fn(f32) -> f32) {
        let expected: Vec<u32> = inputs.iter().map(|&v| expected(v).to_bits()).collect();
        assert_eq!(Arch::new().dispatch(Map(inputs, op)), expected);
        assert_eq!(Scalar.vectorize(Map(inputs, op)), expected);
    }

    macro_rules! lane_op {
        ($name:ident, |$v:ident| $body:expr) => {
            #[derive(Clone, Copy)]
            struct $name;
            impl LaneOp for $name {
                #[inline(always)]
                fn apply<S: Simd>(&self, $v: Lanes<S>) -> Lanes<S> {
                    $body
                }
            }
        };
    }

    fn samples() -> Vec<f32> {
        let mut values = vec![
            0.0,
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            1e6 + 0.5,
            65504.0,
            65519.0,
            65520.0,
            1e30,
        ];
        values.extend([
            6e-8,
            3e-8,
            2.9802322e-8,
            1e-40,
            6.1e-5,
            6.103e-5,
            0.1,
            1.0 / 3.0,
        ]);
        values.extend(
            (0..5000u32)
                .map(|i| f32::from_bits(0x3000_0000 + i.wrapping_mul(0x0003_1357) % 0x1800_0000)),
        );
        values.iter().flat_map(|&v| [v, -v]).collect()
    }

    #[test]
    fn rounds_ties_to_even() {
        lane_op!(Round, |v| v.round());
        let small: Vec<f32> = samples().into_iter().filter(|v| v.abs() < 4e6).collect();
        check(Round, &small, |v| v.round_ties_even() + 0.0);
    }

    #[test]
    fn rounds_to_f16_as_half_does() {
        lane_op!(RoundToF16, |v| v.round_to_f16());
        check(RoundToF16, &samples(), |v| {
            f16::from_f32(v.clamp(-F16_MAX, F16_MAX)).to_f32() + 0.0
        });
    }

    #[test]
    fn reciprocals_and_powers_of_two() {
        lane_op!(Recip, |v| v.recip_or_zero());
        lane_op!(PowerOfTwo, |v| v.power_of_two());
        check(Recip, &samples(), |v| if v == 0.0 { 0.0 } else { 1.0 / v });
        check(
            PowerOfTwo,
            &[0.0, 1e-40, 1.0, -1.99, 3e38, 0.3],
            |v| match v {
                v if v.abs() < f32::MIN_POSITIVE => 0.0,
                v => v.abs().log2().floor().exp2(),
            },
        );
    }

    struct LoadAndUnload<'a>(&'a [f32]);

    impl WithSimd for LoadAndUnload<'_> {
        type Output = Vec<u8>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u8> {
            let mut out = vec![0; self.0.len()];
            let batch = 32 * Lanes::<S>::COUNT;
            for (blocks, out) in self.0.chunks(batch).zip(out.chunks_mut(batch)) {
                let mut tile = [Lanes::zero(simd); 32];
                load(simd, &mut tile, blocks.chunks(32));
                for (lane, codes) in out.chunks_mut(32).enumerate() {
                    unload_codes(&tile, lane, codes);
                }
            }
            out
        }
    }

    #[test]
    fn blocks_come_back_in_order() {
        let values: Vec<f32> = (0..32 * 37).map(|i| (i % 384) as f32 - 128.0).collect();
        let expected: Vec<u8> = values.iter().map(|&v| v as i32 as u8).collect();
        assert_eq!(Arch::new().dispatch(LoadAndUnload(&values)), expected);
        assert_eq!(Scalar.vectorize(LoadAndUnload(&values)), expected);
    }
}
