// Q4_0: `d q`. Block of 32: d (F16), 16 bytes; byte j holds the codes of j and j + 16, each 8 too large.
// Twin: formats/src/block/q4_0.rs.

const ELEMENTS = 32u;
const BYTES = 18u;

fn value(block: u32, at: u32) -> f32 {
    let code = (byte_at(block + 2u + at % 16u) >> (at / 16u * 4u)) & 0xfu;
    return half_at(block) * f32(i32(code) - 8);
}
