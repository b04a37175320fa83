// IQ4_NL: `d VALUES[q]`. Block of 32: d (F16), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// Twins: dequantize_iq4_nl.wgsl, formats/src/block/iq4_nl.rs.

#define ELEMENTS 32u
#define BYTES 18u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return half_at(bytes, block) * IQ4_NL_VALUES[plane(bytes, block + 2u, 4u, 16u, at)];
}
