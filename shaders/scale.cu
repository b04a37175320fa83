// values *= factor. One thread per value.
// Twins: scale.wgsl, src/backend/cpu/mod.rs.

struct Parameters {
    u32 count;
    float factor;
};

extern "C" __global__ void __launch_bounds__(256) scale(
    float* __restrict__ values,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        values[i] *= p.factor;
    }
}
