// Q5_K: `(d scale) q - dmin min`. Block of 256: d, dmin (F16); 12 bytes, scales and minimums per 32 elements; 32 bytes,
// byte l, bit b is the fifth bit of 32b + l; 128 bytes, byte 32c + l holds the low four bits of 64c + l (low) and 64c +
// 32 + l (high).
// Twins: dequantize_q5_k.wgsl, formats/src/block/q5_k.rs.

#define ELEMENTS 256u
#define BYTES 176u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const float scale = half_at(bytes, block) * (float)six_bits(bytes, block + 4u, 0u, at / 32u);
    const float minimum = half_at(bytes, block + 2u) * (float)six_bits(bytes, block + 4u, 1u, at / 32u);
    const u32 code = plane(bytes, block + 48u, 4u, 32u, at) | (plane(bytes, block + 16u, 1u, 32u, at) << 4);
    return scale * (float)code - minimum;
}
