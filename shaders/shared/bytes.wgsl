// Rows of blocks as they are stored: bytes in words, blocks aligned to nothing.

@group(0) @binding(0) var<storage, read> bytes: array<u32>;

fn byte_at(at: u32) -> u32 {
    return (bytes[at >> 2u] >> ((at & 3u) * 8u)) & 0xffu;
}

fn signed_byte_at(at: u32) -> i32 {
    return i32(byte_at(at) << 24u) >> 24u;
}

// 16 bits at an even place.
fn short_at(at: u32) -> u32 {
    return (bytes[at >> 2u] >> ((at & 2u) * 8u)) & 0xffffu;
}

// 32 bits at an even place.
fn word_at(at: u32) -> u32 {
    return short_at(at) | (short_at(at + 2u) << 16u);
}

fn half_at(at: u32) -> f32 {
    return unpack2x16float(short_at(at)).x;
}
