// sum += values. One thread per value.
// Twins: add.wgsl, src/backend/cpu/elementwise.rs.

struct Parameters {
    u32 count;
};

extern "C" __global__ void __launch_bounds__(256) add(
    float* __restrict__ sum,
    const float* __restrict__ values,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        sum[i] += values[i];
    }
}
