// F32: as it is stored. A block is a value of 4 bytes.
// Twins: dequantize_f32.cu, `dequantize` in formats/src/block/mod.rs.

const ELEMENTS = 1u;
const BYTES = 4u;

fn value(block: u32, at: u32) -> f32 {
    return bitcast<f32>(word_at(block));
}
