// Inputs of a matrix product as a runtime sees them. One thread per block of `block` of `count` values.
//
// mode 0: rounded to BF16; 1: to F16; 2: 8 bit, scale in F16 (Q8_0); 3: 8 bit, the largest magnitude at -127 (Q8_K);
// 4: 8 bit with the block's largest magnitude over 127; 5: 8 bit with `scale`; 6: F8_E4M3 with the block's largest magnitude
// over 448; 7: F8_E4M3 with `scale`; 8: E2M1, the block's largest magnitude over 6 an F8_E4M3 in units of `scale` (NVFP4).
// Twins: round_activation.wgsl, src/backend/activation/mod.rs.

struct Parameters {
    u32 count;
    u32 block;
    u32 mode;
    float scale;
};

// Of a NaN larger than every number.
static __device__ inline u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

static __device__ inline void round_to_halves(const float* input, float* out, u32 count, bool is_f16) {
    for (u32 i = 0u; i < count; i++) {
        out[i] = is_f16 ? round_to_f16(input[i]) : round_to_bf16(input[i]);
    }
}

// The value of largest magnitude, the first of equals.
static __device__ inline float extreme_of(const float* input, u32 count) {
    float extreme = 0.0f;
    for (u32 i = 0u; i < count; i++) {
        if (magnitude(input[i]) > magnitude(extreme)) {
            extreme = input[i];
        }
    }
    return extreme;
}

// The nearest F8_E4M3, ties to even, 448 at most. A NaN stays one: its digits may not be rounded up beyond its exponent.
static __device__ inline float round_to_e4m3(float x) {
    if (x != x) {
        return x;
    }
    x = x < -448.0f ? -448.0f : x;
    x = x > 448.0f ? 448.0f : x;
    if (fabsf(x) < 0.015625f) {
        return rintf(x * 512.0f) / 512.0f;
    }
    const u32 bits = __float_as_uint(x);
    return __uint_as_float((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
}

// The nearest E2M1, ties to even mantissas, 6 at most.
static __device__ inline float round_to_e2m1(float x) {
    const float size = fabsf(x);
    const float steps = size < 2.0f ? 2.0f : (size < 4.0f ? 1.0f : 0.5f);
    const float rounded = rintf(x * steps) / steps;
    return size > 6.0f ? (x < 0.0f ? -6.0f : 6.0f) : rounded;
}

static __device__ inline float round_to_code(float x, u32 mode) {
    if (mode == 8u) {
        return round_to_e2m1(x);
    }
    if (mode >= 6u) {
        return round_to_e4m3(x);
    }
    float code = rintf(x);
    if (mode >= 4u) {
        code = code < -128.0f ? -128.0f : code;
        code = code > 127.0f ? 127.0f : code;
    }
    return code;
}

extern "C" __global__ void __launch_bounds__(64) round_activation(
    const float* __restrict__ input,
    float* __restrict__ out,
    Parameters p
) {
    const u32 item = group_index() * 64u + threadIdx.x;
    const u32 first = item * p.block;
    if (first >= p.count) {
        return;
    }
    const u32 count = min(p.block, p.count - first);
    input += first;
    out += first;
    if (p.mode < 2u) {
        round_to_halves(input, out, count, p.mode == 1u);
        return;
    }
    const float extreme = extreme_of(input, count);
    const float largest = fabsf(extreme);
    float step = p.scale;
    float inverse = 1.0f / p.scale;
    if (p.mode == 2u) {
        step = round_to_f16(largest / 127.0f);
        inverse = 127.0f / largest;
    } else if (p.mode == 3u) {
        inverse = -127.0f / extreme;
        step = 1.0f / inverse;
    } else if (p.mode == 4u) {
        step = largest / 127.0f;
        inverse = 1.0f / step;
    } else if (p.mode == 6u) {
        step = largest / 448.0f;
        inverse = 1.0f / step;
    } else if (p.mode == 8u) {
        step = round_to_e4m3(largest / 6.0f / p.scale) * p.scale;
        inverse = 1.0f / step;
    }
    // Of zeros.
    if ((p.mode < 5u && largest == 0.0f) || (p.mode >= 4u && step == 0.0f)) {
        inverse = 0.0f;
        step = 0.0f;
    }
    for (u32 i = 0u; i < count; i++) {
        out[i] = round_to_code(input[i] * inverse, p.mode) * step;
    }
}
