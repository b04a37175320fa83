// x W^T with weights in F16 as they are stored, inputs rounded to F16, sums in F32, on tensor cores: see
// shared/halves_product.cuh.
// Twins: matmul_f16.wgsl, matmul_direct.cu of rounded operands.

#ifndef TENSOR_CORES
static __device__ inline float value_of(u32 bits) { return half_of(bits); }
#endif

static __device__ inline void multiply(float (&sums)[4], const u32 (&left)[LEFT_WORDS], const u32 (&right)[RIGHT_WORDS]) {
#ifdef TENSOR_CORES
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
    for (u32 part = 0u; part < 4u; part++) {
        for (u32 word = 0u; word < 8u; word++) {
            const u32 x = left[part / 2u * 8u + word];
            const u32 w = right[part % 2u * 8u + word];
            sums[part] = fmaf(value_of(x & 0xffffu), value_of(w & 0xffffu), sums[part]);
            sums[part] = fmaf(value_of(x >> 16), value_of(w >> 16), sums[part]);
        }
    }
#endif
}
