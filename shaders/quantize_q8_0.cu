// Inputs as blocks of Q8_0: codes of 8 bit, four in a word, and a scale per block of 32: an F16, written as F32. One thread
// per block of `blocks`. Codes and scales are those of round_activation with mode 2.
// Source: ggml `quantize_row_q8_0` (x86). Twins: quantize_q8_0.wgsl, src/backend/activation/mod.rs.

struct Parameters {
    u32 blocks;
};

extern "C" __global__ void __launch_bounds__(64) quantize_q8_0(
    const float* __restrict__ input,
    u32* __restrict__ codes,
    float* __restrict__ scales,
    Parameters p
) {
    const u32 block = group_index() * 64u + threadIdx.x;
    if (block >= p.blocks) {
        return;
    }
    input += block * 32u;
    codes += block * 8u;
    // Of a NaN larger than every number.
    u32 largest_bits = 0u;
    for (u32 i = 0u; i < 32u; i++) {
        largest_bits = max(largest_bits, __float_as_uint(input[i]) & 0x7fffffffu);
    }
    const float largest = __uint_as_float(largest_bits);
    const float inverse = largest == 0.0f ? 0.0f : 127.0f / largest;
    scales[block] = round_to_f16(largest / 127.0f);
    for (u32 word = 0u; word < 8u; word++) {
        u32 packed = 0u;
        for (u32 at = 0u; at < 4u; at++) {
            // The sum with 1.5 * 2^23 rounds to an integer, which is its last byte.
            packed |= (__float_as_uint(input[4u * word + at] * inverse + 12582912.0f) & 0xffu) << 8u * at;
        }
        codes[word] = packed;
    }
}
