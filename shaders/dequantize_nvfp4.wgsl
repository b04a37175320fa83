// NVFP4: `scale VALUES[q]`. Block of 64: 4 bytes, per 16 elements a scale (UE4M3, halved); 32 bytes, per 16 elements
// byte j holds the codes of j (low) and j + 8 (high).
// Twins: dequantize_nvfp4.cu, formats/src/block/nvfp4.rs.

const ELEMENTS = 64u;
const BYTES = 36u;

fn value(block: u32, at: u32) -> f32 {
    let d = byte_at(block + at / 16u);
    let exponent = (d >> 3u) & 15u;
    let mantissa = f32(d & 7u);
    var scale = (1.0 + mantissa / 8.0) * bitcast<f32>((exponent + 119u) << 23u);
    if exponent == 0u {
        scale = mantissa * (1.0 / 1024.0);
    }
    if d == 0x7fu {
        scale = 0.0;
    }
    return scale * MXFP4_VALUES[plane(block + 4u, 4u, 8u, at)];
}
