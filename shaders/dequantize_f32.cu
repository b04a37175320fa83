// F32: as it is stored. A block is a value of 4 bytes.
// Twins: dequantize_f32.wgsl, `dequantize` in formats/src/block/mod.rs.

#define ELEMENTS 1u
#define BYTES 4u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    return __uint_as_float(word_at(bytes, block));
}
