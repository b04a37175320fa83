// IQ4_NL: `d VALUES[q]`. Block of 32: d (F16), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// Twins: dequantize_iq4_nl.cu, formats/src/block/iq4_nl.rs.

const ELEMENTS = 32u;
const BYTES = 18u;

fn value(block: u32, at: u32) -> f32 {
    return half_at(block) * IQ4_NL_VALUES[plane(block + 2u, 4u, 16u, at)];
}
