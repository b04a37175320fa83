// Q4_K: `(d scale) q - dmin min`. Block of 256: d, dmin (F16); 12 bytes, scales and minimums per 32 elements; 128
// bytes, byte 32c + l holds the codes of 64c + l (low) and 64c + 32 + l (high).
// Twins: dequantize_q4_k.cu, formats/src/block/q4_k.rs.

const ELEMENTS = 256u;
const BYTES = 144u;

fn value(block: u32, at: u32) -> f32 {
    let scale = half_at(block) * f32(six_bits(block + 4u, 0u, at / 32u));
    let minimum = half_at(block + 2u) * f32(six_bits(block + 4u, 1u, at / 32u));
    return scale * f32(plane(block + 16u, 4u, 32u, at)) - minimum;
}
