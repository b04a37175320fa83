// NVFP4: `scale VALUES[q]`. Block of 64: 4 bytes, per 16 elements a scale (UE4M3, halved); 32 bytes, per 16 elements
// byte j holds the codes of j (low) and j + 8 (high).
// Twins: dequantize_nvfp4.wgsl, formats/src/block/nvfp4.rs.

#define ELEMENTS 64u
#define BYTES 36u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 d = byte_at(bytes, block + at / 16u);
    const u32 exponent = (d >> 3) & 15u;
    const float mantissa = (float)(d & 7u);
    float scale = (1.0f + mantissa / 8.0f) * __uint_as_float((exponent + 119u) << 23);
    if (exponent == 0u) {
        scale = mantissa * (1.0f / 1024.0f);
    }
    if (d == 0x7fu) {
        scale = 0.0f;
    }
    return scale * MXFP4_VALUES[plane(bytes, block + 4u, 4u, 8u, at)];
}
