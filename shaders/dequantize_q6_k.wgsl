// Q6_K: `(d scale) (q - 32)`. Block of 256: 128 bytes, byte 64h + l holds the low four bits of 128h + l (low) and 128h
// + 64 + l (high); 64 bytes, byte 32h + l, bits 2s are the upper two of 128h + 32s + l; 16 signed bytes, a scale per 16
// elements; d (F16).
// Twins: dequantize_q6_k.cu, formats/src/block/q6_k.rs.

const ELEMENTS = 256u;
const BYTES = 210u;

fn value(block: u32, at: u32) -> f32 {
    let scale = half_at(block + 208u) * f32(signed_byte_at(block + 192u + at / 16u));
    let code = plane(block, 4u, 64u, at) | (plane(block + 128u, 2u, 32u, at) << 4u);
    return scale * (f32(code) - 32.0);
}
