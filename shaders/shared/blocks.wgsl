// What several types of blocks have in common. Products of F16 scales, whole scales and codes that are summed with
// something are exact in F32, so it makes no difference whether a device fuses them.

// Bits of a code, twin of formats/src/block/planes.rs: `stride` bytes hold `stride 8 / bits` codes; bits `bits s` of
// byte `l` belong to code `stride s + l`.
fn plane(first_byte: u32, bits: u32, stride: u32, at: u32) -> u32 {
    let per_byte = 8u / bits;
    let byte = byte_at(first_byte + at / (stride * per_byte) * stride + at % stride);
    return (byte >> (at / stride % per_byte * bits)) & ((1u << bits) - 1u);
}

// Scale (`which` = 0) or minimum (1) of a group of Q4_K and Q5_K, twin of `unpack_scales` in formats/src/block/q4_k.rs.
fn six_bits(scales: u32, which: u32, group: u32) -> u32 {
    let first_byte = scales + 4u * which;
    if group < 4u {
        return byte_at(first_byte + group) & 63u;
    }
    let low = (byte_at(scales + 4u + group) >> (4u * which)) & 15u;
    return low | (byte_at(first_byte + group - 4u) >> 6u << 4u);
}

// IQ4_NL and IQ4_XS.
const IQ4_NL_VALUES = array<f32, 16>(
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
);

// MXFP4 and NVFP4: twice the value of each E2M1 code.
const MXFP4_VALUES = array<f32, 16>(
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
);
