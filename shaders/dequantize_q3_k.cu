// Q3_K: `(d (scale - 32)) (q - 4)`. Block of 256: 32 bytes, byte l, bit b is the third bit of 32b + l; 64 bytes, byte
// 32h + l, bits 2s are the low two of 128h + 32s + l; 12 bytes, a scale per 16 elements: byte k holds the low four bits
// of k (low) and k + 8 (high), bits 2 (k / 4) of byte 8 + k % 4 the upper two; d (F16).
// Twins: dequantize_q3_k.wgsl, formats/src/block/q3_k.rs.

#define ELEMENTS 256u
#define BYTES 110u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 group = at / 16u;
    const u32 biased = plane(bytes, block + 96u, 4u, 8u, group) | (plane(bytes, block + 104u, 2u, 4u, group) << 4);
    const float scale = half_at(bytes, block + 108u) * ((float)biased - 32.0f);
    const u32 code = plane(bytes, block + 32u, 2u, 32u, at) | (plane(bytes, block, 1u, 32u, at) << 2);
    return scale * ((float)code - 4.0f);
}
