// Q5_K: `(d scale) q - dmin min`. Block of 256: d, dmin (F16); 12 bytes, scales and minimums per 32 elements; 32 bytes,
// byte l, bit b is the fifth bit of 32b + l; 128 bytes, byte 32c + l holds the low four bits of 64c + l (low) and 64c +
// 32 + l (high).
// Twins: dequantize_q5_k.cu, formats/src/block/q5_k.rs.

const ELEMENTS = 256u;
const BYTES = 176u;

fn value(block: u32, at: u32) -> f32 {
    let scale = half_at(block) * f32(six_bits(block + 4u, 0u, at / 32u));
    let minimum = half_at(block + 2u) * f32(six_bits(block + 4u, 1u, at / 32u));
    let code = plane(block + 48u, 4u, 32u, at) | (plane(block + 16u, 1u, 32u, at) << 4u);
    return scale * f32(code) - minimum;
}
