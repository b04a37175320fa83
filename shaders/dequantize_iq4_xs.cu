// IQ4_XS: `(d (scale - 32)) VALUES[q]`. Block of 256: d (F16); per 32 elements a scale: 2 bytes with its upper two
// bits, 4 bytes with its low four, each in order; 128 bytes, per 32 elements byte j holds the codes of j (low) and j +
// 16 (high).
// Twins: dequantize_iq4_xs.wgsl, formats/src/block/iq4_xs.rs.

#define ELEMENTS 256u
#define BYTES 136u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const u32 group = at / 32u;
    const u32 biased = plane(bytes, block + 4u, 4u, 1u, group) | (plane(bytes, block + 2u, 2u, 1u, group) << 4);
    const float scale = half_at(bytes, block) * ((float)biased - 32.0f);
    return scale * IQ4_NL_VALUES[plane(bytes, block + 8u, 4u, 16u, at)];
}
