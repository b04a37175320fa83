// MXFP4: `VALUES[q] 2^(e - 128)`. Block of 32: e (E8M0), 16 bytes; byte j holds the codes of j (low) and j + 16 (high).
// In integers, as devices may take the subnormal numbers of small scales for zero.
// Twins: dequantize_mxfp4.cu, formats/src/block/mxfp4.rs.

const ELEMENTS = 32u;
const BYTES = 17u;

fn value(block: u32, at: u32) -> f32 {
    let bits = bitcast<u32>(MXFP4_VALUES[plane(block + 1u, 4u, 16u, at)]);
    let sign = bits & 0x80000000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude == 0u {
        return 0.0;
    }
    let exponent = i32(magnitude >> 23u) + i32(byte_at(block)) - 128;
    let mantissa = magnitude & 0x7fffffu;
    if exponent >= 255 {
        return bitcast<f32>(sign | 0x7f800000u);
    }
    if exponent <= 0 {
        return bitcast<f32>(sign | ((mantissa | 0x800000u) >> u32(1 - exponent)));
    }
    return bitcast<f32>(sign | (u32(exponent) << 23u) | mantissa);
}
