// BF16: the upper half of an F32. A block is a value of 2 bytes.
// Twins: dequantize_bf16.cu, `dequantize` in formats/src/block/mod.rs.

const ELEMENTS = 1u;
const BYTES = 2u;

fn value(block: u32, at: u32) -> f32 {
    return bitcast<f32>(short_at(block) << 16u);
}
