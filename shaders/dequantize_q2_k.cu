// Q2_K: `(d scale) q - dmin min`. Block of 256: 16 bytes, per 16 elements scale (low) and minimum (high); 64 bytes,
// byte 32h + l, bits 2s hold the code of 128h + 32s + l; d, dmin (F16).
// Twins: dequantize_q2_k.wgsl, formats/src/block/q2_k.rs.

#define ELEMENTS 256u
#define BYTES 84u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 both = byte_at(bytes, block + at / 16u);
    const float scale = half_at(bytes, block + 80u) * (float)(both & 15u);
    const float minimum = half_at(bytes, block + 82u) * (float)(both >> 4);
    return scale * (float)plane(bytes, block + 16u, 2u, 32u, at) - minimum;
}
