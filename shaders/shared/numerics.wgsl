// Functions of single values, step by step those of src/backend/cpu/elementwise.rs: adapters differ in theirs.

const NOT_FINITE = 0x7f800000u;

// By its bits: adapters may take it that there is no NaN.
fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > NOT_FINITE;
}

// e^x to about 1e-7 relative, at least the smallest normal number. Coefficients: Cephes `expf`.
fn exp_of(value: f32) -> f32 {
    // `min` and `max` may drop it.
    if is_nan(value) {
        return value;
    }
    let x = min(max(value, -87.3), 88.3);
    let n = round(x * 1.44269504);
    let r = (x - n * 0.693359375) - n * -2.12194440e-4;
    var p = 1.9875691e-4;
    p = p * r + 1.3982e-3;
    p = p * r + 8.333452e-3;
    p = p * r + 4.1665796e-2;
    p = p * r + 1.66666650e-1;
    p = p * r + 0.5;
    let fraction = (p * r) * r + r + 1.0;
    return fraction * bitcast<f32>(u32(i32(n) + 127) << 23u);
}

// x / (1 + e^-x)
fn silu(x: f32) -> f32 {
    return x / (1.0 + exp_of(-x));
}

// ln(1 + e^x) = max(x, 0) + 2 artanh(t / (2 + t)), t = e^-|x|.
fn softplus(x: f32) -> f32 {
    if x > 20.0 {
        return x;
    }
    let t = exp_of(-abs(x));
    let s = t / (2.0 + t);
    let square = s * s;
    var series = 1.0 / 15.0;
    for (var odd = 13.0; odd > 0.0; odd -= 2.0) {
        series = series * square + 1.0 / odd;
    }
    return max(x, 0.0) + 2.0 * s * series;
}

// The nearest F16, ties to even; beyond its range infinite.
fn round_to_f16(x: f32) -> f32 {
    let bits = bitcast<u32>(x) & 0x7fffffffu;
    let sign = bitcast<u32>(x) & 0x80000000u;
    if is_nan(x) {
        return x;
    }
    var rounded = (bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u;
    if bits < 0x38800000u {
        // Below 2^-14: whole multiples of 2^-24.
        rounded = bitcast<u32>(round(abs(x) * 16777216.0) / 16777216.0);
    }
    if bits >= 0x477ff000u {
        rounded = NOT_FINITE;
    }
    return bitcast<f32>(rounded | sign);
}

fn round_to_bf16(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    if is_nan(x) {
        return x;
    }
    return bitcast<f32>((bits + 0x7fffu + ((bits >> 16u) & 1u)) & 0xffff0000u);
}

// The bits of the nearest F16.
fn f16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(round_to_f16(x));
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude >= NOT_FINITE {
        return sign | select(0x7c00u, 0x7e00u, magnitude > NOT_FINITE);
    }
    if magnitude < 0x38800000u {
        return sign | u32(bitcast<f32>(magnitude) * 16777216.0);
    }
    return sign | ((magnitude >> 13u) - (112u << 10u));
}

// The same number: compilers that reorder sums as if they were exact cannot look through a zero that they do not know.
fn as_it_is(x: f32, zero: u32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ zero);
}

// Knuth: the sum of two floats and what its rounding loses.
fn add_exactly(sum: vec2<f32>, x: f32, zero: u32) -> vec2<f32> {
    let high = as_it_is(sum.x + x, zero);
    let part = as_it_is(high - sum.x, zero);
    let lost = (sum.x - as_it_is(high - part, zero)) + (x - part);
    return vec2(high, sum.y + lost);
}

// The sum of two floats and what its rounding loses, whichever is larger.
fn two_sum(x: f32, y: f32, zero: u32) -> vec2<f32> {
    let high = as_it_is(x + y, zero);
    let part = as_it_is(high - x, zero);
    let lost = (x - as_it_is(high - part, zero)) + (y - part);
    return vec2(high, as_it_is(lost, zero));
}

// The upper half of the bits of a float: products of halves are exact.
fn upper_half(x: f32, zero: u32) -> f32 {
    let moved = as_it_is(4097.0 * x, zero);
    return as_it_is(moved - as_it_is(moved - x, zero), zero);
}

// The sum rounded to the neighbour whose last bit is odd, unless it is a float: what is rounded again behind it is as if it
// were rounded once.
fn sum_to_odd(x: f32, y: f32, zero: u32) -> f32 {
    let sum = two_sum(x, y, zero);
    let bits = bitcast<u32>(sum.x);
    if sum.y == 0.0 || (bits & 1u) == 1u {
        return sum.x;
    }
    return bitcast<f32>(select(bits - 1u, bits + 1u, (sum.y > 0.0) == (sum.x > 0.0)));
}

// a b + c rounded once, also where FUSES says that the adapter's `fma` does not: what the driver takes a processor to be.
//
// Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Transactions on Computers 57 (2008), section 5.
fn fused(a: f32, b: f32, c: f32, zero: u32) -> f32 {
    let product = as_it_is(a * b, zero);
    // Halves of larger numbers would overflow.
    if FUSES || !(max(max(abs(a), abs(b)), abs(product)) < 1e30) {
        return fma(a, b, c);
    }
    let a_high = upper_half(a, zero);
    let b_high = upper_half(b, zero);
    let a_low = as_it_is(a - a_high, zero);
    let b_low = as_it_is(b - b_high, zero);
    let first = as_it_is(a_high * b_high - product, zero);
    let second = as_it_is(first + a_high * b_low, zero);
    let lost = as_it_is(as_it_is(second + a_low * b_high, zero) + a_low * b_low, zero);
    let small = two_sum(c, lost, zero);
    let large = two_sum(product, small.x, zero);
    return large.x + sum_to_odd(small.y, large.y, zero);
}
