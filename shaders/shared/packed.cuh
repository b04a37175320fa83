// What rows of packed checkpoints have in common.

// The row of a checkpoint that stands in a place: of each head of `head_rows` rows the second half lies between the first.
// 0: all rows stay. Twin: `interleaved` in src/convert/tile.rs.
static __device__ inline u32 source_row(u32 place, u32 head_rows) {
    if (head_rows == 0u) {
        return place;
    }
    const u32 at = place % head_rows;
    return place - at + at % 2u * (head_rows / 2u) + at / 2u;
}

// F8_E4M3, twin of `from_fields` in formats/src/float.rs.
static __device__ inline float e4m3(u32 byte) {
    const u32 magnitude = byte & 0x7fu;
    u32 bits = (magnitude << 20) + (120u << 23);
    if (magnitude < 8u) {
        bits = __float_as_uint((float)magnitude * (1.0f / 512.0f));
    }
    if (magnitude == 0x7fu) {
        bits = 0x7fc00000u;
    }
    return __uint_as_float(bits | ((byte & 0x80u) << 24));
}

// A scale of these types: 0: BF16, 1: F16, 2: F32, 3: F8_E4M3.
static __device__ inline float scale_at(const u8* scales, u32 scale_type, u32 first_byte, u32 index) {
    if (scale_type == 2u) {
        return __uint_as_float(word_at(scales, first_byte + index * 4u));
    }
    if (scale_type == 3u) {
        return e4m3(byte_at(scales, first_byte + index));
    }
    const u32 byte = first_byte + index * 2u;
    if (scale_type == 1u) {
        return half_at(scales, byte);
    }
    return __uint_as_float(short_at(scales, byte) << 16);
}
