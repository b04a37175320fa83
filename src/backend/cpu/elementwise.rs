//! Functions of single values, written so that compilers turn their loops into vectors.

use super::kernels::Isa;
use super::multiversion::multiversion;
use crate::parallel;

/// Values that are worth a task of their own.
const PART: usize = 1 << 14;

/// `max(x, 0)^2`.
pub fn relu_squared(isa: Isa, values: &mut [f32]) {
    let parts = values.chunks_mut(PART);
    parallel::for_each(parts, |part| relu_squared_part(isa, part));
}

/// `sum += values`.
pub fn add(isa: Isa, sum: &mut [f32], values: &[f32]) {
    let parts = sum.chunks_mut(PART).zip(values.chunks(PART));
    parallel::for_each(parts, |(sum, values)| add_part(isa, sum, values));
}

/// Rows of `width` values, each times its factor; not more than there are factors.
pub fn scale_rows(rows: &[f32], width: usize, factors: &[f32]) -> Vec<f32> {
    let rows = rows.chunks_exact(width).zip(factors);
    let scaled = rows.flat_map(|(row, factor)| row.iter().map(move |x| x * factor));
    scaled.collect()
}

/// Whether no value is NaN or infinite.
pub fn is_finite(isa: Isa, values: &[f32]) -> bool {
    let are_finite = parallel::map(values.chunks(PART), |part| is_part_finite(isa, part));
    are_finite.iter().all(|part| *part)
}

multiversion! {
    fn relu_squared_part(values: &mut [f32]) = relu_squared_each;
}

multiversion! {
    fn add_part(sum: &mut [f32], values: &[f32]) = add_each;
}

multiversion! {
    fn is_part_finite(values: &[f32]) -> bool = is_each_finite;
}

multiversion! {
    /// The largest value; NaN is passed over.
    pub fn largest(values: &[f32]) -> f32 = largest_of;
}

multiversion! {
    /// `sum e^(x - max)`, in f64: a vocabulary has more terms than f32 has digits.
    pub fn sum_of_exps(values: &[f32], max: f32) -> f64 = sum_exps;
}

#[inline(always)]
fn relu_squared_each(values: &mut [f32]) {
    values.iter_mut().for_each(|x| {
        let positive = x.max(0.0);
        // A NaN stays one: `max` would hide it.
        *x = if x.is_nan() { *x } else { positive * positive };
    });
}

#[inline(always)]
fn add_each(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
}

#[inline(always)]
fn is_each_finite(values: &[f32]) -> bool {
    // No early end: the loop becomes vectors.
    values.iter().fold(true, |all, x| all & x.is_finite())
}

#[inline(always)]
fn largest_of(values: &[f32]) -> f32 {
    let keep = |lanes: &mut [f32; LANES], part: &[f32]| {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (parts, rest) = values.as_chunks::<LANES>();
    parts.iter().for_each(|part| keep(&mut lanes, part));
    keep(&mut lanes, rest);
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[inline(always)]
fn sum_exps(values: &[f32], max: f32) -> f64 {
    let add = |lanes: &mut [f64; LANES], part: &[f32]| {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane += f64::from(exp(x - max));
        }
    };
    let mut lanes = [0.0; LANES];
    let (parts, rest) = values.as_chunks::<LANES>();
    parts.iter().for_each(|part| add(&mut lanes, part));
    add(&mut lanes, rest);
    lanes.into_iter().sum()
}

/// `e^x` to about 1e-7 relative, at least the smallest normal number.
///
/// `x = n ln 2 + r`, a polynomial in r, and n into the exponent. Coefficients: Cephes `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding and subtracting 1.5 * 2^23 rounds to an integer, which in between is the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * r + coefficient;
    }
    let fraction = (p * r) * r + r + 1.0;
    // Not `n as i32`: a cast that saturates is done value by value.
    fraction * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// The nearest F16, ties to even; beyond its range infinite. The loop becomes vectors, which a call per value does not.
#[inline(always)]
pub fn round_to_f16(x: f32) -> f32 {
    /// The least normal F16, 2^-14.
    const MIN_NORMAL: f32 = 6.103_515_6e-5;
    /// From here on values are rounded to infinity.
    const TOO_LARGE: f32 = 65520.0;
    let (magnitude, sign) = (x.abs(), x.to_bits() & 0x8000_0000);
    // Normal: 13 bits are cut from the mantissa. Subnormal: whole multiples of 2^-24, the step of f32 above 0.5.
    let bits = magnitude.to_bits();
    let normal = f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff);
    let subnormal = (magnitude + 0.5) - 0.5;
    let small = if magnitude < MIN_NORMAL {
        subnormal
    } else {
        normal
    };
    let large = if magnitude >= TOO_LARGE {
        f32::INFINITY
    } else {
        small
    };
    let rounded = f32::from_bits(large.to_bits() | sign);
    if x.is_nan() { x } else { rounded }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `ln(1 + e^x)` to about 2e-7 relative; x itself above 20, as every implementation of the family has it.
