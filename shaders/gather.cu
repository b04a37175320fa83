// out[i, c] = input[rows[i], c]. One thread per value.
// Twins: gather.wgsl, src/backend/cpu/mod.rs.

struct Parameters {
    u32 count;
    u32 width;
};

extern "C" __global__ void __launch_bounds__(256) gather(
    const float* __restrict__ input,
    const u32* __restrict__ rows,
    float* __restrict__ out,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        out[i] = input[rows[i / p.width] * p.width + i % p.width];
    }
}
