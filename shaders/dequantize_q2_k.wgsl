// Q2_K: `(d scale) q - dmin min`. Block of 256: 16 bytes, per 16 elements scale (low) and minimum (high); 64 bytes,
// byte 32h + l, bits 2s hold the code of 128h + 32s + l; d, dmin (F16).
// Twins: dequantize_q2_k.cu, formats/src/block/q2_k.rs.

const ELEMENTS = 256u;
const BYTES = 84u;

fn value(block: u32, at: u32) -> f32 {
    let both = byte_at(block + at / 16u);
    let scale = half_at(block + 80u) * f32(both & 15u);
    let minimum = half_at(block + 82u) * f32(both >> 4u);
    return scale * f32(plane(block + 16u, 2u, 32u, at)) - minimum;
}
