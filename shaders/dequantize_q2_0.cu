// Q2_0: `(q - 1) d`. Block of 64: d (F16), 16 bytes; bits 2 (j % 4) of byte j / 4 hold the code of j.
// Twins: dequantize_q2_0.wgsl, formats/src/block/q2_0.rs.

#define ELEMENTS 64u
#define BYTES 18u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return ((float)plane(bytes, block + 2u, 2u, 1u, at) - 1.0f) * half_at(bytes, block);
}
