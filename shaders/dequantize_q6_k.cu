// Q6_K: `(d scale) (q - 32)`. Block of 256: 128 bytes, byte 64h + l holds the low four bits of 128h + l (low) and 128h
// + 64 + l (high); 64 bytes, byte 32h + l, bits 2s are the upper two of 128h + 32s + l; 16 signed bytes, a scale per 16
// elements; d (F16).
// Twins: dequantize_q6_k.wgsl, formats/src/block/q6_k.rs.

#define ELEMENTS 256u
#define BYTES 210u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const float scale = half_at(bytes, block + 208u) * (float)signed_byte_at(bytes, block + 192u + at / 16u);
    const u32 code = plane(bytes, block, 4u, 64u, at) | (plane(bytes, block + 128u, 2u, 32u, at) << 4);
    return scale * ((float)code - 32.0f);
}
