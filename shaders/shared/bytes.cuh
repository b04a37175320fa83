// Rows of blocks as they are stored, little-endian, blocks aligned to 2 bytes or to nothing.

static __device__ inline u32 byte_at(const u8* bytes, u32 at) { return bytes[at]; }

static __device__ inline int signed_byte_at(const u8* bytes, u32 at) { return (int)(signed char)bytes[at]; }

// 16 bits at an even place.
static __device__ inline u32 short_at(const u8* bytes, u32 at) {
    return *reinterpret_cast<const unsigned short*>(bytes + at);
}

// 32 bits at an even place.
static __device__ inline u32 word_at(const u8* bytes, u32 at) {
    return short_at(bytes, at) | (short_at(bytes, at + 2u) << 16);
}

// The F32 that 16 bits of F16 stand for.
static __device__ inline float half_of(u32 bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
#else
    const u32 sign = (bits & 0x8000u) << 16;
    const u32 exponent = (bits >> 10) & 31u;
    const u32 mantissa = bits & 1023u;
    if (exponent == 0u) {
        return __uint_as_float(__float_as_uint((float)mantissa * 5.9604644775390625e-8f) | sign);
    }
    const u32 rebased = exponent == 31u ? 255u : exponent + 112u;
    return __uint_as_float(sign | rebased << 23 | mantissa << 13);
#endif
}

static __device__ inline float half_at(const u8* bytes, u32 at) { return half_of(short_at(bytes, at)); }
