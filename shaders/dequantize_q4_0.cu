// Q4_0: `d q`. Block of 32: d (F16), 16 bytes; byte j holds the codes of j and j + 16, each 8 too large.
// Twins: dequantize_q4_0.wgsl, formats/src/block/q4_0.rs.

#define ELEMENTS 32u
#define BYTES 18u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 code = (byte_at(bytes, block + 2u + at % 16u) >> (at / 16u * 4u)) & 0xfu;
    return half_at(bytes, block) * (float)((int)code - 8);
}
