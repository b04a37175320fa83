// Grids of rounding with error feedback: the values of codes, the floats that scales are stored in.
// Twins: feedback.cuh, src/quantize/feedback/grid.rs and src/quantize/symmetric.rs.

// Larger than every loss that is a number.
const INFINITE = 3.4028235e38;

// The values of codes: whole numbers, those of IQ4_NL, E2M1 doubled.
const UNEVEN_VALUES = 1u;
const FLOATS = 2u;

// How the scales that are tried are found.
const ENDS = 0u;
const LINES = 1u;
const POWERS = 2u;
const AFFINE = 3u;
const SYMMETRIC = 4u;
const MAGNITUDES = 5u;
const RANGES = 6u;
const PRESET = 7u;

// How scales may move once codes are known: not at all; as floats; as two floats; as floats that the minimum is a whole
// multiple of; as whole multiples of the super-block's factors.
const FIXED = 0u;
const OWN_WITH_MIN = 2u;
const ZERO_POINT = 3u;
const MULTIPLES = 4u;

// Values that are tried: first + step k for k below count.
struct Grid {
    family: u32,
    codebook: u32,
    // Columns that share scales.
    sub: u32,
    // Scales of their own are 0: F16, 1: BF16.
    scale_float: u32,
    // Values of the first and the last code.
    first: f32,
    last: f32,
    a_first: f32,
    a_step: f32,
    a_count: u32,
    b_first: f32,
    b_step: f32,
    b_count: u32,
    around_first: f32,
    around_step: f32,
    around_count: u32,
    // Largest whole multiple.
    scales: f32,
    // Multiples that are tried beside the nearest one while columns are rounded.
    reach: u32,
    factors_first: f32,
    factors_step: f32,
    factors_count: u32,
    rounds: u32,
    // Multiples that are tried when factors are chosen.
    factors_reach: u32,
    lattice: u32,
    low: f32,
    high: f32,
    // Largest multiple of the minimum; negative where there is none.
    min_high: f32,
}

struct Scales {
    d: f32,
    dmin: f32,
    scale: f32,
    min: f32,
}

fn step_of(s: Scales) -> f32 {
    return s.d * s.scale;
}

fn offset_of(s: Scales) -> f32 {
    return s.dmin * s.min;
}

fn recip_or_zero(x: f32) -> f32 {
    if x == 0.0 {
        return 0.0;
    }
    return 1.0 / x;
}

fn whole_within(x: f32, low: f32, high: f32) -> f32 {
    return round(min(max(x, low), high));
}

fn power_of_two(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) & NOT_FINITE);
}

// The power of two in the exponent, kept where it and its inverse are normal; 1 for 0.
fn unit_of(magnitude: f32) -> f32 {
    let least = bitcast<f32>(1u << 23u);
    let most = bitcast<f32>(253u << 23u);
    return select(1.0, min(max(power_of_two(magnitude), least), most), magnitude > 0.0);
}

fn is_number(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) < NOT_FINITE;
}

// The nearest F16; what overflows becomes the largest finite one.
fn nearest_f16(x: f32) -> f32 {
    return round_to_f16(max(min(x, 65504.0), -65504.0));
}

fn nearest_scale(x: f32) -> f32 {
    if p.grid.scale_float == 0u {
        return nearest_f16(x);
    }
    return round_to_bf16(x);
}

fn nearest_uneven(x: f32) -> f32 {
    var values = array<f32, 16>(
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
        1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    );
    var nearest = values[0];
    for (var i = 0u; i < 15u; i++) {
        if !(x < 0.5 * (values[i] + values[i + 1u])) {
            nearest = values[i + 1u];
        }
    }
    return nearest;
}

fn nearest_float(x: f32) -> f32 {
    var midpoints = array<f32, 7>(0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0);
    var values = array<f32, 7>(1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0);
    var magnitude = 0.0;
    for (var i = 0u; i < 7u; i++) {
        if abs(x) > midpoints[i] {
            magnitude = values[i];
        }
    }
    return select(magnitude, -magnitude, x < 0.0);
}

// The value of a code that is nearest.
fn nearest_value(x: f32) -> f32 {
    if p.grid.codebook == UNEVEN_VALUES {
        return nearest_uneven(x);
    }
    if p.grid.codebook == FLOATS {
        return nearest_float(x);
    }
    return whole_within(x, p.grid.first, p.grid.last);
}
