// Q8_0: `q d`. Block of 32: d (F16), 32 signed bytes.
// Twins: dequantize_q8_0.cu, formats/src/block/q8_0.rs.

const ELEMENTS = 32u;
const BYTES = 34u;

fn value(block: u32, at: u32) -> f32 {
    return f32(signed_byte_at(block + 2u + at)) * half_at(block);
}
