// TQ2_0: `(q - 1) d`. Block of 256: 64 bytes, byte 32h + m, bits 2n hold the code of 128h + m + 32n; d (F16).
// Twins: dequantize_tq2_0.wgsl, formats/src/block/tq2_0.rs.

#define ELEMENTS 256u
#define BYTES 66u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return ((float)plane(bytes, block, 2u, 32u, at) - 1.0f) * half_at(bytes, block + 64u);
}
