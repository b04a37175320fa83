// What several types of blocks have in common. Products of F16 scales, whole scales and codes that are summed with
// something are exact in F32, so it makes no difference whether a device fuses them.

// Bits of a code, twin of formats/src/block/planes.rs: `stride` bytes hold `stride 8 / bits` codes; bits `bits s` of
// byte `l` belong to code `stride s + l`.
static __device__ inline u32 plane(const u8* bytes, u32 first_byte, u32 bits, u32 stride, u32 at) {
    const u32 per_byte = 8u / bits;
    const u32 byte = byte_at(bytes, first_byte + at / (stride * per_byte) * stride + at % stride);
    return (byte >> (at / stride % per_byte * bits)) & ((1u << bits) - 1u);
}

// Scale (`which` = 0) or minimum (1) of a group of Q4_K and Q5_K, twin of `unpack_scales` in formats/src/block/q4_k.rs.
static __device__ inline u32 six_bits(const u8* bytes, u32 scales, u32 which, u32 group) {
    const u32 first_byte = scales + 4u * which;
    if (group < 4u) {
        return byte_at(bytes, first_byte + group) & 63u;
    }
    const u32 low = (byte_at(bytes, scales + 4u + group) >> (4u * which)) & 15u;
    return low | (byte_at(bytes, first_byte + group - 4u) >> 6 << 4);
}

// IQ4_NL and IQ4_XS.
static __device__ const float IQ4_NL_VALUES[16] = {
    -127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f,
    1.0f, 13.0f, 25.0f, 38.0f, 53.0f, 69.0f, 89.0f, 113.0f,
};

// MXFP4 and NVFP4: twice the value of each E2M1 code.
static __device__ const float MXFP4_VALUES[16] = {
    0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 6.0f, 8.0f, 12.0f, 0.0f, -1.0f, -2.0f, -3.0f, -4.0f, -6.0f, -8.0f, -12.0f,
};
