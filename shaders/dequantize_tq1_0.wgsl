// TQ1_0: `(q - 1) d`. Block of 256: 32 bytes with five codes each, byte m of m + 32n; 16 bytes with five, of 160 + m +
// 16n; 4 bytes with four, of 240 + m + 4n; d (F16). A byte is a fraction of 256, its digits to base 3 the codes.
// Twins: dequantize_tq1_0.cu, formats/src/block/tq1_0.rs.

const ELEMENTS = 256u;
const BYTES = 54u;

fn value(block: u32, at: u32) -> f32 {
    // Elements before these bytes, bytes before them, their number.
    var first = 0u;
    var first_byte = 0u;
    var stride = 32u;
    if at >= 240u {
        first = 240u;
        first_byte = 48u;
        stride = 4u;
    } else if at >= 160u {
        first = 160u;
        first_byte = 32u;
        stride = 16u;
    }
    var fraction = byte_at(block + first_byte + (at - first) % stride);
    // Each step drops the first digit.
    for (var n = (at - first) / stride; n > 0u; n -= 1u) {
        fraction = fraction * 3u & 0xffu;
    }
    let code = fraction * 3u >> 8u;
    return (f32(code) - 1.0) * half_at(block + 52u);
}
