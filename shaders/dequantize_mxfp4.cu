// MXFP4: `VALUES[q] 2^(e - 128)`. Block of 32: e (E8M0), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// In integers, as devices may take the subnormal numbers of small scales for zero.
// Twins: dequantize_mxfp4.wgsl, formats/src/block/mxfp4.rs.

#define ELEMENTS 32u
#define BYTES 17u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 bits = __float_as_uint(MXFP4_VALUES[plane(bytes, block + 1u, 4u, 16u, at)]);
    const u32 sign = bits & 0x80000000u;
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude == 0u) {
        return 0.0f;
    }
    const int exponent = (int)(magnitude >> 23) + (int)byte_at(bytes, block) - 128;
    const u32 mantissa = magnitude & 0x7fffffu;
    if (exponent >= 255) {
        return __uint_as_float(sign | 0x7f800000u);
    }
    if (exponent <= 0) {
        return __uint_as_float(sign | ((mantissa | 0x800000u) >> (u32)(1 - exponent)));
    }
    return __uint_as_float(sign | ((u32)exponent << 23) | mantissa);
}
