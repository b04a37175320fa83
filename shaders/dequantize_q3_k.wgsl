// Q3_K: `(d (scale - 32)) (q - 4)`. Block of 256: 32 bytes, byte l, bit b is the third bit of 32b + l; 64 bytes, byte
// 32h + l, bits 2s are the low two of 128h + 32s + l; 12 bytes, a scale per 16 elements: byte k holds the low four bits
// of k (low) and k + 8 (high), bits 2 (k / 4) of byte 8 + k % 4 the upper two; d (F16).
// Twins: dequantize_q3_k.cu, formats/src/block/q3_k.rs.

const ELEMENTS = 256u;
const BYTES = 110u;

fn value(block: u32, at: u32) -> f32 {
    let group = at / 16u;
    let biased = plane(block + 96u, 4u, 8u, group) | (plane(block + 104u, 2u, 4u, group) << 4u);
    let scale = half_at(block + 108u) * (f32(biased) - 32.0);
    let code = plane(block + 32u, 2u, 32u, at) | (plane(block, 1u, 32u, at) << 2u);
    return scale * (f32(code) - 4.0);
}
