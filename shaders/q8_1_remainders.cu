// What Q8_1 has beside Q8_0: `out[block] = F16(D sum) - d sum` with the sum of a block's codes, D its largest magnitude over
// 127 and d the nearest F16 of D. Runtimes multiply minima of weights with the former, rounded inputs add up to the latter.
// One thread per block of 32, of `blocks`.
// Source: ggml `quantize_row_q8_1` (x86). Twins: q8_1_remainders.wgsl, `block_q8_1_sum` in src/backend/activation/mod.rs.

struct Parameters {
    u32 blocks;
};

extern "C" __global__ void __launch_bounds__(64) q8_1_remainders(
    const float* __restrict__ input,
    float* __restrict__ out,
    Parameters p
) {
    const u32 block = group_index() * 64u + threadIdx.x;
    if (block >= p.blocks) {
        return;
    }
    input += block * 32u;
    // Of a NaN larger than every number.
    u32 largest_bits = 0u;
    for (u32 i = 0u; i < 32u; i++) {
        largest_bits = max(largest_bits, __float_as_uint(input[i]) & 0x7fffffffu);
    }
    const float largest = __uint_as_float(largest_bits);
    const float inverse = largest == 0.0f ? 0.0f : 127.0f / largest;
    // Whole numbers up to 32 * 127: exact.
    float sum = 0.0f;
    for (u32 i = 0u; i < 32u; i++) {
        sum += rintf(input[i] * inverse);
    }
    const float scale = largest / 127.0f;
    out[block] = round_to_f16(scale * sum) - round_to_f16(scale) * sum;
}
