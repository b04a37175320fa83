// x W^T with weights in BF16 as they are stored, inputs rounded to BF16, sums in F32, on tensor cores: see
// shared/halves_product.cuh.
// Twins: matmul_bf16.wgsl, matmul_direct.cu of rounded operands.

static __device__ inline void multiply(float (&sums)[4], const u32 (&left)[LEFT_WORDS], const u32 (&right)[RIGHT_WORDS]) {
    multiply_bf16(sums, left, right);
}