///
/// Not the mathematical library of the system: each rounds in its own way, and statistics would depend on it.
/// `ln(1 + e^x) = max(x, 0) + ln(1 + t)` with `t = e^-|x|`, and `ln(1 + t) = 2 artanh(t / (2 + t))`, a series in a number
/// of at most 1/3.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    let t = exp(-x.abs());
    let s = t / (2.0 + t);
    let square = s * s;
    let mut series = 0.0;
    for odd in [15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / odd;
    }
    let positive = if x > 0.0 { x } else { 0.0 };
    let sum = positive + 2.0 * s * series;
    if x > 20.0 || x.is_nan() { x } else { sum }
}

/// `e^x` in f64 to about 1e-16 relative, the same on every machine; at least the smallest normal number.
///
/// As [`exp`], with the Taylor series.
#[inline(always)]
pub fn exp_f64(x: f64) -> f64 {
    /// 1.5 * 2^52.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let x = if x < -708.0 { -708.0 } else { x };
    let x = if x > 709.0 { 709.0 } else { x };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut series = 0.0;
    for coefficient in INVERSE_FACTORIALS.iter().rev() {
        series = series * r + coefficient;
    }
    series * f64::from_bits((shifted.to_bits() << 52).wrapping_add(1023 << 52))
}

/// `1 / k!`.
const INVERSE_FACTORIALS: [f64; 15] = {
    let mut coefficients = [1.0; 15];
    let mut k = 1;
    while k < coefficients.len() {
        coefficients[k] = coefficients[k - 1] / k as f64;
        k += 1;
    }
    coefficients
};

/// Lanes of the sums below; fixed, so that results do not depend on the machine's vectors.
pub const LANES: usize = 16;

/// The sum of 16 lanes, pairwise. Halves are arrays of their own: one that is added to itself is taken apart into
/// values, in the loop that fills it too.
#[inline(always)]
pub fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut eight = [0.0; 8];
    for lane in 0..8 {
        eight[lane] = lanes[lane] + lanes[lane + 8];
    }
    let mut four = [0.0; 4];
    for lane in 0..4 {
        four[lane] = eight[lane] + eight[lane + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}

/// `sum x^2`.
#[inline(always)]
pub fn sum_of_squares(values: &[f32]) -> f32 {
    dot(values, values)
}

/// `sum x y`.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (x_rows, x_rest) = x.as_chunks::<LANES>();
    let (y_rows, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x_rows.iter().zip(y_rows) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    if !x_rest.is_empty() {
        for (lane, (x, y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
            *lane += x * y;
        }
    }
    sum_lanes(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_the_exponential() {
        for i in -870..=880 {
            let x = i as f32 / 10.0 + 0.013;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7 || x > 88.3, "{x} {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_take_every_value() {
        let values: Vec<f32> = (0..37).map(|i| (i * 29 % 37) as f32 / 4.0).collect();
        for isa in Isa::all() {
            assert_eq!(largest(isa, &values), 9.0);
            let exact: f64 = values.iter().map(|x| f64::from(x - 9.0).exp()).sum();
            assert!((sum_of_exps(isa, &values, 9.0) - exact).abs() < 1e-6);
        }
        assert!(!is_finite(Isa::detect(), &[0.0, f32::INFINITY]));
    }

    #[test]
    fn softplus_is_the_logarithm_of_one_plus_the_exponential() {
        for i in -8700..=3000 {
            let x = i as f32 / 100.0 + 0.0013;
            let exact = match x > 20.0 {
                true => f64::from(x),
                false => f64::from(x).exp().ln_1p(),
            };
            let error = (f64::from(softplus(x)) - exact).abs() / exact;
            assert!(error < 4e-7, "{x} {error}");
        }
        assert!(softplus(f32::NAN).is_nan() && softplus(f32::INFINITY).is_infinite());
    }

    #[test]
    fn exp_f64_is_the_exponential() {
        for i in -7000..=7000 {
            let x = f64::from(i) / 10.0 + 0.0137;
            let error = (exp_f64(x) - x.exp()).abs() / x.exp();
            assert!(error < 1e-15, "{x} {error}");
        }
        assert!(exp_f64(f64::NAN).is_nan() && exp_f64(f64::NEG_INFINITY) < 1e-300);
    }

    #[test]
    fn rounding_to_f16_is_the_conversion() {
        // All exponents, mantissas around the ties of both ranges.
        let mantissas = [
            0, 1, 0xfff, 0x1000, 0x1001, 0x3000, 0x2f_f000, 0x7f_efff, 0x7f_f000, 0x7f_ffff,
        ];
        for top in 0..512_u32 {
            for mantissa in mantissas {
                let x = f32::from_bits(top << 23 | mantissa);
                let (found, expected) = (round_to_f16(x), half::f16::from_f32(x).to_f32());
                let same = found.to_bits() == expected.to_bits();
                assert!(
                    same || found.is_nan() && expected.is_nan(),
                    "{x:e} {found:e} {expected:e}"
                );
            }
        }
    }

    #[test]
    fn nan_passes_through() {
        let mut values = [f32::NAN, -1.0, 3.0];
        relu_squared(Isa::detect(), &mut values);
        assert!(values[0].is_nan() && values[1..] == [0.0, 9.0]);
    }

    #[test]
    fn sums_cover_every_value() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&x, &x), (0..37).map(|i| (i * i) as f32).sum::<f32>());
    }
}
