// BF16: the upper half of an F32. A block is a value of 2 bytes.
// Twins: dequantize_bf16.wgsl, `dequantize` in formats/src/block/mod.rs.

#define ELEMENTS 1u
#define BYTES 2u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return __uint_as_float(short_at(bytes, block) << 16);
}
