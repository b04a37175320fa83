// Q5_0: `(q - 16) d`. Block of 32: d (F16), 4 bytes with the fifth bit of each code, 16 bytes; byte j holds the low
// four bits of j (low) and j + 16 (high).
// Twins: dequantize_q5_0.wgsl, formats/src/block/q5_0.rs.

#define ELEMENTS 32u
#define BYTES 22u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 code = plane(bytes, block + 6u, 4u, 16u, at) | (plane(bytes, block + 2u, 1u, 1u, at) << 4);
    return ((float)code - 16.0f) * half_at(bytes, block);
}
