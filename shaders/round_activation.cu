// Inputs of a matrix product as a runtime sees them. One thread per block of `block` of `count` values.
//
// mode 0: rounded to BF16; 1: to F16; 2: 8 bit, scale in F16 (Q8_0); 3: 8 bit, the largest magnitude at -127 (Q8_K);
// 4: 8 bit with the block's largest magnitude over 127; 5: 8 bit with `scale`.
// Twins: round_activation.wgsl, src/backend/activation.rs.

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
    }
    // Of zeros.
    if ((p.mode < 5u && largest == 0.0f) || (p.mode >= 4u && step == 0.0f)) {
        inverse = 0.0f;
        step = 0.0f;
    }
    for (u32 i = 0u; i < count; i++) {
        float code = rintf(input[i] * inverse);
        if (p.mode >= 4u) {
            code = code < -128.0f ? -128.0f : code;
            code = code > 127.0f ? 127.0f : code;
        }
        out[i] = code * step;
    }
}
