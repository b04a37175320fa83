// rows[r, c] += bias[c]. One thread per value.
// Twins: add_bias.wgsl, src/backend/cpu/mod.rs.

struct Parameters {
    u32 count;
    u32 width;
};

extern "C" __global__ void __launch_bounds__(256) add_bias(
    float* __restrict__ rows,
    const float* __restrict__ bias,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        rows[i] += bias[i % p.width];
    }
}
