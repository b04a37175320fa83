// Q4_0: `(q - 8) d`. Block of 32: d (F16), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// Twins: dequantize_q4_0.wgsl, formats/src/block/q4_0.rs.

#define ELEMENTS 32u
#define BYTES 18u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 code = plane(bytes, block + 2u, 4u, 16u, at);
    return ((float)code - 8.0f) * half_at(bytes, block);
}
