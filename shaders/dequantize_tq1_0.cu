// TQ1_0: `(q - 1) d`. Block of 256: 32 bytes with five codes each, byte m of m + 32n; 16 bytes with five, of 160 + m +
// 16n; 4 bytes with four, of 240 + m + 4n; d (F16). A byte is a fraction of 256, its digits to base 3 the codes.
// Twins: dequantize_tq1_0.wgsl, formats/src/block/tq1_0.rs.

#define ELEMENTS 256u
#define BYTES 54u

static __device__ inline float value(const u8* bytes, u32 block, u32 at) {
    // Elements before these bytes, bytes before them, their number.
    u32 first = 0u;
    u32 first_byte = 0u;
    u32 stride = 32u;
    if (at >= 240u) {
        first = 240u;
        first_byte = 48u;
        stride = 4u;
    } else if (at >= 160u) {
        first = 160u;
        first_byte = 32u;
        stride = 16u;
    }
    u32 fraction = byte_at(bytes, block + first_byte + (at - first) % stride);
    // Each step drops the first digit.
    for (u32 n = (at - first) / stride; n > 0u; --n) {
        fraction = fraction * 3u & 0xffu;
    }
    const u32 code = fraction * 3u >> 8;
    return ((float)code - 1.0f) * half_at(bytes, block + 52u);
}
