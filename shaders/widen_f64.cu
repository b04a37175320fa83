// out[i, j] = (x[i, j] before[j]) after[j] in f64.
//
// x: [rows, width] in f32. out: the same in f64. Each product is rounded: the bits of the CPU. One thread per value.
// Twins: none in WGSL, which has no f64; src/rewrite/map.rs.

struct Parameters {
    u32 count;
    u32 width;
};

extern "C" __global__ void __launch_bounds__(256) widen_f64(
    const float* __restrict__ x,
    const double* __restrict__ before,
    const double* __restrict__ after,
    double* __restrict__ out,
    Parameters p
) {
    const u32 index = group_index() * 256u + threadIdx.x;
    if (index >= p.count) {
        return;
    }
    const u32 j = index % p.width;
    out[index] = (double)x[index] * before[j] * after[j];
}
