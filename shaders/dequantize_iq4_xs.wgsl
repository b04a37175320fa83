// IQ4_XS: `(d (scale - 32)) VALUES[q]`. Block of 256: d (F16); per 32 elements a scale: 2 bytes with its upper two
// bits, 4 bytes with its low four, each in order; 128 bytes, per 32 elements byte j holds the codes of j (low) and j +
// 16 (high).
// Twins: dequantize_iq4_xs.cu, formats/src/block/iq4_xs.rs.

const ELEMENTS = 256u;
const BYTES = 136u;

fn value(block: u32, at: u32) -> f32 {
    let group = at / 32u;
    let biased = plane(block + 4u, 4u, 1u, group) | (plane(block + 2u, 2u, 1u, group) << 4u);
    let scale = half_at(block) * (f32(biased) - 32.0);
    return scale * IQ4_NL_VALUES[plane(block + 8u, 4u, 16u, at)];
}
