// Q1_0: `d` or `-d`. Block of 128: d (F16), 16 bytes; bit j % 8 of byte j / 8 is set where element j is `d`.
// Twins: dequantize_q1_0.cu, formats/src/block/q1_0.rs.

const ELEMENTS = 128u;
const BYTES = 18u;

fn value(block: u32, at: u32) -> f32 {
    let d = half_at(block);
    return select(-d, d, plane(block + 2u, 1u, 1u, at) == 1u);
}
