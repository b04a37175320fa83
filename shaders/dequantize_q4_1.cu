// Q4_1: `q d + m`. Block of 32: d, m (F16), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// Twins: dequantize_q4_1.wgsl, formats/src/block/q4_1.rs.

#define ELEMENTS 32u
#define BYTES 20u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 code = plane(bytes, block + 4u, 4u, 16u, at);
    return (float)code * half_at(bytes, block) + half_at(bytes, block + 2u);
}
