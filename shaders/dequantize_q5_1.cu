// Q5_1: `q d + m`. Block of 32: d, m (F16), 4 bytes with the fifth bit of each code, 16 bytes; byte j holds the low
// four bits of j (low) and j + 16 (high).
// Twins: dequantize_q5_1.wgsl, formats/src/block/q5_1.rs.

#define ELEMENTS 32u
#define BYTES 24u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 code = plane(bytes, block + 8u, 4u, 16u, at) | (plane(bytes, block + 4u, 1u, 1u, at) << 4);
    return (float)code * half_at(bytes, block) + half_at(bytes, block + 2u);
}
