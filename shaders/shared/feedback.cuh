// Grids of rounding with error feedback: the values of codes, the floats that scales are stored in.
// Twins: feedback.wgsl, src/quantize/feedback/grid.rs and src/quantize/symmetric.rs.

#define INFINITE __uint_as_float(NOT_FINITE)

// The values of codes: whole numbers, those of IQ4_NL, E2M1 doubled.
#define WHOLE_NUMBERS 0u
#define UNEVEN_VALUES 1u
#define FLOATS 2u

// How the scales that are tried are found.
#define ENDS 0u
#define LINES 1u
#define POWERS 2u
#define AFFINE 3u
#define SYMMETRIC 4u
#define MAGNITUDES 5u
#define RANGES 6u
#define PRESET 7u

// How scales may move once codes are known: not at all; as floats; as two floats; as floats that the minimum is a whole
// multiple of; as whole multiples of the super-block's factors.
#define FIXED 0u
#define OWN 1u
#define OWN_WITH_MIN 2u
#define ZERO_POINT 3u
#define MULTIPLES 4u

// Values that are tried: first + step k for k below count.
struct Grid {
    u32 family;
    u32 codebook;
    // Columns that share scales.
    u32 sub;
    // Scales of their own are 0: F16, 1: BF16.
    u32 scale_float;
    // Values of the first and the last code.
    float first;
    float last;
    float a_first;
    float a_step;
    u32 a_count;
    float b_first;
    float b_step;
    u32 b_count;
    float around_first;
    float around_step;
    u32 around_count;
    // Largest whole multiple.
    float scales;
    // Multiples that are tried beside the nearest one while columns are rounded.
    u32 reach;
    float factors_first;
    float factors_step;
    u32 factors_count;
    u32 rounds;
    // Multiples that are tried when factors are chosen.
    u32 factors_reach;
    u32 lattice;
    float low;
    float high;
    // Largest multiple of the minimum; negative where there is none.
    float min_high;
};

struct Scales {
    float d;
    float dmin;
    float scale;
    float min;
};

static __device__ inline float step_of(const Scales& s) { return s.d * s.scale; }
static __device__ inline float offset_of(const Scales& s) { return s.dmin * s.min; }

static __device__ inline float recip_or_zero(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

// The nearest whole number, ties to even, of a value below 2^22 in magnitude.
static __device__ inline float round_whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

static __device__ inline float whole_within(float x, float low, float high) {
    return round_whole(fminf(fmaxf(x, low), high));
}

static __device__ inline float power_of_two(float x) { return __uint_as_float(__float_as_uint(x) & NOT_FINITE); }

// The power of two in the exponent, kept where it and its inverse are normal; 1 for 0.
static __device__ inline float unit_of(float magnitude) {
    const float least = __uint_as_float(1u << 23);
    const float most = __uint_as_float(253u << 23);
    return magnitude > 0.0f ? fminf(fmaxf(power_of_two(magnitude), least), most) : 1.0f;
}

// The nearest F16; what overflows becomes the largest finite one.
static __device__ inline float nearest_f16(float x) { return round_to_f16(fmaxf(fminf(x, 65504.0f), -65504.0f)); }

static __device__ inline float nearest_scale(const Grid& g, float x) {
    return g.scale_float == 0u ? nearest_f16(x) : round_to_bf16(x);
}

static __device__ inline float nearest_uneven(float x) {
    const float values[16] = {-127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f,
                              1.0f,    13.0f,   25.0f,  38.0f,  53.0f,  69.0f,  89.0f,  113.0f};
    float nearest = values[0];
    for (u32 i = 0u; i < 15u; i++) {
        nearest = x < 0.5f * (values[i] + values[i + 1u]) ? nearest : values[i + 1u];
    }
    return nearest;
}

static __device__ inline float nearest_float(float x) {
    const float midpoints[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f};
    const float values[7] = {1.0f, 2.0f, 3.0f, 4.0f, 6.0f, 8.0f, 12.0f};
    float magnitude = 0.0f;
    for (u32 i = 0u; i < 7u; i++) {
        magnitude = fabsf(x) > midpoints[i] ? values[i] : magnitude;
    }
    return x < 0.0f ? -magnitude : magnitude;
}

// The value of a code that is nearest.
static __device__ inline float nearest_value(const Grid& g, float x) {
    if (g.codebook == UNEVEN_VALUES) {
        return nearest_uneven(x);
    }
    if (g.codebook == FLOATS) {
        return nearest_float(x);
    }
    return whole_within(x, g.first, g.last);
}
