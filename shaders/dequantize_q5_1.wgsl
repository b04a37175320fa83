// Q5_1: `q d + m`. Block of 32: d, m (F16), 4 bytes with the fifth bit of each code, 16 bytes; byte j holds the low
// four bits of j (low) and j + 16 (high).
// Twins: dequantize_q5_1.cu, formats/src/block/q5_1.rs.

const ELEMENTS = 32u;
const BYTES = 24u;

fn value(block: u32, at: u32) -> f32 {
    let code = plane(block + 8u, 4u, 16u, at) | (plane(block + 4u, 1u, 1u, at) << 4u);
    return f32(code) * half_at(block) + half_at(block + 2u);
}
