// Q5_0: `(q - 16) d`. Block of 32: d (F16), 4 bytes with the fifth bit of each code, 16 bytes; byte j holds the low
// four bits of j (low) and j + 16 (high).
// Twins: dequantize_q5_0.cu, formats/src/block/q5_0.rs.

const ELEMENTS = 32u;
const BYTES = 22u;

fn value(block: u32, at: u32) -> f32 {
    let code = plane(block + 6u, 4u, 16u, at) | (plane(block + 2u, 1u, 1u, at) << 4u);
    return (f32(code) - 16.0) * half_at(block);
}
