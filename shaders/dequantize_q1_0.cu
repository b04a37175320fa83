// Q1_0: `d` or `-d`. Block of 128: d (F16), 16 bytes; bit j % 8 of byte j / 8 is set where element j is `d`.
// Twins: dequantize_q1_0.wgsl, formats/src/block/q1_0.rs.

#define ELEMENTS 128u
#define BYTES 18u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    const float d = half_at(bytes, block);
    return plane(bytes, block + 2u, 1u, 1u, at) == 1u ? d : -d;
}
