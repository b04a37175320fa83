// Q2_0: `(q - 1) d`. Block of 64: d (F16), 16 bytes; bits 2 (j % 4) of byte j / 4 hold the code of j.
// Twins: dequantize_q2_0.cu, formats/src/block/q2_0.rs.

const ELEMENTS = 64u;
const BYTES = 18u;

fn value(block: u32, at: u32) -> f32 {
    return (f32(plane(block + 2u, 2u, 1u, at)) - 1.0) * half_at(block);
}
