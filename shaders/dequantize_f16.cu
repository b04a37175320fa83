// F16: exact in F32. A block is a value of 2 bytes.
// Twins: dequantize_f16.wgsl, `dequantize` in formats/src/block/mod.rs.

#define ELEMENTS 1u
#define BYTES 2u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return half_at(bytes, block);
}
