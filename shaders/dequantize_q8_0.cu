// Q8_0: `q d`. Block of 32: d (F16), 32 signed bytes.
// Twins: dequantize_q8_0.wgsl, formats/src/block/q8_0.rs.

#define ELEMENTS 32u
#define BYTES 34u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return (float)signed_byte_at(bytes, block + 2u + at) * half_at(bytes, block);
}
