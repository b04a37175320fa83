// Products of F32 whose operands are in parts of BF16, as split_floats leaves them: x = x0 + x1 + x2.
//
// Devices without tensor cores multiply values, not parts: nothing is gained, and nothing is left out of a product. Sums in
// F32, in order of k.
// Twins: split_product.cuh, matmul_direct.wgsl of operands in one piece.

const TILE = 128u;
const PARTS = 3u;

// Words of a part of a row.
fn part_words(inner: u32) -> u32 {
    return (inner + 31u) / 32u * 16u;
}

// Two values of BF16.
fn values_of(pair: u32) -> vec2<f32> {
    return vec2(bitcast<f32>(pair << 16u), bitcast<f32>(pair & 0xffff0000u));
}

// Two values from two of each part, the smallest first.
fn joined(first: u32, second: u32, third: u32) -> vec2<f32> {
    return values_of(third) + values_of(second) + values_of(first);
}
