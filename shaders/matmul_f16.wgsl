// x W^T with weights in F16 as they are stored, inputs rounded to F16, sums in F32. See shared/halves_product.wgsl.
// Twins: matmul_f16.cu, matmul_direct.wgsl of rounded operands.

fn values_of(pair: u32) -> vec2<f32> {
    return unpack2x16float(pair);
}
