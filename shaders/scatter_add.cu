// sum[rows[i], c] += weights[i] values[i, c], counted from first_sum and first_value; no row is named twice. One thread per
// value.
// Twins: scatter_add.wgsl, src/backend/cpu/mod.rs.

struct Parameters {
    u32 count;
    u32 width;
    u32 first_sum;
    u32 first_value;
};

extern "C" __global__ void __launch_bounds__(256) scatter_add(
    float* __restrict__ sum,
    const float* __restrict__ values,
    const u32* __restrict__ rows,
    const float* __restrict__ weights,
    Parameters p
) {
    const u32 i = group_index() * 256u + threadIdx.x;
    if (i < p.count) {
        const u32 row = i / p.width;
        sum[p.first_sum + rows[row] * p.width + i % p.width] += weights[row] * values[p.first_value + i];
    }
}
