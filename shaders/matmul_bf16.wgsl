// x W^T with weights in BF16 as they are stored, inputs rounded to BF16, sums in F32. See shared/halves_product.wgsl.
// Twins: matmul_bf16.cu, matmul_direct.wgsl of rounded operands.

fn values_of(pair: u32) -> vec2<f32> {
    return vec2(bitcast<f32>(pair << 16u), bitcast<f32>(pair & 0xffff0000u));
}
