// TQ2_0: `(q - 1) d`. Block of 256: 64 bytes, byte 32h + m, bits 2n hold the code of 128h + m + 32n; d (F16).
// Twins: dequantize_tq2_0.cu, formats/src/block/tq2_0.rs.

const ELEMENTS = 256u;
const BYTES = 66u;

fn value(block: u32, at: u32) -> f32 {
    return (f32(plane(block, 2u, 32u, at)) - 1.0) * half_at(block + 64u);
}
