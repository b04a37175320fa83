// Q4_0: `(q - 8) d`. Block of 32: d (F16), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// Twins: dequantize_q4_0.cu, formats/src/block/q4_0.rs.

const ELEMENTS = 32u;
const BYTES = 18u;

fn value(block: u32, at: u32) -> f32 {
    let code = plane(block + 2u, 4u, 16u, at);
    return (f32(code) - 8.0) * half_at(block);
}
