// Functions of single values, step by step those of src/backend/cpu/elementwise.rs: no product and sum is fused here.

#define NOT_FINITE 0x7f800000u

// e^x to about 1e-7 relative, at least the smallest normal number. Coefficients: Cephes `expf`.
static __device__ inline float exp_of(float x) {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which in between is the low bits of the sum.
    const float rounding = 12582912.0f;
    // Comparisons instead of fminf and fmaxf: a NaN stays one.
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifted = x * 1.44269504f + rounding;
    const float n = shifted - rounding;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3982e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.66666650e-1f;
    p = p * r + 0.5f;
    const float fraction = (p * r) * r + r + 1.0f;
    return fraction * __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23));
}

// x / (1 + e^-x)
static __device__ inline float silu(float x) { return x / (1.0f + exp_of(-x)); }

// ln(1 + e^x) = max(x, 0) + 2 artanh(t / (2 + t)), t = e^-|x|.
static __device__ inline float softplus(float x) {
    if (x > 20.0f) {
        return x;
    }
    const float t = exp_of(-fabsf(x));
    const float s = t / (2.0f + t);
    const float square = s * s;
    float series = 1.0f / 15.0f;
    for (float odd = 13.0f; odd > 0.0f; odd -= 2.0f) {
        series = series * square + 1.0f / odd;
    }
    return (x > 0.0f ? x : 0.0f) + 2.0f * s * series;
}

// The nearest F16, ties to even; beyond its range infinite.
static __device__ inline float round_to_f16(float x) {
    const u32 bits = __float_as_uint(x) & 0x7fffffffu;
    const u32 sign = __float_as_uint(x) & 0x80000000u;
    if (bits > NOT_FINITE) {
        return x;
    }
    u32 rounded = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
    if (bits < 0x38800000u) {
        // Below 2^-14: whole multiples of 2^-24.
        rounded = __float_as_uint(rintf(fabsf(x) * 16777216.0f) / 16777216.0f);
    }
    if (bits >= 0x477ff000u) {
        rounded = NOT_FINITE;
    }
    return __uint_as_float(rounded | sign);
}

static __device__ inline float round_to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > NOT_FINITE) {
        return x;
    }
    return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// The bits of the nearest F16.
static __device__ inline u32 f16_bits(float x) {
    const u32 bits = __float_as_uint(round_to_f16(x));
    const u32 sign = (bits >> 16) & 0x8000u;
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude >= NOT_FINITE) {
        return sign | (magnitude > NOT_FINITE ? 0x7e00u : 0x7c00u);
    }
    if (magnitude < 0x38800000u) {
        return sign | (u32)(__uint_as_float(magnitude) * 16777216.0f);
    }
    return sign | ((magnitude >> 13) - (112u << 10));
}

// Knuth: the sum of two floats and what its rounding loses.
static __device__ inline float2 add_exactly(float2 sum, float x) {
    const float high = sum.x + x;
    const float part = high - sum.x;
    const float lost = (sum.x - (high - part)) + (x - part);
    return {high, sum.y + lost};
}
