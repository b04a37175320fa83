// Q4_1: `q d + m`. Block of 32: d, m (F16), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// Twins: dequantize_q4_1.cu, formats/src/block/q4_1.rs.

const ELEMENTS = 32u;
const BYTES = 20u;

fn value(block: u32, at: u32) -> f32 {
    let code = plane(block + 4u, 4u, 16u, at);
    return f32(code) * half_at(block) + half_at(block + 2u);
}
